-- component: tables
-- purpose: load many memories without the index of keyword search, which is built again when they are there
-- variables: none
-- runs as: owner
-- safe to repeat: yes
drop index if exists memharbor.memories_text_lemmatized;
