-- component: tables
-- purpose: temporary tables for a segment of a migration and what was judged of its rows, that the service role, or the owner of the audit trail, reads when it merges them
-- variables: embedding_dims, embedding_storage, owner, role, vector_schema
-- runs as: administrator
-- safe to repeat: creates only what is missing; temporary, empty after each transaction, gone with the session
create temporary table if not exists staged_memories (
  place integer,
  id uuid,
  embedding {{ vector_schema | ident }}.vector({{ embedding_dims }}) storage {{ embedding_storage }},
  payload jsonb,
  will_embed boolean,
  state text,
  archived_at timestamptz,
  deleted_at timestamptz,
  expires_at timestamptz
) on commit delete rows;
create temporary table if not exists staged_entities (
  place integer,
  id uuid,
  embedding {{ vector_schema | ident }}.vector({{ embedding_dims }}) storage {{ embedding_storage }},
  payload jsonb,
  will_embed boolean
) on commit delete rows;
create temporary table if not exists staged_relationships (
  place integer,
  id uuid,
  source_memory_id uuid,
  target_memory_id uuid,
  relationship_type text,
  strength numeric,
  metadata jsonb,
  user_id text,
  created_at timestamptz
) on commit delete rows;
create temporary table if not exists staged_history (
  place integer,
  memory_id uuid,
  user_id text,
  operation text,
  old_value jsonb,
  actor text,
  changed_at timestamptz
) on commit delete rows;
create temporary table if not exists judged (
  place integer not null,
  verdict text not null,
  constraint judged_pkey primary key (place)
) on commit delete rows;
grant select, insert, update, delete on staged_memories, staged_entities, staged_relationships, staged_history, judged
to {{ role | ident }}, {{ owner | ident }};
