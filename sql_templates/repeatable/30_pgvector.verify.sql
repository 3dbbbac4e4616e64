-- component: extension
-- purpose: raise when pgvector or its halfvec type is missing
-- variables: vector_schema
-- runs as: administrator
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{{ require("to_regtype(" ~ (((vector_schema | ident) ~ ".vector") | literal) ~ ") is not null", "extension vector is missing") }}
{{ require(
  "to_regtype(" ~ (((vector_schema | ident) ~ ".halfvec") | literal) ~ ") is not null",
  "extension vector is older than 0.7.0: it has no halfvec"
) }}
