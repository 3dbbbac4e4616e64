-- component: tables
-- purpose: take back: configuration, organizations, and the ledgers of erasure and data migration
-- variables: none
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
drop table memharbor.migration_ledger;
drop table memharbor.erase_ledger;
drop table memharbor.org_members;
drop table memharbor.configs;
