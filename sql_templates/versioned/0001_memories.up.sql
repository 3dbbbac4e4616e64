-- component: tables
-- purpose: the two tables that Mem0's collections are views of
-- variables: embedding_dims, embedding_storage, embedding_type, vector_schema
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
-- Column order: what a search reads comes first, so that it need not step over the rest.
create table memharbor.memories (
  id uuid not null default gen_random_uuid(),
  embedding {{ vector_schema | ident }}.{{ embedding_type }}({{ embedding_dims }}),
  payload jsonb not null,
  user_id text,
  agent_id text,
  run_id text,
  org_id text,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  memory text,
  hash text,
  metadata jsonb,
  categories text[],
  state text not null default 'active',
  expires_at timestamptz,
  archived_at timestamptz,
  deleted_at timestamptz,
  constraint memories_pkey primary key (id),
  -- '' is nobody: a row of '' would belong to everyone who has not said who they are.
  constraint memories_user_id_check check (user_id <> ''),
  constraint memories_payload_check check (jsonb_typeof(payload) = 'object'),
  constraint memories_metadata_check check (jsonb_typeof(metadata) = 'object'),
  constraint memories_state_check check (state in ('active', 'paused', 'archived', 'deleted'))
) with (
  -- Without it a plain embedding pushes the payload out of line, and Mem0's filter fetches it for every row.
  toast_tuple_target = 8160,
  -- Fresh statistics keep the choice between exact search and a user's own index right.
  autovacuum_vacuum_scale_factor = 0.05,
  autovacuum_analyze_scale_factor = 0.02
);
alter table memharbor.memories
  alter embedding set storage {{ embedding_storage }},
  alter payload set storage main,
  alter memory set storage main,
  alter metadata set storage main,
  alter user_id set statistics 1000;
comment on table memharbor.memories is
  'One row per memory: Mem0''s payload and the canonical columns, kept in step by trigger sync_memory.';

create table memharbor.entities (
  id uuid not null,
  vector {{ vector_schema | ident }}.{{ embedding_type }}({{ embedding_dims }}),
  payload jsonb not null,
  constraint entities_pkey primary key (id),
  constraint entities_payload_check check (jsonb_typeof(payload) = 'object'),
  constraint entities_user_id_check check ((payload ->> 'user_id') <> '')
) with (toast_tuple_target = 8160);
alter table memharbor.entities
  alter vector set storage {{ embedding_storage }},
  alter payload set storage main;
comment on table memharbor.entities is
  'Entities that Mem0 finds in memories and links to them; its second collection.';
