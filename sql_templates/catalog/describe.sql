-- component: catalog
-- purpose: describe everything of Memharbor's in this database as rows (key, value), free of oids and of stored rows
-- variables: none
-- runs as: administrator
-- safe to repeat: reads only
-- Users' own vector indexes are left out: they follow the rows, not the schema.
{% from "macros.sql" import leakproof_functions %}
with schemas as (
  select oid, nspname, nspowner, nspacl from pg_catalog.pg_namespace
  where nspname in ('memharbor', 'memharbor_pooler')
),
relations as (
  select c.*, n.nspname || '.' || c.relname as full_name
  from pg_catalog.pg_class c
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  where (c.relnamespace in (select oid from schemas)
      or (n.nspname = 'public' and c.relowner = to_regrole('memharbor_owner')))
    and c.relkind in ('r', 'p', 'v', 'm', 'S', 'f')
),
our_roles as (
  select * from pg_catalog.pg_roles where rolname like 'memharbor\_%'
),
described (key, value) as (
  select 'schema ' || nspname, jsonb_build_object(
    'owner', pg_get_userbyid(nspowner),
    'privileges', (select jsonb_agg(a::text order by a::text) from unnest(nspacl) a))
  from schemas

  union all
  select 'relation ' || r.full_name, jsonb_strip_nulls(jsonb_build_object(
    'kind', r.relkind::text,
    'owner', pg_get_userbyid(r.relowner),
    'persistence', r.relpersistence::text,
    'options', (select jsonb_agg(o order by o) from unnest(r.reloptions) o),
    'row_security', r.relrowsecurity,
    'force_row_security', r.relforcerowsecurity,
    'privileges', (select jsonb_agg(a::text order by a::text) from unnest(r.relacl) a),
    'definition', case when r.relkind in ('v', 'm') then pg_get_viewdef(r.oid) end,
    'comment', obj_description(r.oid, 'pg_class')))
  from relations r

  union all
  select 'column ' || r.full_name || '.' || a.attname, jsonb_strip_nulls(jsonb_build_object(
    'type', format_type(a.atttypid, a.atttypmod),
    'place', row_number() over (partition by a.attrelid order by a.attnum),
    'not_null', a.attnotnull,
    'default', (
      select pg_get_expr(d.adbin, d.adrelid) from pg_catalog.pg_attrdef d
      where d.adrelid = a.attrelid and d.adnum = a.attnum),
    'identity', nullif(a.attidentity::text, ''),
    'storage', a.attstorage::text,
    'statistics', nullif(a.attstattarget, -1),
    'privileges', (select jsonb_agg(p::text order by p::text) from unnest(a.attacl) p)))
  from pg_catalog.pg_attribute a
  join relations r on r.oid = a.attrelid and r.relkind in ('r', 'p')
  where a.attnum > 0 and not a.attisdropped

  union all
  select 'constraint ' || r.full_name || '.' || c.conname, jsonb_build_object(
    'definition', pg_get_constraintdef(c.oid),
    'validated', c.convalidated)
  from pg_catalog.pg_constraint c
  join relations r on r.oid = c.conrelid
  -- NOT NULL is a constraint of its own from PostgreSQL 18 on; `column` has it on every version.
  where c.contype <> 'n'

  union all
  select 'index ' || r.full_name || '.' || i.relname, jsonb_build_object(
    'definition', pg_get_indexdef(i.oid),
    'valid', x.indisvalid,
    'statistics', (
      select jsonb_agg(nullif(a.attstattarget, -1) order by a.attnum) from pg_catalog.pg_attribute a
      where a.attrelid = i.oid))
  from pg_catalog.pg_index x
  join pg_catalog.pg_class i on i.oid = x.indexrelid
  join relations r on r.oid = x.indrelid
  where i.relname not like 'memories\_hnsw\_%'

  union all
  select 'trigger ' || r.full_name || '.' || t.tgname, jsonb_build_object(
    'definition', pg_get_triggerdef(t.oid),
    'enabled', t.tgenabled::text)
  from pg_catalog.pg_trigger t
  join relations r on r.oid = t.tgrelid
  where not t.tgisinternal

  union all
  select 'policy ' || r.full_name || '.' || p.polname, jsonb_build_object(
    'command', p.polcmd::text,
    'permissive', p.polpermissive,
    'roles', (
      select jsonb_agg(case when o = 0 then 'public' else pg_get_userbyid(o)::text end order by o = 0, pg_get_userbyid(o))
      from unnest(p.polroles) o),
    'using', pg_get_expr(p.polqual, p.polrelid),
    'check', pg_get_expr(p.polwithcheck, p.polrelid))
  from pg_catalog.pg_policy p
  join relations r on r.oid = p.polrelid

  union all
  select 'function ' || s.nspname || '.' || p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')',
    jsonb_strip_nulls(jsonb_build_object(
      'owner', pg_get_userbyid(p.proowner),
      'returns', pg_get_function_result(p.oid),
      'language', (select l.lanname from pg_catalog.pg_language l where l.oid = p.prolang),
      'volatility', p.provolatile::text,
      'security_definer', p.prosecdef,
      'leakproof', p.proleakproof,
      'parallel', p.proparallel::text,
      'settings', to_jsonb(p.proconfig),
      'source', p.prosrc,
      'privileges', (select jsonb_agg(a::text order by a::text) from unnest(p.proacl) a),
      'comment', obj_description(p.oid, 'pg_proc')))
  from pg_catalog.pg_proc p
  join schemas s on s.oid = p.pronamespace

  union all
  select 'leakproof ' || p.oid::regprocedure::text, to_jsonb(p.proleakproof)
  from unnest(array[{{ leakproof_functions | map('literal') | join(', ') }}]::regprocedure[]) marked (oid)
  join pg_catalog.pg_proc p on p.oid = marked.oid

  union all
  select 'extension ' || e.extname, to_jsonb(n.nspname)
  from pg_catalog.pg_extension e
  join pg_catalog.pg_namespace n on n.oid = e.extnamespace
  where e.extname = 'vector'

  union all
  select 'role ' || r.rolname, jsonb_build_object(
    'attributes', jsonb_build_object(
      'superuser', r.rolsuper, 'inherit', r.rolinherit, 'create_role', r.rolcreaterole, 'create_db', r.rolcreatedb,
      'login', r.rolcanlogin, 'replication', r.rolreplication, 'bypass_rls', r.rolbypassrls,
      'connection_limit', r.rolconnlimit, 'valid_until', r.rolvaliduntil),
    'member_of', (
      select jsonb_agg(distinct pg_get_userbyid(m.roleid)) from pg_catalog.pg_auth_members m where m.member = r.oid),
    'comment', shobj_description(r.oid, 'pg_authid'))
  from our_roles r

  union all
  select 'settings ' || coalesce(r.rolname, 'database'), jsonb_agg(c order by c)
  from pg_catalog.pg_db_role_setting s
  left join our_roles r on r.oid = s.setrole
  cross join unnest(s.setconfig) c
  where s.setdatabase in (0, (select oid from pg_catalog.pg_database where datname = current_database()))
    and (r.oid is not null
      or (s.setrole = 0 and s.setdatabase = (select oid from pg_catalog.pg_database where datname = current_database())))
  group by 1

  union all
  select 'database', jsonb_build_object(
    'owner', pg_get_userbyid(d.datdba),
    'privileges', (select jsonb_agg(a::text order by a::text) from unnest(d.datacl) a
      where a::text like 'memharbor\_%' or a::text like '=%'))
  from pg_catalog.pg_database d
  where d.datname = current_database()

  union all
  select 'public schema privileges', (
    select jsonb_agg(a::text order by a::text) from unnest(n.nspacl) a
    where a::text like 'memharbor\_%' or a::text like '=%')
  from pg_catalog.pg_namespace n
  where n.nspname = 'public'

  union all
  select 'default privileges ' || coalesce(n.nspname, 'everywhere') || ' ' || d.defaclobjtype::text,
    (select jsonb_agg(a::text order by a::text) from unnest(d.defaclacl) a)
  from pg_catalog.pg_default_acl d
  left join pg_catalog.pg_namespace n on n.oid = d.defaclnamespace
  where d.defaclrole = to_regrole('memharbor_owner')

  union all
  -- Grants on functions of pg_catalog are per database: these count in database postgres only.
  select 'grant to memharbor_rewind ' || p.oid::regprocedure::text, to_jsonb(true)
  from pg_catalog.pg_proc p
  cross join unnest(p.proacl) a
  where p.pronamespace = (select oid from pg_catalog.pg_namespace where nspname = 'pg_catalog')
    and p.proacl is not null and a::text like 'memharbor\_rewind=X%'
)
select key, value from described where value is not null order by key collate "C"
