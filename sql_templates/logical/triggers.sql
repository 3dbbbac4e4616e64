-- component: tables
-- purpose: let rows be put back bit for bit where the triggers on memories cannot be left out for one session
-- variables: enabled
-- runs as: owner
-- safe to repeat: states a condition; other writers wait from the first one to the end of the transaction
alter table memharbor.memories {{ "enable" if enabled else "disable" }} trigger user;
