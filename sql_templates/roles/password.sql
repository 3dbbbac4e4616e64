-- component: roles
-- purpose: give one role its password, as a SCRAM verifier that the client computed
-- variables: role, verifier
-- runs as: administrator
-- safe to repeat: run only where the stored verifier does not match the password
alter role {{ role | ident }} password {{ verifier | literal }};
