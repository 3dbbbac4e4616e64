-- component: tables
-- purpose: raise when the audit trail is missing
-- variables: none
-- runs as: owner
-- safe to repeat: reads only
{% from "macros.sql" import require_table %}
{{ require_table("memory_history") }}
