-- component: tables
-- purpose: raise when the graph is missing
-- variables: none
-- runs as: owner
-- safe to repeat: reads only
{% from "macros.sql" import require_table %}
{{ require_table("memory_relationships") }}
