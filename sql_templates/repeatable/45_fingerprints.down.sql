-- component: tables
-- purpose: take back: fingerprints of every user's rows
-- variables: none
-- runs as: owner
-- safe to repeat: takes back only what is there
drop function if exists memharbor.fingerprint_users();
