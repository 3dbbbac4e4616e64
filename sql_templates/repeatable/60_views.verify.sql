-- component: tables
-- purpose: raise when a contract view is missing, or one would show rows with its owner's rights
-- variables: none
-- runs as: owner
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{% for view in [
  'public.memories', 'public.mem0', 'public.mem0_entities', 'public.memories_entities', 'memharbor.memory_stats',
  'public.memory_relationships', 'public.memory_history', 'public.mem0_history', 'public.mem0_memories',
  'public.mem0_metadata'
] %}
{{ require(
  "select 'security_invoker=true' = any (reloptions) from pg_catalog.pg_class where oid = to_regclass('" ~ view ~ "') and relkind = 'v'",
  "view " ~ view ~ " is missing or not security_invoker"
) }}
{% endfor %}
