-- component: indexes
-- purpose: raise when a role searches with other settings
-- variables: hnsw_ef_search
-- runs as: administrator
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{% for role in ['memharbor_app', 'memharbor_service', 'memharbor_readonly'] %}
{{ require(
  "select setconfig @> array['hnsw.ef_search=" ~ hnsw_ef_search ~ "', 'hnsw.iterative_scan=strict_order'] from pg_catalog.pg_db_role_setting where setrole = to_regrole('" ~ role ~ "') and setdatabase = 0",
  role ~ " lacks hnsw.ef_search or hnsw.iterative_scan"
) }}
{% endfor %}
