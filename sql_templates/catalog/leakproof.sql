-- component: catalog
-- purpose: count the built-in functions that the setting `leakproof` marks: those that are marked, and all of them
-- variables: none
-- runs as: administrator
-- safe to repeat: reads only
{% from "macros.sql" import leakproof_functions %}
select count(*) filter (where p.proleakproof), count(*) from pg_catalog.pg_proc p
where p.oid = any (array[{{ leakproof_functions | map('literal') | join(', ') }}]::regprocedure[])
