-- component: tables
-- purpose: the script inside a logical backup by which psql reads it into a schema of its own
-- variables: tables
-- runs as: administrator
-- safe to repeat: rows of the same key are replaced; for incremental backups it runs once a link, in order
-- Run it in the backup's folder, with psql and zstd (and age, where files end in .age) on this machine:
--   psql --no-psqlrc --set=ON_ERROR_STOP=1 --file=read.sql "$DATABASE_URL"
begin;
create extension if not exists vector;
create schema if not exists restored;
{% for table in tables %}

create table if not exists restored.{{ table.name | ident }} (
{% for column, type in table.columns %}
  {{ column | ident }} {{ type }},
{% endfor %}
  primary key ({{ table.key | map("ident") | join(", ") }})
);
create temporary table incoming (like restored.{{ table.name | ident }});
\copy incoming from program {{ table.rows_command | literal }} with (format binary)
delete from restored.{{ table.name | ident }} old using incoming
where ({% for column in table.key %}old.{{ column | ident }}{{ ", " if not loop.last }}{% endfor %}) = ({% for column in table.key %}incoming.{{ column | ident }}{{ ", " if not loop.last }}{% endfor %});
insert into restored.{{ table.name | ident }} select * from incoming;
drop table incoming;
{% if table.gone_command %}
create temporary table gone as select {{ table.key | map("ident") | join(", ") }} from restored.{{ table.name | ident }} with no data;
\copy gone from program {{ table.gone_command | literal }} with (format binary)
delete from restored.{{ table.name | ident }} old using gone
where ({% for column in table.key %}old.{{ column | ident }}{{ ", " if not loop.last }}{% endfor %}) = ({% for column in table.key %}gone.{{ column | ident }}{{ ", " if not loop.last }}{% endfor %});
drop table gone;
{% endif %}
{% endfor %}
commit;
