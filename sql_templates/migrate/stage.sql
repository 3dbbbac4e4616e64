-- component: tables
-- purpose: temporary tables for one segment of a migration, that the service role, or the owner of the audit trail, reads when it merges them
-- variables: embedding_dims, owner, role, vector_schema
-- runs as: administrator
-- safe to repeat: temporary, gone at the end of the transaction
create temporary table staged_memories (
  place integer,
  id uuid,
  embedding {{ vector_schema | ident }}.vector({{ embedding_dims }}),
  payload jsonb,
  will_embed boolean,
  state text,
  archived_at timestamptz,
  deleted_at timestamptz,
  expires_at timestamptz,
  verdict text
) on commit drop;
create temporary table staged_entities (
  place integer,
  id uuid,
  embedding {{ vector_schema | ident }}.vector({{ embedding_dims }}),
  payload jsonb,
  will_embed boolean,
  verdict text
) on commit drop;
create temporary table staged_relationships (
  place integer,
  id uuid,
  source_memory_id uuid,
  target_memory_id uuid,
  relationship_type text,
  strength numeric,
  metadata jsonb,
  user_id text,
  created_at timestamptz,
  verdict text
) on commit drop;
create temporary table staged_history (
  place integer,
  memory_id uuid,
  user_id text,
  operation text,
  old_value jsonb,
  actor text,
  changed_at timestamptz,
  verdict text
) on commit drop;
grant select, insert, update, delete on staged_memories, staged_entities, staged_relationships, staged_history
to {{ role | ident }}, {{ owner | ident }};
