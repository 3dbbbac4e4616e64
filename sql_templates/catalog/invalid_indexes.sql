-- component: catalog
-- purpose: name the indexes of schema memharbor that an interrupted build left invalid
-- variables: none
-- runs as: administrator
-- safe to repeat: reads only
-- An index that another session is building now is invalid too, and is left out.
select c.relname
from pg_catalog.pg_index i
join pg_catalog.pg_class c on c.oid = i.indexrelid
where c.relnamespace = to_regnamespace('memharbor')
  and not i.indisvalid
  and not exists (select from pg_catalog.pg_stat_progress_create_index p where p.index_relid = i.indexrelid)
order by c.relname collate "C"
