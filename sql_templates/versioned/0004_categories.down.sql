-- component: tables
-- purpose: take back: categories that all users share, and which memory is in which
-- variables: none
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
drop table memharbor.memory_categories;
drop table memharbor.categories;
