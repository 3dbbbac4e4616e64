-- component: policies
-- purpose: take back: row level security: who sees and writes which rows
-- variables: none
-- runs as: owner
-- safe to repeat: takes back only what is there
-- Row level security stays on: a table without policies shows nothing to anybody.
do $policies$
declare
  found_policy record;
begin
  for found_policy in
    select * from pg_catalog.pg_policies
    where schemaname = 'memharbor' and tablename not in ('schema_migrations', 'schema_state')
  loop
    execute format('drop policy %I on memharbor.%I', found_policy.policyname, found_policy.tablename);
  end loop;
end
$policies$;
