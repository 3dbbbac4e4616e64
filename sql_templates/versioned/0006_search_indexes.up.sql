-- component: indexes
-- purpose: what every search of a user starts from, and keyword search
-- variables: none
-- runs as: owner
-- safe to repeat: builds only what is missing; an invalid index of an interrupted build is dropped before
-- transaction: no
-- Mem0's own expression: its filter, the policy and the condition of a user's own vector index are one and the same.
create index concurrently if not exists memories_payload_user_id on memharbor.memories ((payload ->> 'user_id'));
alter index memharbor.memories_payload_user_id alter column 1 set statistics 1000;
-- Listings of a user in order, and counts per user without reading the rows.
create index concurrently if not exists memories_user_id_created_at on memharbor.memories (user_id, created_at desc);
-- Mem0's keyword search, verbatim.
create index concurrently if not exists memories_text_lemmatized on memharbor.memories
  using gin (to_tsvector('simple', payload ->> 'text_lemmatized'));
create index concurrently if not exists entities_payload_user_id on memharbor.entities ((payload ->> 'user_id'));
create index concurrently if not exists entities_text_lemmatized on memharbor.entities
  using gin (to_tsvector('simple', payload ->> 'text_lemmatized'));
