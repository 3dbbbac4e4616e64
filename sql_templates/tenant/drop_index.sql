-- component: indexes
-- purpose: drop one index without making writers wait
-- variables: index_name
-- runs as: owner
-- safe to repeat: does nothing where the index is gone
-- transaction: no
drop index concurrently if exists memharbor.{{ index_name | ident }};
