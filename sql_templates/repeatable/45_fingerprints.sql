-- component: tables
-- purpose: fingerprints of every user's rows, by which backups, drills, checkpoints and restores are compared
-- variables: embedding_type, include_graph, include_history, vector_schema
-- runs as: owner
-- safe to repeat: replaces the function
-- The bits of an embedding are those that its binary form sends; everything else is the row's text. Rows count as a set:
-- their order, their place and the numbers of the audit trail's rows mean nothing. The caller sees what its role sees:
-- all rows as superuser, memharbor_backup or memharbor_service. Users are named by a digest, so that a record of
-- fingerprints survives an erasure. About 15 microseconds a row of 384 dimensions.
create or replace function memharbor.fingerprint_users()
returns table (user_sha256 text, table_name text, row_count bigint, fingerprint text)
language sql stable
set search_path = ''
set timezone = 'UTC'
set datestyle = 'ISO, MDY'
set extra_float_digits = 1
set bytea_output = 'hex'
as $function$
  with hashed (table_name, owner, digest) as (
    select 'memories', user_id, sha256(
      convert_to(row(
        id, payload, user_id, agent_id, run_id, org_id, created_at, updated_at, memory, hash, metadata, categories,
        state, expires_at, archived_at, deleted_at
      )::text, 'UTF8')
      || coalesce({{ vector_schema | ident }}.{{ embedding_type }}_send(embedding), '')
    )
    from memharbor.memories
    union all
    select 'entities', payload ->> 'user_id', sha256(
      convert_to(row(id, payload)::text, 'UTF8')
      || coalesce({{ vector_schema | ident }}.{{ embedding_type }}_send(vector), '')
    )
    from memharbor.entities
{% if include_graph %}
    union all
    select 'memory_relationships', user_id, sha256(convert_to(r::text, 'UTF8')) from memharbor.memory_relationships r
{% endif %}
    union all
    select 'memory_categories', user_id, sha256(convert_to(c::text, 'UTF8')) from memharbor.memory_categories c
{% if include_history %}
    union all
    select 'memory_history', user_id, sha256(
      convert_to(row(memory_id, user_id, operation, old_value, old_state, actor, changed_at)::text, 'UTF8')
    )
    from memharbor.memory_history
{% endif %}
    union all
    select 'org_members', user_id, sha256(convert_to(o::text, 'UTF8')) from memharbor.org_members o
    union all
    select 'categories', null, sha256(convert_to(c::text, 'UTF8')) from memharbor.categories c
    union all
    select 'configs', null, sha256(convert_to(c::text, 'UTF8')) from memharbor.configs c
  )
  select
    coalesce(encode(sha256(convert_to(owner, 'UTF8')), 'hex'), ''), table_name, count(*),
    encode(sha256(string_agg(digest, '' order by digest)), 'hex')
  from hashed
  group by owner, table_name
$function$;
comment on function memharbor.fingerprint_users() is
  'One row per user and table: how many rows and a digest of them; the user as SHA-256, empty for rows of nobody.';
