-- component: tables
-- purpose: raise when the fingerprints are missing or cannot be taken
-- variables: none
-- runs as: owner
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{{ require("to_regprocedure('memharbor.fingerprint_users()') is not null", "function memharbor.fingerprint_users() is missing") }}
