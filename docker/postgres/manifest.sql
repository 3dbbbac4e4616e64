-- Name a restore point and fingerprint every user's rows in the very same state; psql prints one JSON object.
-- variables: label, point, exact, lock_timeout
--
-- The locks are held for the moment between the last writer's end and the restore point: going back to the savepoint
-- gives them up, and the transaction keeps the snapshot that was taken under them. Source: PostgreSQL manual, LOCK
-- (Notes) and ROLLBACK TO SAVEPOINT.
select
  (to_regprocedure('memharbor.fingerprint_users()') is not null and :'exact')::text as is_exact,
  coalesce(string_agg(c.oid::regclass::text, ', ' order by c.oid), '') as locked
from pg_class c
where c.relnamespace = to_regnamespace('memharbor') and c.relkind in ('r', 'p') and c.relname in (
  'memories', 'entities', 'memory_relationships', 'memory_categories', 'memory_history', 'org_members', 'categories',
  'configs'
) \gset
\if :is_exact
  set statement_timeout = 0;
  begin isolation level repeatable read;
  savepoint before_locks;
  set local lock_timeout = :'lock_timeout';
  lock table :locked in share mode;
  select
    pg_create_restore_point(:'point') as lsn,
    to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as taken_at \gset
  rollback to savepoint before_locks;
  select json_build_object(
    'format', 1, 'backup', :'label', 'database', current_database(), 'point', :'point', 'lsn', :'lsn',
    'timeline', ('x' || left(pg_walfile_name(:'lsn'::pg_lsn), 8))::bit(32)::int, 'taken_at', :'taken_at', 'exact', true,
    'fingerprints', (
      select coalesce(json_agg(json_build_array(user_sha256, table_name, row_count, fingerprint)), '[]')
      from memharbor.fingerprint_users()
    )
  );
  commit;
\else
  select pg_create_restore_point(:'point') as lsn \gset
  select json_build_object(
    'format', 1, 'backup', :'label', 'database', current_database(), 'point', :'point', 'lsn', :'lsn',
    'timeline', ('x' || left(pg_walfile_name(:'lsn'::pg_lsn), 8))::bit(32)::int,
    'taken_at', to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), 'exact', false
  );
\endif
