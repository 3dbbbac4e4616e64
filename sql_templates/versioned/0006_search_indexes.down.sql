-- component: indexes
-- purpose: take back: what every search of a user starts from, and keyword search
-- variables: none
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
drop index if exists memharbor.entities_text_lemmatized;
drop index if exists memharbor.entities_payload_user_id;
drop index if exists memharbor.memories_text_lemmatized;
drop index if exists memharbor.memories_user_id_created_at;
drop index if exists memharbor.memories_payload_user_id;
