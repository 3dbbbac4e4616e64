-- component: extension
-- purpose: raise when the marks are not what the setting says; a restored dump has lost them
-- variables: leakproof
-- runs as: administrator
-- safe to repeat: reads only
{% from "macros.sql" import leakproof_functions, require %}
{{ require(
  "select not r.rolsuper or (select bool_and(p.proleakproof = " ~ (leakproof | literal) ~ ") from pg_catalog.pg_proc p where p.oid = any (array[" ~ (leakproof_functions | map("literal") | join(", ")) ~ "]::regprocedure[])) from pg_catalog.pg_roles r where r.rolname = current_user",
  "a LEAKPROOF mark is not what the setting `leakproof` says"
) }}
