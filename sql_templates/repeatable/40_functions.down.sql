-- component: tables
-- purpose: take back: who is asking, the two ways a memory is written, the audit trail and the graph's walk
-- variables: none
-- runs as: owner
-- safe to repeat: takes back only what is there
drop function if exists memharbor.related_memories(uuid, integer);
drop function if exists memharbor.record_history();
drop function if exists memharbor.sync_memory();
drop function if exists memharbor.current_user_id();
