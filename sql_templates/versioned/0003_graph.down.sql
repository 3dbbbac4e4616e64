-- component: tables
-- purpose: take back: typed, weighted relationships between memories
-- variables: none
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
drop table memharbor.memory_relationships;
