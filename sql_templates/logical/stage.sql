-- component: tables
-- purpose: a temporary table with columns of one of ours, for rows that are compared before they count
-- variables: columns, name, table, with_digest, with_verdict
-- runs as: administrator
-- safe to repeat: temporary, gone at the end of the transaction
create temporary table {{ name | ident }} on commit drop as
select
  {{ columns | map("ident") | join(", ") }}
{% if with_digest %}
  , null::bytea as digest
{% endif %}
{% if with_verdict %}
  , null::text as verdict
{% endif %}
from memharbor.{{ table | ident }}
with no data;
