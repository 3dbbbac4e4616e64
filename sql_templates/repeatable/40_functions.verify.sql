-- component: tables
-- purpose: raise when a function is missing, or current_user_id cannot be inlined any more
-- variables: none
-- runs as: owner
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{% for function in ['current_user_id()', 'sync_memory()', 'record_history()', 'related_memories(uuid, integer)'] %}
{{ require("to_regprocedure('memharbor." ~ function ~ "') is not null", "function memharbor." ~ function ~ " is missing") }}
{% endfor %}
{{ require(
  "select l.lanname = 'sql' and p.provolatile = 's' and not p.prosecdef and p.proconfig is null from pg_catalog.pg_proc p join pg_catalog.pg_language l on l.oid = p.prolang where p.oid = to_regprocedure('memharbor.current_user_id()')",
  "memharbor.current_user_id() cannot be inlined: the planner does not know the user"
) }}
{{ require(
  "select prosecdef and proconfig = array['search_path=\"\"'] from pg_catalog.pg_proc where oid = to_regprocedure('memharbor.record_history()')",
  "memharbor.record_history() is not security definer with an empty search path"
) }}
