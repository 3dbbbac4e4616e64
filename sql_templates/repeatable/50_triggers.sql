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
{% if include_history %}
-- Per statement with transition tables: 4 microseconds a row, where a trigger per row costs 150.
create or replace trigger history_insert after insert on memharbor.memories
  referencing new table as new_rows for each statement execute function memharbor.record_history();
create or replace trigger history_update after update on memharbor.memories
  referencing old table as old_rows new table as new_rows for each statement execute function memharbor.record_history();
create or replace trigger history_delete after delete on memharbor.memories
  referencing old table as old_rows for each statement execute function memharbor.record_history();
{% endif %}
{% if include_graph %}
alter table memharbor.memory_relationships alter user_id set default memharbor.current_user_id();
{% endif %}
alter table memharbor.memory_categories alter user_id set default memharbor.current_user_id();
