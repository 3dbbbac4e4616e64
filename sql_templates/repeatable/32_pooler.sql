-- component: extension
-- purpose: PgBouncer's auth_query; in a schema of its own, so that dropping memharbor does not lock everybody out
-- variables: none
-- runs as: administrator
-- safe to repeat: replaces the function and states privileges that already hold
do $pooler$
begin
  if not (select r.rolsuper from pg_catalog.pg_roles r where r.rolname = current_user) then
    raise notice 'skipped: memharbor_pooler.lookup reads pg_authid, which only a superuser can; use the provider''s pooler';
    return;
  end if;
  create schema if not exists memharbor_pooler;
  revoke all on schema memharbor_pooler from public;
  grant usage on schema memharbor_pooler to memharbor_pooler;
  create or replace function memharbor_pooler.lookup(p_user text)
  returns table (username text, secret text)
  language sql stable security definer set search_path = ''
  as $function$
    -- Logins that would get around row level security from outside never pass the pooler.
    select rolname::text, rolpassword
    from pg_catalog.pg_authid
    where rolname = p_user
      and rolcanlogin
      and not rolsuper
      and not rolreplication
      and (rolvaliduntil is null or rolvaliduntil > pg_catalog.now())
  $function$;
  revoke all on function memharbor_pooler.lookup(text) from public;
  grant execute on function memharbor_pooler.lookup(text) to memharbor_pooler;
end
$pooler$;
