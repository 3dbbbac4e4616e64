-- component: policies
-- purpose: take back: which role may run which statement on which object
-- variables: none
-- runs as: owner
-- safe to repeat: takes back only what is there
revoke all on schema memharbor from memharbor_app, memharbor_service, memharbor_readonly, memharbor_backup;
alter default privileges for role memharbor_owner grant execute on functions to public;
