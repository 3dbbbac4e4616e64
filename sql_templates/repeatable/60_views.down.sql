-- component: tables
-- purpose: take back: the contract: what Mem0, applications and older programs see in schema public
-- variables: none
-- runs as: owner
-- safe to repeat: takes back only what is there
drop view if exists public.mem0_metadata;
drop view if exists public.mem0_memories;
drop view if exists public.mem0_history;
drop view if exists public.memory_history;
drop view if exists public.memory_relationships;
drop view if exists memharbor.memory_stats;
drop view if exists public.memories_entities;
drop view if exists public.mem0_entities;
drop view if exists public.mem0;
drop view if exists public.memories;
