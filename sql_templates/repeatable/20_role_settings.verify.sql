-- component: settings
-- purpose: raise when a role lacks a setting without which it gets wrong or slow answers
-- variables: none
-- runs as: administrator
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{% for role in ['memharbor_app', 'memharbor_service', 'memharbor_readonly'] %}
{{ require(
  "select 'plan_cache_mode=force_custom_plan' = any (setconfig) and setconfig::text like '%search_path=%' and setconfig::text like '%lock_timeout=%' and setconfig::text like '%statement_timeout=%' from pg_catalog.pg_db_role_setting where setrole = to_regrole('" ~ role ~ "') and setdatabase = 0",
  role ~ " lacks plan_cache_mode, search_path, lock_timeout or statement_timeout"
) }}
{% endfor %}
