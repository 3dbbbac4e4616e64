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
