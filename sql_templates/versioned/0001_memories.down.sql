-- component: tables
-- purpose: take back: the two tables that Mem0's collections are views of
-- variables: none
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
drop table memharbor.entities;
drop table memharbor.memories;
