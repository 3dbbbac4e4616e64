-- component: tables
-- purpose: what a load is compared with: the table, indexes and trigger that the seeds' import script writes to, and a table without any
-- variables: embedding_dims, vector_schema
-- runs as: administrator
-- safe to repeat: creates only what is missing
create schema if not exists memharbor_bench;
create table if not exists memharbor_bench.memories (
  id uuid not null default gen_random_uuid(),
  user_id text not null,
  agent_id text,
  run_id text,
  memory text not null,
  hash text,
  metadata jsonb not null default '{}',
  categories text[] not null default '{}',
  embedding {{ vector_schema | ident }}.vector({{ embedding_dims }}),
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  constraint memories_pkey primary key (id)
);
create index if not exists memories_embedding on memharbor_bench.memories
  using hnsw (embedding {{ vector_schema | ident }}.vector_cosine_ops) with (m = 16, ef_construction = 64);
create index if not exists memories_user_id on memharbor_bench.memories (user_id);
create index if not exists memories_agent_id on memharbor_bench.memories (agent_id);
create index if not exists memories_run_id on memharbor_bench.memories (run_id);
create index if not exists memories_user_created on memharbor_bench.memories (user_id, created_at desc);
create index if not exists memories_user_agent on memharbor_bench.memories (user_id, agent_id);
create index if not exists memories_content_fts on memharbor_bench.memories
  using gin (to_tsvector('english', memory));
create table if not exists memharbor_bench.memory_audit (
  id bigint generated always as identity,
  operation text not null,
  new_row jsonb,
  changed_at timestamptz not null default now(),
  constraint memory_audit_pkey primary key (id)
);
create or replace function memharbor_bench.audit_memory_changes() returns trigger
language plpgsql
set search_path = pg_catalog
as $$
begin
  insert into memharbor_bench.memory_audit (operation, new_row) values (tg_op, to_jsonb(new) - 'embedding');
  return null;
end
$$;
create or replace trigger audit_memory_changes after insert or update on memharbor_bench.memories
  for each row execute function memharbor_bench.audit_memory_changes();
create table if not exists memharbor_bench.plain (
  id uuid,
  embedding {{ vector_schema | ident }}.vector({{ embedding_dims }}) storage plain,
  payload jsonb
);
