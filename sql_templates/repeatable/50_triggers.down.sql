-- component: tables
-- purpose: take back: the triggers on memories, and defaults that know who is asking
-- variables: none
-- runs as: owner
-- safe to repeat: takes back only what is there
alter table if exists memharbor.memory_categories alter user_id drop default;
alter table if exists memharbor.memory_relationships alter user_id drop default;
do $triggers$
begin
  if to_regclass('memharbor.memories') is not null then
    drop trigger if exists history_delete on memharbor.memories;
    drop trigger if exists history_update on memharbor.memories;
    drop trigger if exists history_insert on memharbor.memories;
    drop trigger if exists sync on memharbor.memories;
  end if;
end
$triggers$;
