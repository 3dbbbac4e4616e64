{#
  What verify twins are made of.

  `require` raises unless the condition holds; both arguments are SQL, the message is a plain text.
#}
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
