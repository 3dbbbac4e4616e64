-- component: roles
-- purpose: what pg_rewind needs; grants on functions of pg_catalog count only in database postgres
-- variables: none
-- runs as: administrator
-- safe to repeat: a grant that exists is left as it is
do $rewind$
begin
  if (select r.rolsuper from pg_catalog.pg_roles r where r.rolname = current_user) then
    grant execute on function
      pg_catalog.pg_ls_dir(text, boolean, boolean),
      pg_catalog.pg_stat_file(text, boolean),
      pg_catalog.pg_read_binary_file(text),
      pg_catalog.pg_read_binary_file(text, bigint, bigint, boolean)
    to memharbor_rewind;
  else
    raise notice 'skipped: memharbor_rewind cannot rewind, because % is no superuser', current_user;
  end if;
end
$rewind$;
