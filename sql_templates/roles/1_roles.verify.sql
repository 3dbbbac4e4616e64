-- component: roles
-- purpose: raise when a role is missing or has an attribute that it must not have
-- variables: none
-- runs as: administrator
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{% for role in ['owner', 'app', 'service', 'readonly', 'backup', 'pooler', 'replicator', 'rewind'] %}
{{ require("to_regrole('memharbor_" ~ role ~ "') is not null", "role memharbor_" ~ role ~ " is missing") }}
{% endfor %}
{{ require(
  "select not bool_or(rolsuper or rolcreaterole or rolcreatedb) from pg_catalog.pg_roles where rolname like 'memharbor\\_%'",
  "a role of Memharbor is superuser or may create roles or databases"
) }}
{{ require(
  "select not bool_or(rolbypassrls) from pg_catalog.pg_roles where rolname like 'memharbor\\_%' and rolname <> 'memharbor_backup'",
  "a role of Memharbor other than memharbor_backup bypasses row level security"
) }}
