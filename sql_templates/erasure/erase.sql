-- component: ledger
-- purpose: erase users: their rows, the copies that checkpoints keep of them, their vector index; and record it
-- variables: drop_indexes, erasures, tables
-- runs as: administrator
-- safe to repeat: an erasure that the ledger has is passed over
-- One statement, so that it is all or nothing however it is sent. Users are named by a digest: it may be logged. Where
-- memharbor.erase_owner is set, it is the one user's id, and nobody need be looked for. What was deleted is left in
-- memharbor.erased, by digest and table, until the end of the transaction.
do $erase$
declare
  erasures jsonb := {{ erasures | literal }};
  digests text[];
  owners text[] := array_remove(array[nullif(current_setting('memharbor.erase_owner', true), '')], null);
  found_owners text[];
  gone jsonb;
  counts jsonb := '{}';
  place record;
  places jsonb;
begin
  if to_regclass('memharbor.erase_ledger') is null then
    return;
  end if;
  select jsonb_agg(e), array_agg(distinct e ->> 'user_sha256') into erasures, digests
  from jsonb_array_elements(erasures) e
  where not exists (
    select from memharbor.erase_ledger l where l.id = (e ->> 'id')::uuid and l.erased_at is not null
  );
  if digests is null then
    return;
  end if;

  -- The tables, and what checkpoints copied of them: as c1_memories and the like, in a schema of their own.
  select jsonb_agg(jsonb_build_object(
    'name', c.oid::regclass::text, 'owner', t.owner, 'source', t.name, 'is_copy', n.nspname <> 'memharbor',
    'memories', to_regclass(format('%I.%I', n.nspname, replace(c.relname, t.name, 'memories')))::text,
    'counted_as', case n.nspname when 'memharbor' then t.name else 'checkpoints' end
  ) order by n.nspname, t.place)
  into places
  from (values
{% for table in tables %}
    ({{ loop.index }}, {{ table.name | literal }}, {{ table.owner | literal }}){{ '' if loop.last else ',' }}
{% endfor %}
  ) t (place, name, owner)
  join pg_catalog.pg_class c on c.relname = t.name or c.relname ~ ('^c[0-9]+_' || t.name || '$')
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  where c.relkind = 'r'
    and n.nspname = case when c.relname = t.name then 'memharbor' else 'memharbor_checkpoint' end;

  if owners = '{}' then
    for place in select * from jsonb_to_recordset(places) p (name text, owner text) loop
      execute format(
        'select array_agg(owner) from (select distinct %s as owner from %s) o
         where encode(sha256(convert_to(owner, ''UTF8'')), ''hex'') = any ($1)', place.owner, place.name
      ) into found_owners using digests;
      owners := owners || found_owners;
    end loop;
  end if;

  -- Without triggers: the audit trail must not write down what is being deleted. Who may not do that deletes it after.
  if has_parameter_privilege(current_user, 'session_replication_role', 'set') then
    perform set_config('session_replication_role', 'replica', true);
  end if;
  for place in
    -- Foreign keys are triggers too: what others attached to these memories goes first, counted for the memory's owner.
    select p.*, a.attached_to
    from rows from (jsonb_to_recordset(places) as (
      name text, owner text, source text, is_copy boolean, memories text, counted_as text
    )) with ordinality p (name, owner, source, is_copy, memories, counted_as, nr)
    join (values
      ('memory_relationships', 'm.id = a.source_memory_id or m.id = a.target_memory_id'),
      ('memory_categories', 'm.id = a.memory_id'),
      (null, null)
    ) a (source, attached_to) on a.source is null or (a.source = p.source and p.memories is not null)
    order by a.attached_to is null, p.is_copy, p.nr desc
  loop
    execute format(
      'with gone (owner) as (delete from %s a %s returning %s)
       select jsonb_object_agg(digest, row_count) from (
         select encode(sha256(convert_to(owner, ''UTF8'')), ''hex''), count(*) from gone group by owner
       ) g (digest, row_count)',
      place.name,
      case when place.attached_to is null then format('where %s = any ($1)', place.owner)
        else format('using %s m where m.user_id = any ($1) and (%s)', place.memories, place.attached_to) end,
      case when place.attached_to is null then place.owner else 'm.user_id' end
    ) into gone using owners;
    select counts || coalesce(jsonb_object_agg(
      g.digest, coalesce(counts -> g.digest, '{}') || jsonb_build_object(
        place.counted_as, g.row_count::bigint + coalesce((counts -> g.digest ->> place.counted_as)::bigint, 0))
    ), '{}')
    into counts
    from jsonb_each_text(gone) g (digest, row_count);
  end loop;
  if to_regclass('memharbor.memory_history') is not null then
    delete from memharbor.memory_history where user_id = any (owners);
  end if;
{% if drop_indexes %}
  for place in select 'memories_hnsw_' || md5(o) as index_name from unnest(owners) o loop
    execute format('drop index if exists memharbor.%I', place.index_name);
  end loop;
{% endif %}

  insert into memharbor.erase_ledger
    (id, user_id_sha256, memory_count, reason, requested_by, requested_at, erased_at)
  select id, user_sha256, coalesce(memory_count, (counts -> user_sha256 ->> 'memories')::bigint, 0), reason,
    requested_by, requested_at, coalesce(erased_at, clock_timestamp())
  from jsonb_to_recordset(erasures) e (
    id uuid, user_sha256 text, memory_count bigint, reason text, requested_by text, requested_at timestamptz,
    erased_at timestamptz
  )
  on conflict (id) do update set memory_count = excluded.memory_count, erased_at = excluded.erased_at;
  perform set_config('memharbor.erased', counts::text, true);
end
$erase$;
