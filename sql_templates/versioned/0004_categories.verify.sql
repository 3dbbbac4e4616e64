-- component: tables
-- purpose: raise when the categories are missing
-- variables: none
-- runs as: owner
-- safe to repeat: reads only
{% from "macros.sql" import require_table %}
{{ require_table("categories") }}
{{ require_table("memory_categories") }}
