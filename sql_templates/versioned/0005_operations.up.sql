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
