-- component: policies
-- purpose: which role may run which statement on which object
-- variables: include_graph, include_history
-- runs as: owner
-- safe to repeat: takes everything back and grants these, in one transaction
{% set history = ['memory_history'] if include_history else [] %}
{% set graph = ['memory_relationships'] if include_graph else [] %}
{% set contract_views = ['memories', 'mem0', 'mem0_entities', 'memories_entities', 'mem0_memories'] + graph %}
{% set derived_views = ['mem0_metadata'] + (['memory_history', 'mem0_history'] if include_history else []) %}
{% set roles = 'memharbor_app, memharbor_service, memharbor_readonly, memharbor_backup, memharbor_pooler' %}
{% macro names(schema, list) %}{{ schema }}.{{ list | join(', ' ~ schema ~ '.') }}{% endmacro %}
do $undeclared$
declare
  found_object record;
begin
  for found_object in
    select 'table' as kind, c.oid::regclass::text as name from pg_catalog.pg_class c
    where c.relnamespace = to_regnamespace('memharbor') and c.relkind in ('r', 'p', 'v', 'm', 'S')
      and pg_get_userbyid(c.relowner) = current_user
    union all
    select 'function', p.oid::regprocedure::text from pg_catalog.pg_proc p
    where p.pronamespace = to_regnamespace('memharbor') and pg_get_userbyid(p.proowner) = current_user
  loop
    execute format('revoke all on %s %s from public, {{ roles }}', found_object.kind, found_object.name);
  end loop;
end
$undeclared$;
revoke all on schema memharbor from public, {{ roles }};
revoke all on {{ names('public', contract_views + derived_views) }} from public, {{ roles }};

grant usage on schema memharbor to memharbor_app, memharbor_service, memharbor_readonly, memharbor_backup;

-- Applications: rows under row level security, never TRUNCATE, which row level security does not see.
grant select, insert, update, delete on
  {{ names('memharbor', ['memories', 'entities', 'memory_categories'] + graph) }}
to memharbor_app, memharbor_service;
grant select, insert, update, delete on {{ names('public', contract_views) }} to memharbor_app, memharbor_service;
grant select on {{ names('memharbor', ['categories', 'org_members', 'memory_stats'] + history) }} to memharbor_app;
grant select on {{ names('public', derived_views) }} to memharbor_app, memharbor_service;

grant select, insert, update, delete on
  memharbor.categories, memharbor.configs, memharbor.org_members, memharbor.migration_ledger
to memharbor_service;
-- What was erased stays on record.
grant select, insert, update on memharbor.erase_ledger to memharbor_service;
grant select on
  {{ names('memharbor', ['memory_stats', 'schema_migrations', 'schema_state'] + history) }}
to memharbor_service;

grant select on
  {{ names('memharbor', ['memories', 'entities', 'categories', 'memory_categories', 'org_members', 'memory_stats',
                         'migration_ledger', 'schema_migrations'] + history + graph) }}
to memharbor_readonly;
grant select on {{ names('public', contract_views + derived_views) }} to memharbor_readonly;

grant select on
  {{ names('memharbor', ['memories', 'entities', 'categories', 'memory_categories', 'configs', 'org_members',
                         'erase_ledger', 'migration_ledger', 'schema_migrations', 'schema_state', 'memory_stats']
                        + history + graph) }}
to memharbor_backup;
grant select on sequence memharbor.schema_migrations_id_seq{% if include_history %}, memharbor.memory_history_id_seq{% endif %} to memharbor_backup;
grant select on {{ names('public', contract_views + derived_views) }} to memharbor_backup;

grant execute on function memharbor.current_user_id() to memharbor_app, memharbor_service, memharbor_readonly;
grant execute on function memharbor.fingerprint_users() to memharbor_service, memharbor_backup;
{% if include_graph %}
grant execute on function memharbor.related_memories(uuid, integer)
to memharbor_app, memharbor_service, memharbor_readonly;
{% endif %}
-- What the owner makes later belongs to nobody else until a grant says so.
alter default privileges for role memharbor_owner revoke execute on functions from public;
