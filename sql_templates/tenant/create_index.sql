-- component: indexes
-- purpose: the vector index of one user who has many memories
-- variables: embedding_operator_class, hnsw_ef_construction, hnsw_m, index_name, user_id, vector_schema
-- runs as: owner
-- safe to repeat: builds only what is missing; an invalid index of an interrupted build is dropped before
-- transaction: no
create index concurrently if not exists {{ index_name | ident }} on memharbor.memories
  using hnsw (embedding {{ vector_schema | ident }}.{{ embedding_operator_class }})
  with (m = {{ hnsw_m }}, ef_construction = {{ hnsw_ef_construction }})
  where ((payload ->> 'user_id') = {{ user_id | literal }});
comment on index memharbor.{{ index_name | ident }} is {{ user_id | literal }};
