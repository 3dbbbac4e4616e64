-- component: extension
-- purpose: raise when the pooler cannot look up logins, or anybody else can
-- variables: none
-- runs as: administrator
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{{ require(
  "select not r.rolsuper or coalesce(has_function_privilege('memharbor_pooler', to_regprocedure('memharbor_pooler.lookup(text)'), 'execute'), false) from pg_catalog.pg_roles r where r.rolname = current_user",
  "memharbor_pooler.lookup is missing or memharbor_pooler may not call it"
) }}
{{ require(
  "to_regprocedure('memharbor_pooler.lookup(text)') is null or not has_function_privilege('memharbor_app', to_regprocedure('memharbor_pooler.lookup(text)'), 'execute')",
  "memharbor_app may call memharbor_pooler.lookup"
) }}
