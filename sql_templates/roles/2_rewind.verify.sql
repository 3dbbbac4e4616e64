-- component: roles
-- purpose: raise when pg_rewind would fail; only in database postgres of a server that has its superuser
-- variables: none
-- runs as: administrator
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{{ require(
  "select not rolsuper or bool_and(has_function_privilege('memharbor_rewind', f.oid, 'execute')) from pg_catalog.pg_roles, pg_catalog.pg_proc f where rolname = current_user and f.oid::regprocedure::text in ('pg_ls_dir(text,boolean,boolean)', 'pg_stat_file(text,boolean)', 'pg_read_binary_file(text)', 'pg_read_binary_file(text,bigint,bigint,boolean)') group by rolsuper",
  "memharbor_rewind lacks a grant in database postgres"
) }}
