{#
  What templates share.

  `require` is what verify twins are made of: it raises unless the condition holds; both arguments are SQL, the message is
  a plain text. `leakproof_functions` are the built-in functions of keyword search that the setting `leakproof` marks, as
  regprocedure reads them (why: docs/concepts/row-level-security.md).
#}
{% set leakproof_functions = [
  'pg_catalog.jsonb_object_field_text(jsonb, text)',
  'pg_catalog.ts_match_vq(tsvector, tsquery)',
  'pg_catalog.to_tsvector(regconfig, text)'
] %}
{% macro require(condition, message) %}
do $require$
begin
  if not coalesce(({{ condition }}), false) then
    raise exception using errcode = 'object_not_in_prerequisite_state', message = {{ message | literal }};
  end if;
end
$require$;
{% endmacro %}
{% macro require_table(table) %}
{{ require("to_regclass('memharbor." ~ table ~ "') is not null", "table memharbor." ~ table ~ " is missing") }}
{%- endmacro %}
