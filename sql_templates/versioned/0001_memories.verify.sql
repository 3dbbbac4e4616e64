-- component: tables
-- purpose: raise when a table is missing or its embeddings have other dimensions or another storage
-- variables: embedding_dims, embedding_storage, embedding_type
-- runs as: owner
-- safe to repeat: reads only
{% from "macros.sql" import require, require_table %}
{{ require_table("memories") }}
{{ require_table("entities") }}
{% for table, column in [('memories', 'embedding'), ('entities', 'vector')] %}
{{ require(
  "select t.typname = '" ~ embedding_type ~ "' and a.atttypmod = " ~ embedding_dims ~ " and a.attstorage = '" ~ embedding_storage[0] ~ "' from pg_catalog.pg_attribute a join pg_catalog.pg_type t on t.oid = a.atttypid where a.attrelid = to_regclass('memharbor." ~ table ~ "') and a.attname = '" ~ column ~ "'",
  "memharbor." ~ table ~ "." ~ column ~ " is not " ~ embedding_type ~ "(" ~ embedding_dims ~ ") with storage " ~ embedding_storage
) }}
{% endfor %}
