-- component: tables
-- purpose: who is asking, the two ways a memory is written, the audit trail and the graph's walk
-- variables: include_graph, include_history
-- runs as: owner
-- safe to repeat: replaces each function
-- A plain STABLE function without SET is inlined: the planner then sees the user and knows how many rows they have.
create or replace function memharbor.current_user_id() returns text
language sql stable parallel safe
as $function$
  select coalesce(
    nullif(current_setting('app.user_id', true), ''),
    nullif(nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub', '')
  )
$function$;
comment on function memharbor.current_user_id() is
  'The user for whom the transaction acts: app.user_id, else the subject of PostgREST''s JWT claims; null, which matches nothing, where nobody said.';

create or replace function memharbor.sync_memory() returns trigger
language plpgsql
set search_path = ''
-- Timestamps without an offset mean UTC, and those in the payload are written in it, whoever writes.
set timezone = 'UTC'
as $function$
declare
  reserved constant text[] :=
    '{data,hash,user_id,agent_id,run_id,created_at,updated_at,text_lemmatized}';
  p jsonb := new.payload;
begin
  if tg_op = 'UPDATE' and new.id <> old.id then
    raise exception 'the id of a memory cannot be changed' using errcode = 'integrity_constraint_violation';
  end if;
  if p is not null and (tg_op = 'INSERT' or p is distinct from old.payload) then
    -- A null text makes Mem0's get_all fail for the whole user.
    if p -> 'data' = 'null' then
      p := p - 'data';
      new.payload := p;
    end if;
    new.memory := p ->> 'data';
    new.hash := coalesce(p ->> 'hash', md5(new.memory));
    new.user_id := p ->> 'user_id';
    new.agent_id := p ->> 'agent_id';
    new.run_id := p ->> 'run_id';
    -- Mem0 lets a caller write anything into created_at.
    new.created_at := case
      when pg_input_is_valid(p ->> 'created_at', 'timestamptz') then (p ->> 'created_at')::timestamptz
      else coalesce(new.created_at, now())
    end;
    new.updated_at := case
      when pg_input_is_valid(p ->> 'updated_at', 'timestamptz') then (p ->> 'updated_at')::timestamptz
      when tg_op = 'INSERT' then coalesce(new.updated_at, now())
      else now()
    end;
    new.metadata := p - reserved;
    new.categories := null;
    if jsonb_typeof(p -> 'categories') = 'array'
      and not jsonb_path_exists(p -> 'categories', 'strict $[*] ? (@.type() != "string")')
    then
      new.categories := array(select jsonb_array_elements_text(p -> 'categories'));
      new.metadata := new.metadata - 'categories';
    end if;
  elsif tg_op = 'INSERT' or (
      new.memory, new.hash, new.user_id, new.agent_id, new.run_id,
      new.metadata, new.categories, new.created_at, new.updated_at
    ) is distinct from (
      old.memory, old.hash, old.user_id, old.agent_id, old.run_id,
      old.metadata, old.categories, old.created_at, old.updated_at
    )
  then
    new.created_at := coalesce(new.created_at, now());
    if new.updated_at is null or (tg_op = 'UPDATE' and new.updated_at = old.updated_at) then
      new.updated_at := now();
    end if;
    if tg_op = 'INSERT' or (new.memory, new.hash) is distinct from (old.memory, old.hash) then
      new.hash := md5(new.memory);
    end if;
    new.metadata := coalesce(new.metadata, '{}') - reserved;
    if new.categories is not null then
      new.metadata := new.metadata - 'categories';
    end if;
    new.payload := new.metadata || jsonb_strip_nulls(jsonb_build_object(
      'data', new.memory,
      'text_lemmatized', case
        when tg_op = 'UPDATE' and new.memory = old.memory then old.payload ->> 'text_lemmatized'
        else lower(new.memory)
      end,
      'hash', new.hash,
      'user_id', new.user_id,
      'agent_id', new.agent_id,
      'run_id', new.run_id,
      'created_at', case
        when tg_op = 'UPDATE' and new.created_at = old.created_at then old.payload ->> 'created_at'
        else to_jsonb(new.created_at) #>> '{}'
      end,
      'updated_at', new.updated_at,
      'categories', new.categories
    ));
  end if;
  new.archived_at := case new.state
    when 'archived' then coalesce(new.archived_at, now())
    when 'deleted' then new.archived_at
  end;
  new.deleted_at := case new.state when 'deleted' then coalesce(new.deleted_at, now()) end;
  return new;
end
$function$;
comment on function memharbor.sync_memory() is
  'Derives the canonical columns from a payload that is written, else the payload from the canonical columns.';
{% if include_history %}

-- Security definer: who writes a memory cannot write the audit trail.
create or replace function memharbor.record_history() returns trigger
language plpgsql security definer
set search_path = ''
as $function$
begin
  if tg_op = 'INSERT' then
    insert into memharbor.memory_history (memory_id, user_id, operation, actor)
    select id, user_id, 'create', session_user from new_rows;
  elsif tg_op = 'DELETE' then
    insert into memharbor.memory_history (memory_id, user_id, operation, old_value, old_state, actor)
    select id, user_id, 'delete', payload, state, session_user from old_rows;
  else
    insert into memharbor.memory_history (memory_id, user_id, operation, old_value, old_state, actor)
    select o.id, o.user_id, 'update', o.payload, o.state, session_user
    from old_rows o
    join new_rows n using (id)
    where o.payload is distinct from n.payload or o.state is distinct from n.state;
  end if;
  return null;
end
$function$;
comment on function memharbor.record_history() is
  'Writes one row of memory_history per memory that a statement created, changed or deleted.';
{% endif %}
{% if include_graph %}

create or replace function memharbor.related_memories(memory_id uuid, hops integer default 2)
returns table (id uuid, distance integer, relationship_type text, strength numeric, via uuid)
language sql stable parallel safe
set search_path = ''
as $function$
  with edges as not materialized (
    select source_memory_id as near_id, target_memory_id as far_id, relationship_type, strength
    from memharbor.memory_relationships
    union all
    select target_memory_id, source_memory_id, relationship_type, strength
    from memharbor.memory_relationships
  ),
  first_hop as (
    select far_id as id, 1 as distance, relationship_type, strength, near_id as via
    from edges
    where near_id = memory_id and hops >= 1
  ),
  reached as (
    select * from first_hop
    union all
    select e.far_id, 2, e.relationship_type, f.strength * e.strength, e.near_id
    from first_hop f
    join edges e on e.near_id = f.id
    where hops >= 2
  )
  select distinct on (m.id) m.id, r.distance, r.relationship_type, r.strength, r.via
  from reached r
  join memharbor.memories m on m.id = r.id
  where m.id <> memory_id and m.state = 'active'
  order by m.id, r.distance, r.strength desc, r.relationship_type
$function$;
comment on function memharbor.related_memories(uuid, integer) is
  'The active memories one or two relationships away, either direction; strength is the product along the way.';
{% endif %}
