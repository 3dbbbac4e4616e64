-- component: tables
-- purpose: raise when a trigger is missing or disabled
-- variables: none
-- runs as: owner
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{% for trigger in ['sync', 'history_insert', 'history_update', 'history_delete'] %}
{{ require(
  "select tgenabled = 'O' from pg_catalog.pg_trigger where tgrelid = to_regclass('memharbor.memories') and tgname = '" ~ trigger ~ "'",
  "trigger " ~ trigger ~ " on memharbor.memories is missing or disabled"
) }}
{% endfor %}
