-- component: policies
-- purpose: raise when a table has no row level security, its owner is exempt, or a policy is missing
-- variables: none
-- runs as: owner
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{{ require(
  "select bool_and(relrowsecurity and relforcerowsecurity) from pg_catalog.pg_class where relnamespace = to_regnamespace('memharbor') and relkind in ('r', 'p')",
  "a table of schema memharbor has no row level security, or its owner is exempt from it"
) }}
{% for table in ['memories', 'entities', 'memory_relationships', 'memory_categories', 'memory_history', 'org_members'] %}
{{ require(
  "select count(*) = 1 from pg_catalog.pg_policies where schemaname = 'memharbor' and tablename = '" ~ table ~ "' and policyname = 'isolate' and permissive = 'PERMISSIVE' and roles = '{memharbor_app}' and qual like '%memharbor.current_user_id()%'",
  "policy isolate on memharbor." ~ table ~ " is missing or does not ask who is asking"
) }}
{{ require(
  "select count(*) = 1 from pg_catalog.pg_policies where schemaname = 'memharbor' and tablename = '" ~ table ~ "' and roles && '{memharbor_app,public}'",
  "memharbor." ~ table ~ " has a second policy for memharbor_app"
) }}
{% endfor %}
