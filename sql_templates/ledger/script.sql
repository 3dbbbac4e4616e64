-- component: ledger
-- purpose: the whole schema as one script for psql, which keeps the ledger as Memharbor does
-- variables: embedding_dims, foundations, include_graph, include_history, owner, steps
-- runs as: administrator
-- safe to repeat: a step whose text is applied is passed over
-- Memharbor's schema: {{ embedding_dims }} dimensions, {{ 'with' if include_graph else 'without' }} graph, {{ 'with' if include_history else 'without' }} history.
-- Run it in the database as its administrator: psql --file=this-file "$DATABASE_URL". It may run twice.
-- Roles have no passwords yet: give them one each with \password, for instance \password memharbor_app
\set ON_ERROR_STOP on
set client_min_messages = warning;
set search_path = '';
{% for foundation in foundations %}

begin;
{% if foundation.runs_as == 'owner' %}
set local role {{ owner | ident }};
{% endif %}
{{ foundation.sql }}commit;
{% endfor %}
{% for step in steps %}

-- {{ step.source }}
select coalesce(
  (
    select direction <> 'up' or checksum <> {{ step.checksum | literal }}
    from memharbor.schema_migrations where name = {{ step.name | literal }} order by id desc limit 1
  ),
  true
) as pending \gset
\if :pending
{% if step.transactional %}
begin;
{% if step.runs_as == 'owner' %}
set local role {{ owner | ident }};
{% endif %}
{{ step.sql }}set local role {{ owner | ident }};
{% else %}
set role {{ owner | ident }};
{{ step.sql }}begin;
{% endif %}
insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)
values (
  {{ step.name | literal }}, {{ step.component | literal }}, {{ step.kind | literal }}, 'up',
  {{ step.checksum | literal }}, 0
);
commit;
{% if not step.transactional %}
reset role;
{% endif %}
\endif
{% endfor %}
