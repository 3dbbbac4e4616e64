-- component: tables
-- purpose: which memory comes in under which new id, where its own is taken
-- variables: none
-- runs as: administrator
-- safe to repeat: temporary, gone at the end of the transaction
create temporary table renumbered (
  old_id uuid primary key,
  new_id uuid not null
) on commit drop;
