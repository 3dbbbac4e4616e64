-- component: tables
-- purpose: the contract: what Mem0, applications and older programs see in schema public
-- variables: include_graph, include_history
-- runs as: owner
-- safe to repeat: replaces each view; privileges on it stay
{% set views %}security_invoker = true{% endset %}
create or replace view public.memories with ({{ views }}) as
select
  id, user_id, agent_id, run_id, org_id, memory, hash, metadata, categories, embedding, state, expires_at,
  created_at, updated_at, archived_at, deleted_at, embedding as vector, payload
from memharbor.memories;
comment on view public.memories is
  'Every memory, for canonical SQL and for Mem0 with collection_name=memories. Mem0''s search fails on a row without an embedding: where rows are loaded before they are embedded, let Mem0 use collection mem0.';

create or replace view public.mem0 with ({{ views }}) as
select id, embedding as vector, payload
from memharbor.memories
where state = 'active' and embedding is not null and (expires_at is null or expires_at > now());
comment on view public.mem0 is
  'Mem0''s default collection: active memories that have an embedding and whose expires_at has not passed. Mem0''s own expiration_date stays in the payload and is Mem0''s to judge (show_expired).';

create or replace view public.mem0_entities with ({{ views }}) as
select id, vector, payload from memharbor.entities;
comment on view public.mem0_entities is 'The entity store of Mem0''s collection mem0.';

create or replace view public.memories_entities with ({{ views }}) as
select id, vector, payload from memharbor.entities;
comment on view public.memories_entities is 'The entity store of Mem0''s collection memories.';

create or replace view memharbor.memory_stats with ({{ views }}) as
select user_id, count(*) as memory_count, min(created_at) as first_memory_at, max(created_at) as last_memory_at
from memharbor.memories
where user_id is not null
group by user_id;
comment on view memharbor.memory_stats is
  'Memories per user, counted when asked: a counter that writers keep would make them wait for each other.';
{% if include_graph %}

create or replace view public.memory_relationships with ({{ views }}) as
select id, source_memory_id, target_memory_id, relationship_type, strength, metadata, user_id, created_at
from memharbor.memory_relationships;
comment on view public.memory_relationships is 'The memory graph.';
{% endif %}
{% if include_history %}

create or replace view public.memory_history with ({{ views }}) as
select
  h.id, h.memory_id, h.operation, h.old_value,
  case
    when h.operation <> 'delete' then
      coalesce(lead(h.old_value) over (partition by h.memory_id order by h.id), m.payload)
  end as new_value,
  h.user_id, h.changed_at as "timestamp", h.actor
from memharbor.memory_history h
left join memharbor.memories m on m.id = h.memory_id;
comment on view public.memory_history is
  'The audit trail with both images; the new one is the next one''s old one, or the memory as it is.';

-- ChatSG's three tables, for programs that read them: same names, same columns.
create or replace view public.mem0_history with ({{ views }}) as
select
  id, memory_id, user_id,
  case operation when 'create' then 'created' when 'update' then 'updated' else 'deleted' end as action,
  old_value ->> 'data' as previous_content,
  new_value ->> 'data' as new_content,
  coalesce(new_value, old_value) - '{data,hash,user_id,agent_id,run_id,created_at,updated_at,text_lemmatized}'::text[]
    as metadata,
  "timestamp" as created_at
from public.memory_history;
comment on view public.mem0_history is 'The audit trail as ChatSG''s table mem0_history has it.';
{% endif %}

create or replace view public.mem0_memories with ({{ views }}) as
select id, user_id, run_id as session_id, memory, embedding, metadata, created_at, updated_at
from memharbor.memories
where state = 'active' and (expires_at is null or expires_at > now());
comment on view public.mem0_memories is 'Active memories as ChatSG''s table mem0_memories has them; its session is Mem0''s run.';

create or replace view public.mem0_metadata with ({{ views }}) as
select
  hashtextextended(user_id, 0) as id, 'chatsg_memories'::text as collection_name, user_id,
  memory_count as total_memories, last_memory_at, '{}'::jsonb as metadata,
  first_memory_at as created_at, last_memory_at as updated_at
from memharbor.memory_stats;
comment on view public.mem0_metadata is 'Memories per user as ChatSG''s table mem0_metadata has them.';
