-- bench/tables.sql
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
  embedding "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘".vector(1536),
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  constraint memories_pkey primary key (id)
);
create index if not exists memories_embedding on memharbor_bench.memories
  using hnsw (embedding "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘".vector_cosine_ops) with (m = 16, ef_construction = 64);
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
  embedding "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘".vector(1536) storage plain,
  payload jsonb
);

-- migrate/chosen.sql
-- component: tables
-- purpose: the ids that a person chose of the rows to embed
-- variables: role
-- runs as: administrator
-- safe to repeat: creates only what is missing; temporary, gone with the session
create temporary table if not exists chosen_ids (id uuid not null, constraint chosen_ids_pkey primary key (id));
grant select on chosen_ids to "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘";

-- migrate/foretold.sql
-- component: tables
-- purpose: the memories that a rehearsal would have inserted by now, for what refers to them in a later segment
-- variables: role
-- runs as: administrator
-- safe to repeat: creates only what is missing; temporary, gone with the session
create temporary table if not exists foretold_memories (id uuid not null, constraint foretold_memories_pkey primary key (id));
grant select on foretold_memories to "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘";

-- migrate/stage.sql
-- component: tables
-- purpose: temporary tables for a segment of a migration and what was judged of its rows, that the service role, or the owner of the audit trail, reads when it merges them
-- variables: embedding_dims, embedding_storage, owner, role, vector_schema
-- runs as: administrator
-- safe to repeat: creates only what is missing; temporary, empty after each transaction, gone with the session
create temporary table if not exists staged_memories (
  place integer,
  id uuid,
  embedding "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘".vector(1536) storage plain,
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
  embedding "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘".vector(1536) storage plain,
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
to "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘", "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘";

-- repeatable/10_database.sql
-- component: settings
-- purpose: who may connect to the database and create in it
-- variables: database
-- runs as: administrator
-- safe to repeat: states privileges that already hold
grant connect on database "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘" to
  memharbor_app, memharbor_service, memharbor_readonly, memharbor_backup, memharbor_pooler;
-- Nobody else is shut out of a database that others use too, for instance Supabase's.
do $own_database$
begin
  if exists (
    select from pg_catalog.pg_database
    where datname = current_database() and datdba = to_regrole('memharbor_owner')
  ) then
    -- Temporary tables outlive a transaction in a pooled session and could stand before the contract views.
    revoke connect, temporary on database "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘" from public;
    revoke create on schema public from public;
  else
    raise notice 'skipped: % is not owned by memharbor_owner, so the rights of PUBLIC in it are left alone', current_database();
  end if;
end
$own_database$;

-- repeatable/10_database.verify.sql
-- component: settings
-- purpose: raise when an application cannot connect, or anybody may create in schema public of our own database
-- variables: database
-- runs as: administrator
-- safe to repeat: reads only
do $require$
begin
  if not coalesce((has_database_privilege('memharbor_app',  E'we"ird''; drop table x; --\\ {{ 7 * 7 }} {% raw %} Ü🐘', 'connect')), false) then
    raise exception using errcode = 'object_not_in_prerequisite_state', message = 'memharbor_app may not connect to the database';
  end if;
end
$require$;

do $require$
begin
  if not coalesce((has_database_privilege('memharbor_service',  E'we"ird''; drop table x; --\\ {{ 7 * 7 }} {% raw %} Ü🐘', 'connect')), false) then
    raise exception using errcode = 'object_not_in_prerequisite_state', message = 'memharbor_service may not connect to the database';
  end if;
end
$require$;

do $require$
begin
  if not coalesce((has_database_privilege('memharbor_readonly',  E'we"ird''; drop table x; --\\ {{ 7 * 7 }} {% raw %} Ü🐘', 'connect')), false) then
    raise exception using errcode = 'object_not_in_prerequisite_state', message = 'memharbor_readonly may not connect to the database';
  end if;
end
$require$;

do $require$
begin
  if not coalesce((has_database_privilege('memharbor_backup',  E'we"ird''; drop table x; --\\ {{ 7 * 7 }} {% raw %} Ü🐘', 'connect')), false) then
    raise exception using errcode = 'object_not_in_prerequisite_state', message = 'memharbor_backup may not connect to the database';
  end if;
end
$require$;

do $require$
begin
  if not coalesce((has_database_privilege('memharbor_pooler',  E'we"ird''; drop table x; --\\ {{ 7 * 7 }} {% raw %} Ü🐘', 'connect')), false) then
    raise exception using errcode = 'object_not_in_prerequisite_state', message = 'memharbor_pooler may not connect to the database';
  end if;
end
$require$;

do $require$
begin
  if not coalesce((select pg_get_userbyid(datdba) <> 'memharbor_owner' or not (has_schema_privilege('memharbor_app', 'public', 'create') or has_database_privilege('memharbor_app', datname, 'temporary')) from pg_catalog.pg_database where datname = current_database()), false) then
    raise exception using errcode = 'object_not_in_prerequisite_state', message = 'memharbor_app may create in schema public or make temporary tables';
  end if;
end
$require$;


-- repeatable/20_role_settings.sql
-- component: settings
-- purpose: the settings that Mem0 never makes, on the roles, so that they hold through a transaction pooler
-- variables: lock_timeout_ms, statement_timeout_ms, vector_schema
-- runs as: administrator
-- safe to repeat: sets each setting to one value
-- A generic plan does not know the user: it never takes a user's own vector index, and stock filters after 40 candidates.
alter role memharbor_app set plan_cache_mode = 'force_custom_plan';
-- pg_temp last: a temporary table of a pooled session cannot stand before a contract view.
alter role memharbor_app set search_path = public, "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘", pg_temp;
alter role memharbor_app set lock_timeout = '3000ms';
alter role memharbor_app set statement_timeout = '30000ms';
-- A generic plan does not know the user: it never takes a user's own vector index, and stock filters after 40 candidates.
alter role memharbor_service set plan_cache_mode = 'force_custom_plan';
-- pg_temp last: a temporary table of a pooled session cannot stand before a contract view.
alter role memharbor_service set search_path = public, "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘", pg_temp;
alter role memharbor_service set lock_timeout = '3000ms';
alter role memharbor_service set statement_timeout = '30000ms';
-- A generic plan does not know the user: it never takes a user's own vector index, and stock filters after 40 candidates.
alter role memharbor_readonly set plan_cache_mode = 'force_custom_plan';
-- pg_temp last: a temporary table of a pooled session cannot stand before a contract view.
alter role memharbor_readonly set search_path = public, "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘", pg_temp;
alter role memharbor_readonly set lock_timeout = '3000ms';
alter role memharbor_readonly set statement_timeout = '30000ms';

-- repeatable/30_pgvector.sql
-- component: extension
-- purpose: pgvector, in the schema that the contract names
-- variables: vector_schema
-- runs as: administrator
-- safe to repeat: creates the extension only where it is missing
create extension if not exists vector with schema "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘";
do $place$
declare
  found_schema text := (
    select n.nspname from pg_catalog.pg_extension e join pg_catalog.pg_namespace n on n.oid = e.extnamespace
    where e.extname = 'vector'
  );
begin
  if found_schema <>  E'we"ird''; drop table x; --\\ {{ 7 * 7 }} {% raw %} Ü🐘' then
    raise exception using
      errcode = 'object_not_in_prerequisite_state',
      message = format('extension vector is in schema %s, not in %s', found_schema,  E'we"ird''; drop table x; --\\ {{ 7 * 7 }} {% raw %} Ü🐘'),
      hint = format('run: alter extension vector set schema %s;',  E'"we""ird''; drop table x; --\\ {{ 7 * 7 }} {% raw %} Ü🐘"');
  end if;
end
$place$;

-- repeatable/30_pgvector.verify.sql
-- component: extension
-- purpose: raise when pgvector or its halfvec type is missing
-- variables: vector_schema
-- runs as: administrator
-- safe to repeat: reads only
do $require$
begin
  if not coalesce((to_regtype( E'"we""ird''; drop table x; --\\ {{ 7 * 7 }} {% raw %} Ü🐘".vector') is not null), false) then
    raise exception using errcode = 'object_not_in_prerequisite_state', message = 'extension vector is missing';
  end if;
end
$require$;

do $require$
begin
  if not coalesce((to_regtype( E'"we""ird''; drop table x; --\\ {{ 7 * 7 }} {% raw %} Ü🐘".halfvec') is not null), false) then
    raise exception using errcode = 'object_not_in_prerequisite_state', message = 'extension vector is older than 0.7.0: it has no halfvec';
  end if;
end
$require$;


-- repeatable/45_fingerprints.sql
-- component: tables
-- purpose: fingerprints of every user's rows, by which backups, drills, checkpoints and restores are compared
-- variables: embedding_type, include_graph, include_history, vector_schema
-- runs as: owner
-- safe to repeat: replaces the function
-- The bits of an embedding are those that its binary form sends; everything else is the row's text. Rows count as a set:
-- their order, their place and the numbers of the audit trail's rows mean nothing. The caller sees what its role sees:
-- all rows as superuser, memharbor_backup or memharbor_service. Users are named by a digest, so that a record of
-- fingerprints survives an erasure. About 15 microseconds a row of 384 dimensions.
create or replace function memharbor.fingerprint_users()
returns table (user_sha256 text, table_name text, row_count bigint, fingerprint text)
language sql stable
set search_path = ''
set timezone = 'UTC'
set datestyle = 'ISO, MDY'
set extra_float_digits = 1
set bytea_output = 'hex'
as $function$
  with hashed (table_name, owner, digest) as (
    select 'memories', user_id, sha256(
      convert_to(row(
        id, payload, user_id, agent_id, run_id, org_id, created_at, updated_at, memory, hash, metadata, categories,
        state, expires_at, archived_at, deleted_at
      )::text, 'UTF8')
      || coalesce("we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘".vector_send(embedding), '')
    )
    from memharbor.memories
    union all
    select 'entities', payload ->> 'user_id', sha256(
      convert_to(row(id, payload)::text, 'UTF8')
      || coalesce("we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘".vector_send(vector), '')
    )
    from memharbor.entities
    union all
    select 'memory_relationships', user_id, sha256(convert_to(r::text, 'UTF8')) from memharbor.memory_relationships r
    union all
    select 'memory_categories', user_id, sha256(convert_to(c::text, 'UTF8')) from memharbor.memory_categories c
    union all
    select 'memory_history', user_id, sha256(
      convert_to(row(memory_id, user_id, operation, old_value, old_state, actor, changed_at)::text, 'UTF8')
    )
    from memharbor.memory_history
    union all
    select 'org_members', user_id, sha256(convert_to(o::text, 'UTF8')) from memharbor.org_members o
    union all
    select 'categories', null, sha256(convert_to(c::text, 'UTF8')) from memharbor.categories c
    union all
    select 'configs', null, sha256(convert_to(c::text, 'UTF8')) from memharbor.configs c
  )
  select
    coalesce(encode(sha256(convert_to(owner, 'UTF8')), 'hex'), ''), table_name, count(*),
    encode(sha256(string_agg(digest, '' order by digest)), 'hex')
  from hashed
  group by owner, table_name
$function$;
comment on function memharbor.fingerprint_users() is
  'One row per user and table: how many rows and a digest of them; the user as SHA-256, empty for rows of nobody.';

-- repeatable/70_search_settings.sql
-- component: indexes
-- purpose: how far a vector search looks, on the roles, because Mem0 never says it
-- variables: hnsw_ef_search, vector_schema
-- runs as: administrator
-- safe to repeat: sets each setting to one value
-- pgvector must be loaded: before that, only a superuser may set what begins with hnsw.
select '[1]'::"we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘".vector;
alter role memharbor_app set hnsw.ef_search = 100;
-- Where a filter removes candidates, look on until there are enough, in exact order.
alter role memharbor_app set hnsw.iterative_scan = 'strict_order';
alter role memharbor_service set hnsw.ef_search = 100;
-- Where a filter removes candidates, look on until there are enough, in exact order.
alter role memharbor_service set hnsw.iterative_scan = 'strict_order';
alter role memharbor_readonly set hnsw.ef_search = 100;
-- Where a filter removes candidates, look on until there are enough, in exact order.
alter role memharbor_readonly set hnsw.iterative_scan = 'strict_order';

-- roles/database.sql
-- component: roles
-- purpose: the database that holds the memories
-- variables: database, from_template0
-- runs as: administrator
-- safe to repeat: run only where the database does not exist
-- transaction: no
create database "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘" owner memharbor_owner template template0 encoding 'UTF8';

-- roles/password.sql
-- component: roles
-- purpose: give one role its password, as a SCRAM verifier that the client computed
-- variables: role, verifier
-- runs as: administrator
-- safe to repeat: run only where the stored verifier does not match the password
alter role "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘" password  E'o''brien\\''; drop table x; -- " {{ 7 * 7 }} {% raw %} $$ %s 日本 🐘';

-- tenant/create_index.sql
-- component: indexes
-- purpose: the vector index of one user who has many memories
-- variables: embedding_operator_class, hnsw_ef_construction, hnsw_m, index_name, user_id, vector_schema
-- runs as: owner
-- safe to repeat: builds only what is missing; an invalid index of an interrupted build is dropped before
-- transaction: no
create index concurrently if not exists "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘" on memharbor.memories
  using hnsw (embedding "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘".vector_cosine_ops)
  with (m = 16, ef_construction = 128)
  where ((payload ->> 'user_id') =  E'o''brien\\''; drop table x; -- " {{ 7 * 7 }} {% raw %} $$ %s 日本 🐘');
comment on index memharbor."we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘" is  E'o''brien\\''; drop table x; -- " {{ 7 * 7 }} {% raw %} $$ %s 日本 🐘';

-- tenant/drop_index.sql
-- component: indexes
-- purpose: drop one index without making writers wait
-- variables: index_name
-- runs as: owner
-- safe to repeat: does nothing where the index is gone
-- transaction: no
drop index concurrently if exists memharbor."we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘";

-- versioned/0001_memories.up.sql
-- component: tables
-- purpose: the two tables that Mem0's collections are views of
-- variables: embedding_dims, embedding_storage, embedding_type, vector_schema
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
-- Column order: what a search reads comes first, so that it need not step over the rest.
create table memharbor.memories (
  id uuid not null default gen_random_uuid(),
  embedding "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘".vector(1536),
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
  alter embedding set storage plain,
  alter payload set storage main,
  alter memory set storage main,
  alter metadata set storage main,
  alter user_id set statistics 1000;
comment on table memharbor.memories is
  'One row per memory: Mem0''s payload and the canonical columns, kept in step by trigger sync_memory.';

create table memharbor.entities (
  id uuid not null,
  vector "we""ird'; drop table x; --\ {{ 7 * 7 }} {% raw %} Ü🐘".vector(1536),
  payload jsonb not null,
  constraint entities_pkey primary key (id),
  constraint entities_payload_check check (jsonb_typeof(payload) = 'object'),
  constraint entities_user_id_check check ((payload ->> 'user_id') <> '')
) with (toast_tuple_target = 8160);
alter table memharbor.entities
  alter vector set storage plain,
  alter payload set storage main;
comment on table memharbor.entities is
  'Entities that Mem0 finds in memories and links to them; its second collection.';

