-- component: policies
-- purpose: let the owner of the tables past row level security, or not any more, inside one transaction
-- variables: forced, tables
-- runs as: owner
-- safe to repeat: states how it is
-- For an administrator who is no superuser and has no BYPASSRLS. Nobody else sees the state in between.
{% for table in tables %}
alter table {{ table }} {{ 'force' if forced else 'no force' }} row level security;
{% endfor %}
