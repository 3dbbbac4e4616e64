-- component: settings
-- purpose: raise when an application cannot connect, or anybody may create in schema public of our own database
-- variables: database
-- runs as: administrator
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{% for role in ['app', 'service', 'readonly', 'backup', 'pooler'] %}
{{ require(
  "has_database_privilege('memharbor_" ~ role ~ "', " ~ (database | literal) ~ ", 'connect')",
  "memharbor_" ~ role ~ " may not connect to the database"
) }}
{% endfor %}
{{ require(
  "select pg_get_userbyid(datdba) <> 'memharbor_owner' or not (has_schema_privilege('memharbor_app', 'public', 'create') or has_database_privilege('memharbor_app', datname, 'temporary')) from pg_catalog.pg_database where datname = current_database()",
  "memharbor_app may create in schema public or make temporary tables"
) }}
