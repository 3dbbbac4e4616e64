-- component: policies
-- purpose: row level security: who sees and writes which rows
-- variables: include_graph, include_history
-- runs as: owner
-- safe to repeat: drops every policy of the schema and creates these, in one transaction
{% set tables = ['memories', 'entities', 'categories', 'memory_categories', 'configs', 'org_members', 'erase_ledger',
                 'migration_ledger', 'schema_migrations', 'schema_state']
  + (['memory_history'] if include_history else []) + (['memory_relationships'] if include_graph else []) %}
{% for table in tables %}
alter table memharbor.{{ table }} enable row level security, force row level security;
{% endfor %}
-- A policy that nobody declares here is one that nobody reviewed.
do $undeclared$
declare
  found_policy record;
begin
  for found_policy in
    select p.tablename, p.policyname from pg_catalog.pg_policies p
    join pg_catalog.pg_tables t using (schemaname, tablename)
    where p.schemaname = 'memharbor' and t.tableowner = current_user
  loop
    execute format('drop policy %I on memharbor.%I', found_policy.policyname, found_policy.tablename);
  end loop;
end
$undeclared$;

-- User isolation. The condition is Mem0's own expression, so that it, Mem0's filter and the condition of a user's own
-- index are one and the same to the planner. '' is nobody: current_user_id() is null then.
{% for table in ['memories', 'entities'] %}
create policy isolate on memharbor.{{ table }} to memharbor_app
  using ((payload ->> 'user_id') = memharbor.current_user_id())
  with check ((payload ->> 'user_id') = memharbor.current_user_id());
{% endfor %}
{% if include_graph %}
-- Both ends must be the user's own: a foreign key alone would tell which ids exist.
create policy isolate on memharbor.memory_relationships to memharbor_app
  using (user_id = memharbor.current_user_id())
  with check (
    user_id = memharbor.current_user_id()
    and exists (select from memharbor.memories m where m.id = source_memory_id)
    and exists (select from memharbor.memories m where m.id = target_memory_id)
  );
{% endif %}
create policy isolate on memharbor.memory_categories to memharbor_app
  using (user_id = memharbor.current_user_id())
  with check (
    user_id = memharbor.current_user_id() and exists (select from memharbor.memories m where m.id = memory_id)
  );
{% if include_history %}
create policy isolate on memharbor.memory_history for select to memharbor_app
  using (user_id = memharbor.current_user_id());
create policy record on memharbor.memory_history for insert to memharbor_owner with check (true);
{% endif %}
create policy isolate on memharbor.org_members for select to memharbor_app
  using (user_id = memharbor.current_user_id());
create policy shared on memharbor.categories for select to memharbor_app using (true);

-- The service role, by policy and not by BYPASSRLS, which only a superuser could give.
{% for table in tables if table not in ['memory_history', 'schema_migrations', 'schema_state'] %}
create policy service on memharbor.{{ table }} to memharbor_service using (true) with check (true);
{% endfor %}
{% for table in tables if table in ['memory_history', 'schema_migrations', 'schema_state'] %}
create policy service on memharbor.{{ table }} for select to memharbor_service using (true);
{% endfor %}
{% for table in tables if table not in ['configs', 'erase_ledger', 'schema_state'] %}
create policy report on memharbor.{{ table }} for select to memharbor_readonly using (true);
{% endfor %}
-- For a server whose administrator cannot give BYPASSRLS: pg_dump --enable-row-security then dumps all rows.
{% for table in tables %}
create policy dump on memharbor.{{ table }} for select to memharbor_backup using (true);
{% endfor %}
{% for table in ['schema_migrations', 'schema_state'] %}
create policy ledger on memharbor.{{ table }} to memharbor_owner using (true) with check (true);
{% endfor %}
