-- component: indexes
-- purpose: how far a vector search looks, on the roles, because Mem0 never says it
-- variables: hnsw_ef_search, vector_schema
-- runs as: administrator
-- safe to repeat: sets each setting to one value
-- pgvector must be loaded: before that, only a superuser may set what begins with hnsw.
select '[1]'::{{ vector_schema | ident }}.vector;
{% for role in ['memharbor_app', 'memharbor_service', 'memharbor_readonly'] %}
alter role {{ role }} set hnsw.ef_search = {{ hnsw_ef_search }};
-- Where a filter removes candidates, look on until there are enough, in exact order.
alter role {{ role }} set hnsw.iterative_scan = 'strict_order';
{% endfor %}
