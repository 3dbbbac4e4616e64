-- component: roles
-- purpose: the eight roles of Memharbor with exactly their attributes and memberships
-- variables: none
-- runs as: administrator
-- safe to repeat: creates what is missing and sets attributes to what they already are
{% set roles = {
  'memharbor_owner': 'owns every object; runs DDL',
  'memharbor_app': 'reads and writes the memories of the user it acts for',
  'memharbor_service': 'reads and writes every memory by policy, for the server of Mem0',
  'memharbor_readonly': 'reads every memory by policy, for reports',
  'memharbor_backup': 'reads everything for logical backups',
  'memharbor_pooler': 'looks up logins for PgBouncer (auth_query), reads nothing else',
  'memharbor_replicator': 'streams WAL to replicas',
  'memharbor_rewind': 'lets pg_rewind read files, through four functions in database postgres'
} %}
{% for role, purpose in roles.items() %}
do $role$
begin
  if to_regrole({{ role | literal }}) is null then
    create role {{ role | ident }} login;
  end if;
end
$role$;
comment on role {{ role | ident }} is {{ purpose | literal }};
{% endfor %}

-- Only a superuser may say NOSUPERUSER and its like; a role that another administrator made has none of them anyway.
do $attributes$
declare
  administrator pg_catalog.pg_roles := (select r from pg_catalog.pg_roles r where r.rolname = current_user);
  role_name text;
begin
  foreach role_name in array array['{{ roles.keys() | join("', '") }}'] loop
    if administrator.rolsuper then
      execute format(
        'alter role %I with login nosuperuser nocreatedb nocreaterole inherit connection limit -1 %s %s',
        role_name,
        case when role_name = 'memharbor_backup' then 'bypassrls' else 'nobypassrls' end,
        case when role_name = 'memharbor_replicator' then 'replication' else 'noreplication' end
      );
    else
      execute format('alter role %I with login inherit connection limit -1', role_name);
    end if;
  end loop;
  if not administrator.rolsuper then
    if administrator.rolbypassrls then
      alter role memharbor_backup with bypassrls;
    else
      raise notice 'skipped: memharbor_backup has no BYPASSRLS, because % cannot give it; dump with --enable-row-security',
        current_user;
    end if;
    if administrator.rolreplication then
      alter role memharbor_replicator with replication;
    else
      raise notice 'skipped: memharbor_replicator has no REPLICATION, because % cannot give it', current_user;
    end if;
  end if;
end
$attributes$;

do $memberships$
begin
  if pg_has_role(current_user, 'pg_read_all_data', 'member with admin option') then
    grant pg_read_all_data to memharbor_backup;
  else
    raise notice 'skipped: memharbor_backup is no member of pg_read_all_data, because % cannot grant it', current_user;
  end if;
  -- Whoever rolls out must be able to act as the owner, and as the service role to see rows past row level security.
  if not (select r.rolsuper from pg_catalog.pg_roles r where r.rolname = current_user) then
    execute format('grant memharbor_owner, memharbor_service to %I with inherit true, set true', current_user);
  end if;
end
$memberships$;
