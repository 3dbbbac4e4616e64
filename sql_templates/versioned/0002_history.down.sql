-- component: tables
-- purpose: take back: what was changed about each memory, with the image before the change
-- variables: none
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
drop table memharbor.memory_history;
