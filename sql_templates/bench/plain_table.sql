-- component: tables
-- purpose: a table without indexes and triggers, to compare a load with
-- variables: embedding_dims, vector_schema
-- runs as: administrator
-- safe to repeat: temporary, gone with the session
create temporary table if not exists bench_plain (
  id uuid,
  embedding {{ vector_schema | ident }}.vector({{ embedding_dims }}),
  payload jsonb
);
