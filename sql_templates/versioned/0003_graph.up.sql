-- component: tables
-- purpose: typed, weighted relationships between memories
-- variables: none
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
-- feature: graph
create table memharbor.memory_relationships (
  id uuid not null default gen_random_uuid(),
  source_memory_id uuid not null,
  target_memory_id uuid not null,
  relationship_type text not null,
  strength numeric not null default 1.0,
  metadata jsonb not null default '{}',
  user_id text,
  created_at timestamptz not null default now(),
  constraint memory_relationships_pkey primary key (id),
  constraint memory_relationships_source_fkey foreign key (source_memory_id)
    references memharbor.memories (id) on delete cascade,
  constraint memory_relationships_target_fkey foreign key (target_memory_id)
    references memharbor.memories (id) on delete cascade,
  constraint memory_relationships_type_check check (relationship_type <> ''),
  constraint memory_relationships_strength_check check (strength between 0 and 1),
  constraint memory_relationships_user_id_check check (user_id <> '')
);
create index memory_relationships_source on memharbor.memory_relationships (source_memory_id);
create index memory_relationships_target on memharbor.memory_relationships (target_memory_id);
create index memory_relationships_type on memharbor.memory_relationships (relationship_type);
create index memory_relationships_user_id on memharbor.memory_relationships (user_id);
comment on table memharbor.memory_relationships is
  'Edges of the memory graph; both ends belong to the user of the edge.';
