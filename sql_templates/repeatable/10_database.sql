-- component: settings
-- purpose: who may connect to the database and create in it
-- variables: database
-- runs as: administrator
-- safe to repeat: states privileges that already hold
grant connect on database {{ database | ident }} to
  memharbor_app, memharbor_service, memharbor_readonly, memharbor_backup, memharbor_pooler;
-- Nobody else is shut out of a database that others use too, for instance Supabase's.
do $own_database$
begin
  if exists (
    select from pg_catalog.pg_database
    where datname = current_database() and datdba = to_regrole('memharbor_owner')
  ) then
    -- Temporary tables outlive a transaction in a pooled session and could stand before the contract views.
    revoke connect, temporary on database {{ database | ident }} from public;
    revoke create on schema public from public;
  else
    raise notice 'skipped: % is not owned by memharbor_owner, so the rights of PUBLIC in it are left alone', current_database();
  end if;
end
$own_database$;
