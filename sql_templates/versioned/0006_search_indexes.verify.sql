-- component: indexes
-- purpose: raise when an index is missing or invalid
-- variables: none
-- runs as: owner
-- safe to repeat: reads only
{% from "macros.sql" import require %}
{% for index in [
  'memories_payload_user_id', 'memories_user_id_created_at', 'memories_text_lemmatized',
  'entities_payload_user_id', 'entities_text_lemmatized'
] %}
{{ require(
  "select indisvalid from pg_catalog.pg_index where indexrelid = to_regclass('memharbor." ~ index ~ "')",
  "index memharbor." ~ index ~ " is missing or invalid"
) }}
{% endfor %}
