-- component: settings
-- purpose: the settings that Mem0 never makes, on the roles, so that they hold through a transaction pooler
-- variables: lock_timeout_ms, statement_timeout_ms, vector_schema
-- runs as: administrator
-- safe to repeat: sets each setting to one value
{% for role in ['memharbor_app', 'memharbor_service', 'memharbor_readonly'] %}
-- A generic plan does not know the user: it never takes a user's own vector index, and stock filters after 40 candidates.
alter role {{ role }} set plan_cache_mode = 'force_custom_plan';
-- pg_temp last: a temporary table of a pooled session cannot stand before a contract view.
alter role {{ role }} set search_path = public{% if vector_schema != 'public' %}, {{ vector_schema | ident }}{% endif %}, pg_temp;
alter role {{ role }} set lock_timeout = '{{ lock_timeout_ms }}ms';
alter role {{ role }} set statement_timeout = '{{ statement_timeout_ms }}ms';
{% endfor %}
