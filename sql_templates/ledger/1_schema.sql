-- component: ledger
-- purpose: the private schema that holds everything of Memharbor's
-- variables: none
-- runs as: administrator
-- safe to repeat: creates the schema only where it is missing
create schema if not exists memharbor authorization memharbor_owner;
grant usage, create on schema public to memharbor_owner;
