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
