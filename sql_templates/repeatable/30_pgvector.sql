-- component: extension
-- purpose: pgvector, in the schema that the contract names
-- variables: vector_schema
-- runs as: administrator
-- safe to repeat: creates the extension only where it is missing
create extension if not exists vector with schema {{ vector_schema | ident }};
do $place$
declare
  found_schema text := (
    select n.nspname from pg_catalog.pg_extension e join pg_catalog.pg_namespace n on n.oid = e.extnamespace
    where e.extname = 'vector'
  );
begin
  if found_schema <> {{ vector_schema | literal }} then
    raise exception using
      errcode = 'object_not_in_prerequisite_state',
      message = format('extension vector is in schema %s, not in %s', found_schema, {{ vector_schema | literal }}),
      hint = format('run: alter extension vector set schema %s;', {{ vector_schema | ident | literal }});
  end if;
end
$place$;
