-- component: tables
-- purpose: raise when a table of configuration, organizations or ledgers is missing
-- variables: none
-- runs as: owner
-- safe to repeat: reads only
{% from "macros.sql" import require_table %}
{% for table in ['configs', 'org_members', 'erase_ledger', 'migration_ledger'] %}
{{ require_table(table) }}
{% endfor %}
