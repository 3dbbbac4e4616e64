-- Memharbor's schema: 3072 dimensions, with graph, with history.
-- Run it in the database as its administrator: psql --file=this-file "$DATABASE_URL". It may run twice.
-- Roles have no passwords yet: give them one each with \password, for instance \password memharbor_app
\set ON_ERROR_STOP on
set client_min_messages = warning;
set search_path = '';

begin;
-- component: roles
-- purpose: the eight roles of Memharbor with exactly their attributes and memberships
-- variables: none
-- runs as: administrator
-- safe to repeat: creates what is missing and sets attributes to what they already are
do $role$
begin
  if to_regrole('memharbor_owner') is null then
    create role "memharbor_owner" login;
  end if;
end
$role$;
comment on role "memharbor_owner" is 'owns every object; runs DDL';
do $role$
begin
  if to_regrole('memharbor_app') is null then
    create role "memharbor_app" login;
  end if;
end
$role$;
comment on role "memharbor_app" is 'reads and writes the memories of the user it acts for';
do $role$
begin
  if to_regrole('memharbor_service') is null then
    create role "memharbor_service" login;
  end if;
end
$role$;
comment on role "memharbor_service" is 'reads and writes every memory by policy, for the server of Mem0';
do $role$
begin
  if to_regrole('memharbor_readonly') is null then
    create role "memharbor_readonly" login;
  end if;
end
$role$;
comment on role "memharbor_readonly" is 'reads every memory by policy, for reports';
do $role$
begin
  if to_regrole('memharbor_backup') is null then
    create role "memharbor_backup" login;
  end if;
end
$role$;
comment on role "memharbor_backup" is 'reads everything for logical backups';
do $role$
begin
  if to_regrole('memharbor_pooler') is null then
    create role "memharbor_pooler" login;
  end if;
end
$role$;
comment on role "memharbor_pooler" is 'looks up logins for PgBouncer (auth_query), reads nothing else';
do $role$
begin
  if to_regrole('memharbor_replicator') is null then
    create role "memharbor_replicator" login;
  end if;
end
$role$;
comment on role "memharbor_replicator" is 'streams WAL to replicas';
do $role$
begin
  if to_regrole('memharbor_rewind') is null then
    create role "memharbor_rewind" login;
  end if;
end
$role$;
comment on role "memharbor_rewind" is 'lets pg_rewind read files, through four functions in database postgres';

-- Only a superuser may say NOSUPERUSER and its like; a role that another administrator made has none of them anyway.
do $attributes$
declare
  administrator pg_catalog.pg_roles := (select r from pg_catalog.pg_roles r where r.rolname = current_user);
  role_name text;
begin
  foreach role_name in array array['memharbor_owner', 'memharbor_app', 'memharbor_service', 'memharbor_readonly', 'memharbor_backup', 'memharbor_pooler', 'memharbor_replicator', 'memharbor_rewind'] loop
    if administrator.rolsuper then
      execute format(
        'alter role %I with login nosuperuser nocreatedb nocreaterole inherit connection limit -1 %s %s',
        role_name,
        case when role_name = 'memharbor_backup' then 'bypassrls' else 'nobypassrls' end,
        case when role_name = 'memharbor_replicator' then 'replication' else 'noreplication' end
      );
    else
      execute format('alter role %I with login inherit connection limit -1', role_name);
    end if;
  end loop;
  if not administrator.rolsuper then
    if administrator.rolbypassrls then
      alter role memharbor_backup with bypassrls;
    else
      raise notice 'skipped: memharbor_backup has no BYPASSRLS, because % cannot give it; dump with --enable-row-security',
        current_user;
    end if;
    if administrator.rolreplication then
      alter role memharbor_replicator with replication;
    else
      raise notice 'skipped: memharbor_replicator has no REPLICATION, because % cannot give it', current_user;
    end if;
  end if;
end
$attributes$;

do $memberships$
begin
  if pg_has_role(current_user, 'pg_read_all_data', 'member with admin option') then
    grant pg_read_all_data to memharbor_backup;
  else
    raise notice 'skipped: memharbor_backup is no member of pg_read_all_data, because % cannot grant it', current_user;
  end if;
  -- Whoever rolls out must be able to act as the owner, and as the service role to see rows past row level security.
  if not (select r.rolsuper from pg_catalog.pg_roles r where r.rolname = current_user) then
    execute format('grant memharbor_owner, memharbor_service to %I with inherit true, set true', current_user);
  end if;
end
$memberships$;
commit;

begin;
-- component: ledger
-- purpose: the private schema that holds everything of Memharbor's
-- variables: none
-- runs as: administrator
-- safe to repeat: creates the schema only where it is missing
create schema if not exists memharbor authorization memharbor_owner;
grant usage, create on schema public to memharbor_owner;
commit;

begin;
set local role "memharbor_owner";
-- component: ledger
-- purpose: what was applied to this database, when, by whom, and what its catalog looked like then
-- variables: none
-- runs as: owner
-- safe to repeat: creates only what is missing
create table if not exists memharbor.schema_migrations (
  id bigint generated always as identity,
  name text not null,
  component text not null,
  kind text not null,
  direction text not null,
  checksum text not null,
  applied_at timestamptz not null default clock_timestamp(),
  applied_by text not null default session_user,
  execution_ms integer not null,
  constraint schema_migrations_pkey primary key (id),
  constraint schema_migrations_kind_check check (kind in ('versioned', 'repeatable')),
  constraint schema_migrations_direction_check check (direction in ('up', 'down'))
);
comment on table memharbor.schema_migrations is
  'Every step that was applied or taken back, in order; a step is applied while its last row says up.';

create table if not exists memharbor.schema_state (
  only_row boolean not null default true,
  fingerprint text not null,
  catalog jsonb not null,
  recorded_at timestamptz not null default clock_timestamp(),
  constraint schema_state_pkey primary key (only_row),
  constraint schema_state_only_row_check check (only_row)
);
comment on table memharbor.schema_state is
  'The catalog as the last run left it; what differs from it now was changed by something else.';
commit;

-- repeatable/10_database.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> '7fba027dcd713668be967b3bd217cb889bee09cb53cfb4ea5332f8631d76d1a2'
    from memharbor.schema_migrations where name = 'database' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
-- component: settings
-- purpose: who may connect to the database and create in it
-- variables: database
-- runs as: administrator
-- safe to repeat: states privileges that already hold
grant connect on database "memharbor" to
  memharbor_app, memharbor_service, memharbor_readonly, memharbor_backup, memharbor_pooler;
-- Nobody else is shut out of a database that others use too, for instance Supabase's.
do $own_database$
begin
  if exists (
    select from pg_catalog.pg_database
    where datname = current_database() and datdba = to_regrole('memharbor_owner')
  ) then
    -- Temporary tables outlive a transaction in a pooled session and could stand before the contract views.
    revoke connect, temporary on database "memharbor" from public;
    revoke create on schema public from public;
  else
    raise notice 'skipped: % is not owned by memharbor_owner, so the rights of PUBLIC in it are left alone', current_database();
  end if;
end
$own_database$;
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  'database', 'settings', 'repeatable', 'up',
  '7fba027dcd713668be967b3bd217cb889bee09cb53cfb4ea5332f8631d76d1a2', 0
);
commit;
\endif

-- repeatable/20_role_settings.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> '6ca548e646b33a110a184e372cc27b3a41e12f02788fea5c0fc50217a8d71d74'
    from memharbor.schema_migrations where name = 'role_settings' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
-- component: settings
-- purpose: the settings that Mem0 never makes, on the roles, so that they hold through a transaction pooler
-- variables: lock_timeout_ms, statement_timeout_ms, vector_schema
-- runs as: administrator
-- safe to repeat: sets each setting to one value
-- A generic plan does not know the user: it never takes a user's own vector index, and stock filters after 40 candidates.
alter role memharbor_app set plan_cache_mode = 'force_custom_plan';
-- pg_temp last: a temporary table of a pooled session cannot stand before a contract view.
alter role memharbor_app set search_path = public, pg_temp;
alter role memharbor_app set lock_timeout = '3000ms';
alter role memharbor_app set statement_timeout = '30000ms';
-- A generic plan does not know the user: it never takes a user's own vector index, and stock filters after 40 candidates.
alter role memharbor_service set plan_cache_mode = 'force_custom_plan';
-- pg_temp last: a temporary table of a pooled session cannot stand before a contract view.
alter role memharbor_service set search_path = public, pg_temp;
alter role memharbor_service set lock_timeout = '3000ms';
alter role memharbor_service set statement_timeout = '30000ms';
-- A generic plan does not know the user: it never takes a user's own vector index, and stock filters after 40 candidates.
alter role memharbor_readonly set plan_cache_mode = 'force_custom_plan';
-- pg_temp last: a temporary table of a pooled session cannot stand before a contract view.
alter role memharbor_readonly set search_path = public, pg_temp;
alter role memharbor_readonly set lock_timeout = '3000ms';
alter role memharbor_readonly set statement_timeout = '30000ms';
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  'role_settings', 'settings', 'repeatable', 'up',
  '6ca548e646b33a110a184e372cc27b3a41e12f02788fea5c0fc50217a8d71d74', 0
);
commit;
\endif

-- repeatable/30_pgvector.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> 'f6d58112c835395c84e7deefc5b743a4cb5d8233449bff970f3aec6162efaeb2'
    from memharbor.schema_migrations where name = 'pgvector' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
-- component: extension
-- purpose: pgvector, in the schema that the contract names
-- variables: vector_schema
-- runs as: administrator
-- safe to repeat: creates the extension only where it is missing
create extension if not exists vector with schema "public";
do $place$
declare
  found_schema text := (
    select n.nspname from pg_catalog.pg_extension e join pg_catalog.pg_namespace n on n.oid = e.extnamespace
    where e.extname = 'vector'
  );
begin
  if found_schema <> 'public' then
    raise exception using
      errcode = 'object_not_in_prerequisite_state',
      message = format('extension vector is in schema %s, not in %s', found_schema, 'public'),
      hint = format('run: alter extension vector set schema %s;', '"public"');
  end if;
end
$place$;
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  'pgvector', 'extension', 'repeatable', 'up',
  'f6d58112c835395c84e7deefc5b743a4cb5d8233449bff970f3aec6162efaeb2', 0
);
commit;
\endif

-- repeatable/31_leakproof.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> 'eeecb592f0357a2c08df156a1460dc16f305384a3423c1d7c3857e45fad5b5f7'
    from memharbor.schema_migrations where name = 'leakproof' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
-- component: extension
-- purpose: let keyword search use its index under row level security, by marking three built-in functions LEAKPROOF
-- variables: leakproof
-- runs as: administrator
-- safe to repeat: sets a mark to one value, and only where it differs; only a superuser can
do $leakproof$
declare
  function_name regprocedure;
begin
  if not (select r.rolsuper from pg_catalog.pg_roles r where r.rolname = current_user) then
    raise notice 'skipped: LEAKPROOF is a superuser''s to give; answers are the same, keyword search of large users is slower';
    return;
  end if;
  for function_name in
    select p.oid::regprocedure from pg_catalog.pg_proc p
    where p.proleakproof <> true
      and p.oid in (
        'pg_catalog.jsonb_object_field_text(jsonb, text)'::regprocedure,
        'pg_catalog.ts_match_vq(tsvector, tsquery)'::regprocedure,
        'pg_catalog.to_tsvector(regconfig, text)'::regprocedure
      )
  loop
    execute format('alter function %s leakproof', function_name);
  end loop;
end
$leakproof$;
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  'leakproof', 'extension', 'repeatable', 'up',
  'eeecb592f0357a2c08df156a1460dc16f305384a3423c1d7c3857e45fad5b5f7', 0
);
commit;
\endif

-- repeatable/32_pooler.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> '4d023a2dcf0cf2c7ebfb0f21d61e4f159880357fd2d636ed70cef00e1cdb2d27'
    from memharbor.schema_migrations where name = 'pooler' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
-- component: extension
-- purpose: PgBouncer's auth_query; in a schema of its own, so that dropping memharbor does not lock everybody out
-- variables: none
-- runs as: administrator
-- safe to repeat: replaces the function and states privileges that already hold
do $pooler$
begin
  if not (select r.rolsuper from pg_catalog.pg_roles r where r.rolname = current_user) then
    raise notice 'skipped: memharbor_pooler.lookup reads pg_authid, which only a superuser can; use the provider''s pooler';
    return;
  end if;
  create schema if not exists memharbor_pooler;
  revoke all on schema memharbor_pooler from public;
  grant usage on schema memharbor_pooler to memharbor_pooler;
  create or replace function memharbor_pooler.lookup(p_user text)
  returns table (username text, secret text)
  language sql stable security definer set search_path = ''
  as $function$
    -- Logins that would get around row level security from outside never pass the pooler.
    select rolname::text, rolpassword
    from pg_catalog.pg_authid
    where rolname = p_user
      and rolcanlogin
      and not rolsuper
      and not rolreplication
      and (rolvaliduntil is null or rolvaliduntil > pg_catalog.now())
  $function$;
  revoke all on function memharbor_pooler.lookup(text) from public;
  grant execute on function memharbor_pooler.lookup(text) to memharbor_pooler;
end
$pooler$;
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  'pooler', 'extension', 'repeatable', 'up',
  '4d023a2dcf0cf2c7ebfb0f21d61e4f159880357fd2d636ed70cef00e1cdb2d27', 0
);
commit;
\endif

-- versioned/0001_memories.up.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> 'bae0d8049869c64928547ceff1bf8318e80485930e11b49ef3ba9d7a9930316e'
    from memharbor.schema_migrations where name = '0001_memories' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
set local role "memharbor_owner";
-- component: tables
-- purpose: the two tables that Mem0's collections are views of
-- variables: embedding_dims, embedding_storage, embedding_type, vector_schema
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
-- Column order: what a search reads comes first, so that it need not step over the rest.
create table memharbor.memories (
  id uuid not null default gen_random_uuid(),
  embedding "public".halfvec(3072),
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
  vector "public".halfvec(3072),
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
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  '0001_memories', 'tables', 'versioned', 'up',
  'bae0d8049869c64928547ceff1bf8318e80485930e11b49ef3ba9d7a9930316e', 0
);
commit;
\endif

-- versioned/0002_history.up.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> '84a4bfddd583e04756a7c94509a5ea95cf834f8a9ebdf20aa8c04d35c24d64ff'
    from memharbor.schema_migrations where name = '0002_history' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
set local role "memharbor_owner";
-- component: tables
-- purpose: what was changed about each memory, with the image before the change
-- variables: none
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
-- feature: history
create table memharbor.memory_history (
  id bigint generated always as identity,
  -- No foreign key: the history outlives the memory.
  memory_id uuid not null,
  user_id text,
  operation text not null,
  old_value jsonb,
  old_state text,
  actor text not null,
  changed_at timestamptz not null default clock_timestamp(),
  constraint memory_history_pkey primary key (id),
  constraint memory_history_operation_check check (operation in ('create', 'update', 'delete'))
);
create index memory_history_memory_id on memharbor.memory_history (memory_id, id);
create index memory_history_user_id on memharbor.memory_history (user_id, changed_at);
comment on table memharbor.memory_history is
  'Audit trail: one row per created, changed or deleted memory; the payload as it was before, so that no text is kept twice.';
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  '0002_history', 'tables', 'versioned', 'up',
  '84a4bfddd583e04756a7c94509a5ea95cf834f8a9ebdf20aa8c04d35c24d64ff', 0
);
commit;
\endif

-- versioned/0003_graph.up.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> '3797149940d131d868b30a2fa29ccd41e19ebf663ffd74ccde8d7f3d0b46fb98'
    from memharbor.schema_migrations where name = '0003_graph' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
set local role "memharbor_owner";
-- component: tables
-- purpose: typed, weighted relationships between memories
-- variables: none
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
-- feature: graph
create table memharbor.memory_relationships (
  id uuid not null default gen_random_uuid(),
  source_memory_id uuid not null,
  target_memory_id uuid not null,
  relationship_type text not null,
  strength numeric not null default 1.0,
  metadata jsonb not null default '{}',
  user_id text,
  created_at timestamptz not null default now(),
  constraint memory_relationships_pkey primary key (id),
  constraint memory_relationships_source_fkey foreign key (source_memory_id)
    references memharbor.memories (id) on delete cascade,
  constraint memory_relationships_target_fkey foreign key (target_memory_id)
    references memharbor.memories (id) on delete cascade,
  constraint memory_relationships_type_check check (relationship_type <> ''),
  constraint memory_relationships_strength_check check (strength between 0 and 1),
  constraint memory_relationships_user_id_check check (user_id <> '')
);
create index memory_relationships_source on memharbor.memory_relationships (source_memory_id);
create index memory_relationships_target on memharbor.memory_relationships (target_memory_id);
create index memory_relationships_type on memharbor.memory_relationships (relationship_type);
create index memory_relationships_user_id on memharbor.memory_relationships (user_id);
comment on table memharbor.memory_relationships is
  'Edges of the memory graph; both ends belong to the user of the edge.';
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  '0003_graph', 'tables', 'versioned', 'up',
  '3797149940d131d868b30a2fa29ccd41e19ebf663ffd74ccde8d7f3d0b46fb98', 0
);
commit;
\endif

-- versioned/0004_categories.up.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> '19de586066fd699a5dbbdfbde51a09c3f9dc50eb4f5c674125c4c8d107a71209'
    from memharbor.schema_migrations where name = '0004_categories' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
set local role "memharbor_owner";
-- component: tables
-- purpose: categories that all users share, and which memory is in which
-- variables: none
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
create table memharbor.categories (
  id uuid not null default gen_random_uuid(),
  name text not null,
  description text,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  constraint categories_pkey primary key (id),
  constraint categories_name_key unique (name)
);
comment on table memharbor.categories is 'Shared by all users; applications read them, the service role keeps them.';

create table memharbor.memory_categories (
  memory_id uuid not null,
  category_id uuid not null,
  user_id text,
  constraint memory_categories_pkey primary key (memory_id, category_id),
  constraint memory_categories_memory_fkey foreign key (memory_id)
    references memharbor.memories (id) on delete cascade,
  constraint memory_categories_category_fkey foreign key (category_id)
    references memharbor.categories (id) on delete cascade,
  constraint memory_categories_user_id_check check (user_id <> '')
);
create index memory_categories_category on memharbor.memory_categories (category_id);
create index memory_categories_user_id on memharbor.memory_categories (user_id);
comment on table memharbor.memory_categories is 'Which memory is in which category; user_id is the memory''s, for its policy.';
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  '0004_categories', 'tables', 'versioned', 'up',
  '19de586066fd699a5dbbdfbde51a09c3f9dc50eb4f5c674125c4c8d107a71209', 0
);
commit;
\endif

-- versioned/0005_operations.up.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> 'dfde9b087555ccec02da4f64bb3e6674598ae40f778906023cc4d708da610014'
    from memharbor.schema_migrations where name = '0005_operations' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
set local role "memharbor_owner";
-- component: tables
-- purpose: configuration, organizations, and the ledgers of erasure and data migration
-- variables: none
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
create table memharbor.configs (
  id uuid not null default gen_random_uuid(),
  key text not null,
  value jsonb not null,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  constraint configs_pkey primary key (id),
  constraint configs_key_key unique (key)
);
comment on table memharbor.configs is 'Configuration of the application that changes without a restart; for the service role only.';

create table memharbor.org_members (
  org_id text not null,
  user_id text not null,
  role text not null default 'member',
  created_at timestamptz not null default now(),
  constraint org_members_pkey primary key (org_id, user_id),
  constraint org_members_role_check check (role in ('member', 'admin')),
  constraint org_members_ids_check check (org_id <> '' and user_id <> '')
);
create index org_members_user_id on memharbor.org_members (user_id);
comment on table memharbor.org_members is 'Who is in which organization; users see their own memberships.';

create table memharbor.erase_ledger (
  id uuid not null default gen_random_uuid(),
  -- Only a digest: the record of an erasure must not keep who was erased.
  user_id_sha256 text not null,
  memory_count bigint,
  reason text,
  requested_by text not null default session_user,
  requested_at timestamptz not null default now(),
  erased_at timestamptz,
  constraint erase_ledger_pkey primary key (id),
  constraint erase_ledger_user_id_sha256_check check (user_id_sha256 ~ '^[0-9a-f]{64}$')
);
create index erase_ledger_user_id_sha256 on memharbor.erase_ledger (user_id_sha256);
comment on table memharbor.erase_ledger is 'Users whose memories were erased; replayed before a restored database opens.';

create table memharbor.migration_ledger (
  run_id uuid not null,
  step text not null,
  source text not null,
  state text not null default 'pending',
  position text,
  row_count bigint not null default 0,
  detail jsonb not null default '{}',
  started_at timestamptz,
  finished_at timestamptz,
  constraint migration_ledger_pkey primary key (run_id, step),
  constraint migration_ledger_state_check check (state in ('pending', 'running', 'done', 'failed'))
);
comment on table memharbor.migration_ledger is 'Steps of data migrations into this database, and where each one stands.';
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  '0005_operations', 'tables', 'versioned', 'up',
  'dfde9b087555ccec02da4f64bb3e6674598ae40f778906023cc4d708da610014', 0
);
commit;
\endif

-- repeatable/40_functions.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> '8928d7ba6f912449888e019e2cdafa6207c4c6f3fa6d60a51c61424bacf4773f'
    from memharbor.schema_migrations where name = 'functions' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
set local role "memharbor_owner";
-- component: tables
-- purpose: who is asking, the two ways a memory is written, the audit trail and the graph's walk
-- variables: include_graph, include_history
-- runs as: owner
-- safe to repeat: replaces each function
-- A plain STABLE function without SET is inlined: the planner then sees the user and knows how many rows they have.
create or replace function memharbor.current_user_id() returns text
language sql stable parallel safe
as $function$
  select coalesce(
    nullif(current_setting('app.user_id', true), ''),
    nullif(nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub', '')
  )
$function$;
comment on function memharbor.current_user_id() is
  'The user for whom the transaction acts: app.user_id, else the subject of PostgREST''s JWT claims; null, which matches nothing, where nobody said.';

create or replace function memharbor.sync_memory() returns trigger
language plpgsql
set search_path = ''
-- Timestamps without an offset mean UTC, and those in the payload are written in it, whoever writes.
set timezone = 'UTC'
as $function$
declare
  reserved constant text[] :=
    '{data,hash,user_id,agent_id,run_id,created_at,updated_at,text_lemmatized}';
  p jsonb := new.payload;
begin
  if tg_op = 'UPDATE' and new.id <> old.id then
    raise exception 'the id of a memory cannot be changed' using errcode = 'integrity_constraint_violation';
  end if;
  if p is not null and (tg_op = 'INSERT' or p is distinct from old.payload) then
    -- A null text makes Mem0's get_all fail for the whole user.
    if p -> 'data' = 'null' then
      p := p - 'data';
      new.payload := p;
    end if;
    new.memory := p ->> 'data';
    new.hash := coalesce(p ->> 'hash', md5(new.memory));
    new.user_id := p ->> 'user_id';
    new.agent_id := p ->> 'agent_id';
    new.run_id := p ->> 'run_id';
    -- Mem0 lets a caller write anything into created_at.
    new.created_at := case
      when pg_input_is_valid(p ->> 'created_at', 'timestamptz') then (p ->> 'created_at')::timestamptz
      else coalesce(new.created_at, now())
    end;
    new.updated_at := case
      when pg_input_is_valid(p ->> 'updated_at', 'timestamptz') then (p ->> 'updated_at')::timestamptz
      when tg_op = 'INSERT' then coalesce(new.updated_at, now())
      else now()
    end;
    new.metadata := p - reserved;
    new.categories := null;
    if jsonb_typeof(p -> 'categories') = 'array'
      and not jsonb_path_exists(p -> 'categories', 'strict $[*] ? (@.type() != "string")')
    then
      new.categories := array(select jsonb_array_elements_text(p -> 'categories'));
      new.metadata := new.metadata - 'categories';
    end if;
  elsif tg_op = 'INSERT' or (
      new.memory, new.hash, new.user_id, new.agent_id, new.run_id,
      new.metadata, new.categories, new.created_at, new.updated_at
    ) is distinct from (
      old.memory, old.hash, old.user_id, old.agent_id, old.run_id,
      old.metadata, old.categories, old.created_at, old.updated_at
    )
  then
    new.created_at := coalesce(new.created_at, now());
    if new.updated_at is null or (tg_op = 'UPDATE' and new.updated_at = old.updated_at) then
      new.updated_at := now();
    end if;
    if tg_op = 'INSERT' or (new.memory, new.hash) is distinct from (old.memory, old.hash) then
      new.hash := md5(new.memory);
    end if;
    new.metadata := coalesce(new.metadata, '{}') - reserved;
    if new.categories is not null then
      new.metadata := new.metadata - 'categories';
    end if;
    new.payload := new.metadata || jsonb_strip_nulls(jsonb_build_object(
      'data', new.memory,
      'text_lemmatized', case
        when tg_op = 'UPDATE' and new.memory = old.memory then old.payload ->> 'text_lemmatized'
        else lower(new.memory)
      end,
      'hash', new.hash,
      'user_id', new.user_id,
      'agent_id', new.agent_id,
      'run_id', new.run_id,
      'created_at', case
        when tg_op = 'UPDATE' and new.created_at = old.created_at then old.payload ->> 'created_at'
        else to_jsonb(new.created_at) #>> '{}'
      end,
      'updated_at', new.updated_at,
      'categories', new.categories
    ));
  end if;
  new.archived_at := case new.state
    when 'archived' then coalesce(new.archived_at, now())
    when 'deleted' then new.archived_at
  end;
  new.deleted_at := case new.state when 'deleted' then coalesce(new.deleted_at, now()) end;
  return new;
end
$function$;
comment on function memharbor.sync_memory() is
  'Derives the canonical columns from a payload that is written, else the payload from the canonical columns.';

-- Security definer: who writes a memory cannot write the audit trail.
create or replace function memharbor.record_history() returns trigger
language plpgsql security definer
set search_path = ''
as $function$
begin
  if tg_op = 'INSERT' then
    insert into memharbor.memory_history (memory_id, user_id, operation, actor)
    select id, user_id, 'create', session_user from new_rows;
  elsif tg_op = 'DELETE' then
    insert into memharbor.memory_history (memory_id, user_id, operation, old_value, old_state, actor)
    select id, user_id, 'delete', payload, state, session_user from old_rows;
  else
    insert into memharbor.memory_history (memory_id, user_id, operation, old_value, old_state, actor)
    select o.id, o.user_id, 'update', o.payload, o.state, session_user
    from old_rows o
    join new_rows n using (id)
    where o.payload is distinct from n.payload or o.state is distinct from n.state;
  end if;
  return null;
end
$function$;
comment on function memharbor.record_history() is
  'Writes one row of memory_history per memory that a statement created, changed or deleted.';

create or replace function memharbor.related_memories(memory_id uuid, hops integer default 2)
returns table (id uuid, distance integer, relationship_type text, strength numeric, via uuid)
language sql stable parallel safe
set search_path = ''
as $function$
  with edges as not materialized (
    select source_memory_id as near_id, target_memory_id as far_id, relationship_type, strength
    from memharbor.memory_relationships
    union all
    select target_memory_id, source_memory_id, relationship_type, strength
    from memharbor.memory_relationships
  ),
  first_hop as (
    select far_id as id, 1 as distance, relationship_type, strength, near_id as via
    from edges
    where near_id = memory_id and hops >= 1
  ),
  reached as (
    select * from first_hop
    union all
    select e.far_id, 2, e.relationship_type, f.strength * e.strength, e.near_id
    from first_hop f
    join edges e on e.near_id = f.id
    where hops >= 2
  )
  select distinct on (m.id) m.id, r.distance, r.relationship_type, r.strength, r.via
  from reached r
  join memharbor.memories m on m.id = r.id
  where m.id <> memory_id and m.state = 'active'
  order by m.id, r.distance, r.strength desc, r.relationship_type
$function$;
comment on function memharbor.related_memories(uuid, integer) is
  'The active memories one or two relationships away, either direction; strength is the product along the way.';
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  'functions', 'tables', 'repeatable', 'up',
  '8928d7ba6f912449888e019e2cdafa6207c4c6f3fa6d60a51c61424bacf4773f', 0
);
commit;
\endif

-- repeatable/45_fingerprints.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> 'f052c6eb990c3007e73479245bf8288dc168f1c1e491a5a7b44324d26eabc834'
    from memharbor.schema_migrations where name = 'fingerprints' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
set local role "memharbor_owner";
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
      || coalesce("public".halfvec_send(embedding), '')
    )
    from memharbor.memories
    union all
    select 'entities', payload ->> 'user_id', sha256(
      convert_to(row(id, payload)::text, 'UTF8')
      || coalesce("public".halfvec_send(vector), '')
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
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  'fingerprints', 'tables', 'repeatable', 'up',
  'f052c6eb990c3007e73479245bf8288dc168f1c1e491a5a7b44324d26eabc834', 0
);
commit;
\endif

-- repeatable/50_triggers.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> '20d784c60baaaba1997ac4e02082d5eb3a03f84d68303d3a3fb35bf557d287a2'
    from memharbor.schema_migrations where name = 'triggers' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
set local role "memharbor_owner";
-- component: tables
-- purpose: the triggers on memories, and defaults that know who is asking
-- variables: include_graph, include_history
-- runs as: owner
-- safe to repeat: replaces each trigger and default
-- An update of the embedding alone does not run it.
create or replace trigger sync
  before insert or update of
    id, payload, memory, hash, user_id, agent_id, run_id, metadata, categories, created_at, updated_at, state
  on memharbor.memories for each row execute function memharbor.sync_memory();
-- Per statement with transition tables: 4 microseconds a row, where a trigger per row costs 150.
create or replace trigger history_insert after insert on memharbor.memories
  referencing new table as new_rows for each statement execute function memharbor.record_history();
create or replace trigger history_update after update on memharbor.memories
  referencing old table as old_rows new table as new_rows for each statement execute function memharbor.record_history();
create or replace trigger history_delete after delete on memharbor.memories
  referencing old table as old_rows for each statement execute function memharbor.record_history();
alter table memharbor.memory_relationships alter user_id set default memharbor.current_user_id();
alter table memharbor.memory_categories alter user_id set default memharbor.current_user_id();
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  'triggers', 'tables', 'repeatable', 'up',
  '20d784c60baaaba1997ac4e02082d5eb3a03f84d68303d3a3fb35bf557d287a2', 0
);
commit;
\endif

-- repeatable/60_views.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> '9d4bd04fce8447bb1b172f1921d499483c067b8b2b9294ec2b76c13dba60f6ea'
    from memharbor.schema_migrations where name = 'views' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
set local role "memharbor_owner";
-- component: tables
-- purpose: the contract: what Mem0, applications and older programs see in schema public
-- variables: include_graph, include_history
-- runs as: owner
-- safe to repeat: replaces each view; privileges on it stay
create or replace view public.memories with (security_invoker = true) as
select
  id, user_id, agent_id, run_id, org_id, memory, hash, metadata, categories, embedding, state, expires_at,
  created_at, updated_at, archived_at, deleted_at, embedding as vector, payload
from memharbor.memories;
comment on view public.memories is
  'Every memory, for canonical SQL and for Mem0 with collection_name=memories. Mem0''s search fails on a row without an embedding: where rows are loaded before they are embedded, let Mem0 use collection mem0.';

create or replace view public.mem0 with (security_invoker = true) as
select id, embedding as vector, payload
from memharbor.memories
where state = 'active' and embedding is not null and (expires_at is null or expires_at > now());
comment on view public.mem0 is
  'Mem0''s default collection: active memories that have an embedding and whose expires_at has not passed. Mem0''s own expiration_date stays in the payload and is Mem0''s to judge (show_expired).';

create or replace view public.mem0_entities with (security_invoker = true) as
select id, vector, payload from memharbor.entities;
comment on view public.mem0_entities is 'The entity store of Mem0''s collection mem0.';

create or replace view public.memories_entities with (security_invoker = true) as
select id, vector, payload from memharbor.entities;
comment on view public.memories_entities is 'The entity store of Mem0''s collection memories.';

create or replace view memharbor.memory_stats with (security_invoker = true) as
select user_id, count(*) as memory_count, min(created_at) as first_memory_at, max(created_at) as last_memory_at
from memharbor.memories
where user_id is not null
group by user_id;
comment on view memharbor.memory_stats is
  'Memories per user, counted when asked: a counter that writers keep would make them wait for each other.';

create or replace view public.memory_relationships with (security_invoker = true) as
select id, source_memory_id, target_memory_id, relationship_type, strength, metadata, user_id, created_at
from memharbor.memory_relationships;
comment on view public.memory_relationships is 'The memory graph.';

create or replace view public.memory_history with (security_invoker = true) as
select
  h.id, h.memory_id, h.operation, h.old_value,
  case
    when h.operation <> 'delete' then
      coalesce(lead(h.old_value) over (partition by h.memory_id order by h.id), m.payload)
  end as new_value,
  h.user_id, h.changed_at as "timestamp", h.actor
from memharbor.memory_history h
left join memharbor.memories m on m.id = h.memory_id;
comment on view public.memory_history is
  'The audit trail with both images; the new one is the next one''s old one, or the memory as it is.';

-- ChatSG's three tables, for programs that read them: same names, same columns.
create or replace view public.mem0_history with (security_invoker = true) as
select
  id, memory_id, user_id,
  case operation when 'create' then 'created' when 'update' then 'updated' else 'deleted' end as action,
  old_value ->> 'data' as previous_content,
  new_value ->> 'data' as new_content,
  coalesce(new_value, old_value) - '{data,hash,user_id,agent_id,run_id,created_at,updated_at,text_lemmatized}'::text[]
    as metadata,
  "timestamp" as created_at
from public.memory_history;
comment on view public.mem0_history is 'The audit trail as ChatSG''s table mem0_history has it.';

create or replace view public.mem0_memories with (security_invoker = true) as
select id, user_id, run_id as session_id, memory, embedding, metadata, created_at, updated_at
from memharbor.memories
where state = 'active' and (expires_at is null or expires_at > now());
comment on view public.mem0_memories is 'Active memories as ChatSG''s table mem0_memories has them; its session is Mem0''s run.';

create or replace view public.mem0_metadata with (security_invoker = true) as
select
  hashtextextended(user_id, 0) as id, 'chatsg_memories'::text as collection_name, user_id,
  memory_count as total_memories, last_memory_at, '{}'::jsonb as metadata,
  first_memory_at as created_at, last_memory_at as updated_at
from memharbor.memory_stats;
comment on view public.mem0_metadata is 'Memories per user as ChatSG''s table mem0_metadata has them.';
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  'views', 'tables', 'repeatable', 'up',
  '9d4bd04fce8447bb1b172f1921d499483c067b8b2b9294ec2b76c13dba60f6ea', 0
);
commit;
\endif

-- versioned/0006_search_indexes.up.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> '1335a2fce1816840198e397171fe880b5b42923666489d36eb49981b513ceb9d'
    from memharbor.schema_migrations where name = '0006_search_indexes' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
set role "memharbor_owner";
-- component: indexes
-- purpose: what every search of a user starts from, and keyword search
-- variables: none
-- runs as: owner
-- safe to repeat: builds only what is missing; an invalid index of an interrupted build is dropped before
-- transaction: no
-- Mem0's own expression: its filter, the policy and the condition of a user's own vector index are one and the same.
create index concurrently if not exists memories_payload_user_id on memharbor.memories ((payload ->> 'user_id'));
alter index memharbor.memories_payload_user_id alter column 1 set statistics 1000;
-- Listings of a user in order, and counts per user without reading the rows.
create index concurrently if not exists memories_user_id_created_at on memharbor.memories (user_id, created_at desc);
-- Mem0's keyword search, verbatim.
create index concurrently if not exists memories_text_lemmatized on memharbor.memories
  using gin (to_tsvector('simple', payload ->> 'text_lemmatized'));
create index concurrently if not exists entities_payload_user_id on memharbor.entities ((payload ->> 'user_id'));
create index concurrently if not exists entities_text_lemmatized on memharbor.entities
  using gin (to_tsvector('simple', payload ->> 'text_lemmatized'));
begin;
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  '0006_search_indexes', 'indexes', 'versioned', 'up',
  '1335a2fce1816840198e397171fe880b5b42923666489d36eb49981b513ceb9d', 0
);
commit;
reset role;
\endif

-- repeatable/70_search_settings.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> 'c495a1db0f20adb119e0ef3baf8a02b6a4264d57415411843d7f22f69ddf9d40'
    from memharbor.schema_migrations where name = 'search_settings' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
-- component: indexes
-- purpose: how far a vector search looks, on the roles, because Mem0 never says it
-- variables: hnsw_ef_search, vector_schema
-- runs as: administrator
-- safe to repeat: sets each setting to one value
-- pgvector must be loaded: before that, only a superuser may set what begins with hnsw.
select '[1]'::"public".vector;
alter role memharbor_app set hnsw.ef_search = 100;
-- Where a filter removes candidates, look on until there are enough, in exact order.
alter role memharbor_app set hnsw.iterative_scan = 'strict_order';
alter role memharbor_service set hnsw.ef_search = 100;
-- Where a filter removes candidates, look on until there are enough, in exact order.
alter role memharbor_service set hnsw.iterative_scan = 'strict_order';
alter role memharbor_readonly set hnsw.ef_search = 100;
-- Where a filter removes candidates, look on until there are enough, in exact order.
alter role memharbor_readonly set hnsw.iterative_scan = 'strict_order';
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  'search_settings', 'indexes', 'repeatable', 'up',
  'c495a1db0f20adb119e0ef3baf8a02b6a4264d57415411843d7f22f69ddf9d40', 0
);
commit;
\endif

-- repeatable/80_policies.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> '70bc64d40fef777a8fa2f92c67feaaa7b79b9e28d4fe8bdff3cfa56cec7966c9'
    from memharbor.schema_migrations where name = 'policies' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
set local role "memharbor_owner";
-- component: policies
-- purpose: row level security: who sees and writes which rows
-- variables: include_graph, include_history
-- runs as: owner
-- safe to repeat: drops every policy of the schema and creates these, in one transaction
alter table memharbor.memories enable row level security, force row level security;
alter table memharbor.entities enable row level security, force row level security;
alter table memharbor.categories enable row level security, force row level security;
alter table memharbor.memory_categories enable row level security, force row level security;
alter table memharbor.configs enable row level security, force row level security;
alter table memharbor.org_members enable row level security, force row level security;
alter table memharbor.erase_ledger enable row level security, force row level security;
alter table memharbor.migration_ledger enable row level security, force row level security;
alter table memharbor.schema_migrations enable row level security, force row level security;
alter table memharbor.schema_state enable row level security, force row level security;
alter table memharbor.memory_history enable row level security, force row level security;
alter table memharbor.memory_relationships enable row level security, force row level security;
-- A policy that nobody declares here is one that nobody reviewed.
do $undeclared$
declare
  found_policy record;
begin
  for found_policy in
    select p.tablename, p.policyname from pg_catalog.pg_policies p
    join pg_catalog.pg_tables t using (schemaname, tablename)
    where p.schemaname = 'memharbor' and t.tableowner = current_user
  loop
    execute format('drop policy %I on memharbor.%I', found_policy.policyname, found_policy.tablename);
  end loop;
end
$undeclared$;

-- User isolation. The condition is Mem0's own expression, so that it, Mem0's filter and the condition of a user's own
-- index are one and the same to the planner. '' is nobody: current_user_id() is null then.
create policy isolate on memharbor.memories to memharbor_app
  using ((payload ->> 'user_id') = memharbor.current_user_id())
  with check ((payload ->> 'user_id') = memharbor.current_user_id());
create policy isolate on memharbor.entities to memharbor_app
  using ((payload ->> 'user_id') = memharbor.current_user_id())
  with check ((payload ->> 'user_id') = memharbor.current_user_id());
-- Both ends must be the user's own: a foreign key alone would tell which ids exist.
create policy isolate on memharbor.memory_relationships to memharbor_app
  using (user_id = memharbor.current_user_id())
  with check (
    user_id = memharbor.current_user_id()
    and exists (select from memharbor.memories m where m.id = source_memory_id)
    and exists (select from memharbor.memories m where m.id = target_memory_id)
  );
create policy isolate on memharbor.memory_categories to memharbor_app
  using (user_id = memharbor.current_user_id())
  with check (
    user_id = memharbor.current_user_id() and exists (select from memharbor.memories m where m.id = memory_id)
  );
create policy isolate on memharbor.memory_history for select to memharbor_app
  using (user_id = memharbor.current_user_id());
create policy record on memharbor.memory_history for insert to memharbor_owner with check (true);
create policy isolate on memharbor.org_members for select to memharbor_app
  using (user_id = memharbor.current_user_id());
create policy shared on memharbor.categories for select to memharbor_app using (true);

-- The service role, by policy and not by BYPASSRLS, which only a superuser could give.
create policy service on memharbor.memories to memharbor_service using (true) with check (true);
create policy service on memharbor.entities to memharbor_service using (true) with check (true);
create policy service on memharbor.categories to memharbor_service using (true) with check (true);
create policy service on memharbor.memory_categories to memharbor_service using (true) with check (true);
create policy service on memharbor.configs to memharbor_service using (true) with check (true);
create policy service on memharbor.org_members to memharbor_service using (true) with check (true);
create policy service on memharbor.erase_ledger to memharbor_service using (true) with check (true);
create policy service on memharbor.migration_ledger to memharbor_service using (true) with check (true);
create policy service on memharbor.memory_relationships to memharbor_service using (true) with check (true);
create policy service on memharbor.schema_migrations for select to memharbor_service using (true);
create policy service on memharbor.schema_state for select to memharbor_service using (true);
create policy service on memharbor.memory_history for select to memharbor_service using (true);
create policy report on memharbor.memories for select to memharbor_readonly using (true);
create policy report on memharbor.entities for select to memharbor_readonly using (true);
create policy report on memharbor.categories for select to memharbor_readonly using (true);
create policy report on memharbor.memory_categories for select to memharbor_readonly using (true);
create policy report on memharbor.org_members for select to memharbor_readonly using (true);
create policy report on memharbor.migration_ledger for select to memharbor_readonly using (true);
create policy report on memharbor.schema_migrations for select to memharbor_readonly using (true);
create policy report on memharbor.memory_history for select to memharbor_readonly using (true);
create policy report on memharbor.memory_relationships for select to memharbor_readonly using (true);
-- For a server whose administrator cannot give BYPASSRLS: pg_dump --enable-row-security then dumps all rows.
create policy dump on memharbor.memories for select to memharbor_backup using (true);
create policy dump on memharbor.entities for select to memharbor_backup using (true);
create policy dump on memharbor.categories for select to memharbor_backup using (true);
create policy dump on memharbor.memory_categories for select to memharbor_backup using (true);
create policy dump on memharbor.configs for select to memharbor_backup using (true);
create policy dump on memharbor.org_members for select to memharbor_backup using (true);
create policy dump on memharbor.erase_ledger for select to memharbor_backup using (true);
create policy dump on memharbor.migration_ledger for select to memharbor_backup using (true);
create policy dump on memharbor.schema_migrations for select to memharbor_backup using (true);
create policy dump on memharbor.schema_state for select to memharbor_backup using (true);
create policy dump on memharbor.memory_history for select to memharbor_backup using (true);
create policy dump on memharbor.memory_relationships for select to memharbor_backup using (true);
create policy ledger on memharbor.schema_migrations to memharbor_owner using (true) with check (true);
create policy ledger on memharbor.schema_state to memharbor_owner using (true) with check (true);
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  'policies', 'policies', 'repeatable', 'up',
  '70bc64d40fef777a8fa2f92c67feaaa7b79b9e28d4fe8bdff3cfa56cec7966c9', 0
);
commit;
\endif

-- repeatable/90_grants.sql
select coalesce(
  (
    select direction <> 'up' or checksum <> '1640e5650a3be9750923cfc07ade21cbb44b1188e8d9b3c1b928b00e049bd40c'
    from memharbor.schema_migrations where name = 'grants' order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
begin;
set local role "memharbor_owner";
-- component: policies
-- purpose: which role may run which statement on which object
-- variables: include_graph, include_history
-- runs as: owner
-- safe to repeat: takes everything back and grants these, in one transaction
do $undeclared$
declare
  found_object record;
begin
  for found_object in
    select 'table' as kind, c.oid::regclass::text as name from pg_catalog.pg_class c
    where c.relnamespace = to_regnamespace('memharbor') and c.relkind in ('r', 'p', 'v', 'm', 'S')
      and pg_get_userbyid(c.relowner) = current_user
    union all
    select 'function', p.oid::regprocedure::text from pg_catalog.pg_proc p
    where p.pronamespace = to_regnamespace('memharbor') and pg_get_userbyid(p.proowner) = current_user
  loop
    execute format('revoke all on %s %s from public, memharbor_app, memharbor_service, memharbor_readonly, memharbor_backup, memharbor_pooler', found_object.kind, found_object.name);
  end loop;
end
$undeclared$;
revoke all on schema memharbor from public, memharbor_app, memharbor_service, memharbor_readonly, memharbor_backup, memharbor_pooler;
revoke all on public.memories, public.mem0, public.mem0_entities, public.memories_entities, public.mem0_memories, public.memory_relationships, public.mem0_metadata, public.memory_history, public.mem0_history from public, memharbor_app, memharbor_service, memharbor_readonly, memharbor_backup, memharbor_pooler;

grant usage on schema memharbor to memharbor_app, memharbor_service, memharbor_readonly, memharbor_backup;

-- Applications: rows under row level security, never TRUNCATE, which row level security does not see.
grant select, insert, update, delete on
  memharbor.memories, memharbor.entities, memharbor.memory_categories, memharbor.memory_relationships
to memharbor_app, memharbor_service;
grant select, insert, update, delete on public.memories, public.mem0, public.mem0_entities, public.memories_entities, public.mem0_memories, public.memory_relationships to memharbor_app, memharbor_service;
grant select on memharbor.categories, memharbor.org_members, memharbor.memory_stats, memharbor.memory_history to memharbor_app;
grant select on public.mem0_metadata, public.memory_history, public.mem0_history to memharbor_app, memharbor_service;

grant select, insert, update, delete on
  memharbor.categories, memharbor.configs, memharbor.org_members, memharbor.migration_ledger
to memharbor_service;
-- What was erased stays on record.
grant select, insert, update on memharbor.erase_ledger to memharbor_service;
grant select on
  memharbor.memory_stats, memharbor.schema_migrations, memharbor.schema_state, memharbor.memory_history
to memharbor_service;

grant select on
  memharbor.memories, memharbor.entities, memharbor.categories, memharbor.memory_categories, memharbor.org_members, memharbor.memory_stats, memharbor.migration_ledger, memharbor.schema_migrations, memharbor.memory_history, memharbor.memory_relationships
to memharbor_readonly;
grant select on public.memories, public.mem0, public.mem0_entities, public.memories_entities, public.mem0_memories, public.memory_relationships, public.mem0_metadata, public.memory_history, public.mem0_history to memharbor_readonly;

grant select on
  memharbor.memories, memharbor.entities, memharbor.categories, memharbor.memory_categories, memharbor.configs, memharbor.org_members, memharbor.erase_ledger, memharbor.migration_ledger, memharbor.schema_migrations, memharbor.schema_state, memharbor.memory_stats, memharbor.memory_history, memharbor.memory_relationships
to memharbor_backup;
grant select on sequence memharbor.schema_migrations_id_seq, memharbor.memory_history_id_seq to memharbor_backup;
grant select on public.memories, public.mem0, public.mem0_entities, public.memories_entities, public.mem0_memories, public.memory_relationships, public.mem0_metadata, public.memory_history, public.mem0_history to memharbor_backup;

grant execute on function memharbor.current_user_id() to memharbor_app, memharbor_service, memharbor_readonly;
grant execute on function memharbor.fingerprint_users() to memharbor_service, memharbor_backup;
grant execute on function memharbor.related_memories(uuid, integer)
to memharbor_app, memharbor_service, memharbor_readonly;
-- What the owner makes later belongs to nobody else until a grant says so.
alter default privileges for role memharbor_owner revoke execute on functions from public;
set local role "memharbor_owner";
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  'grants', 'policies', 'repeatable', 'up',
  '1640e5650a3be9750923cfc07ade21cbb44b1188e8d9b3c1b928b00e049bd40c', 0
);
commit;
\endif
