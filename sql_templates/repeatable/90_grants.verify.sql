-- component: policies
-- purpose: raise when an application cannot work, owns something or may TRUNCATE
-- variables: none
-- runs as: owner
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{% for role in ['memharbor_app', 'memharbor_service'] %}
{{ require(
  "has_schema_privilege('" ~ role ~ "', 'memharbor', 'usage') and has_table_privilege('" ~ role ~ "', 'public.mem0', 'insert') and has_table_privilege('" ~ role ~ "', 'memharbor.memories', 'insert')",
  role ~ " may not write memories"
) }}
{% endfor %}
{{ require(
  "select not bool_or(has_table_privilege(r.rolname, c.oid, 'truncate') or c.relowner = r.oid) from pg_catalog.pg_class c, pg_catalog.pg_roles r where c.relnamespace = to_regnamespace('memharbor') and c.relkind in ('r', 'v') and r.rolname in ('memharbor_app', 'memharbor_service', 'memharbor_readonly', 'memharbor_backup', 'memharbor_pooler')",
  "a role of an application owns a table or may TRUNCATE one"
) }}
{{ require(
  "not has_table_privilege('memharbor_app', 'memharbor.memory_history', 'insert') and not has_table_privilege('memharbor_app', 'memharbor.configs', 'select')",
  "memharbor_app may write the audit trail or read configs"
) }}
