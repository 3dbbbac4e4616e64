-- component: extension
-- purpose: raise when the marks are not what the setting says; a restored dump has lost them
-- variables: leakproof
-- runs as: administrator
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{{ require(
  "select not r.rolsuper or (select bool_and(p.proleakproof = " ~ (leakproof | literal) ~ ") from pg_catalog.pg_proc p where p.oid in ('pg_catalog.jsonb_object_field_text(jsonb, text)'::regprocedure, 'pg_catalog.ts_match_vq(tsvector, tsquery)'::regprocedure, 'pg_catalog.to_tsvector(regconfig, text)'::regprocedure)) from pg_catalog.pg_roles r where r.rolname = current_user",
  "a LEAKPROOF mark is not what the setting `leakproof` says"
) }}
