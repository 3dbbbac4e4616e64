-- component: extension
-- purpose: let keyword search use its index under row level security, by marking three built-in functions LEAKPROOF
-- variables: leakproof
-- runs as: administrator
-- safe to repeat: sets a mark to one value, and only where it differs; only a superuser can
{% from "macros.sql" import leakproof_functions %}
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
{% for function in leakproof_functions %}
        {{ function | literal }}::regprocedure{{ '' if loop.last else ',' }}
{% endfor %}
      )
  loop
    execute format('alter function %s {% if not leakproof %}not {% endif %}leakproof', function_name);
  end loop;
end
$leakproof$;
