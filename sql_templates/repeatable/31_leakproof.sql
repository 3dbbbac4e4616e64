-- component: extension
-- purpose: let keyword search use its index under row level security, by marking three built-in functions LEAKPROOF
-- variables: leakproof
-- runs as: administrator
-- safe to repeat: sets a mark to one value, and only where it differs; only a superuser can
do $leakproof$
declare
  function_name regprocedure;
begin
  if not (select r.rolsuper from pg_catalog.pg_roles r where r.rolname = current_user) then
    raise notice 'skipped: LEAKPROOF is a superuser''s to give; answers are the same, keyword search of large users is slower';
    return;
  end if;
  for function_name in
    select p.oid::regprocedure from pg_catalog.pg_proc p
    where p.proleakproof <> {{ leakproof | literal }}
      and p.oid in (
        'pg_catalog.jsonb_object_field_text(jsonb, text)'::regprocedure,
        'pg_catalog.ts_match_vq(tsvector, tsquery)'::regprocedure,
        'pg_catalog.to_tsvector(regconfig, text)'::regprocedure
      )
  loop
    execute format('alter function %s {% if not leakproof %}not {% endif %}leakproof', function_name);
  end loop;
end
$leakproof$;
