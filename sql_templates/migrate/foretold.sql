-- component: tables
-- purpose: the memories that a rehearsal would have inserted by now, for what refers to them in a later segment
-- variables: role
-- runs as: administrator
-- safe to repeat: creates only what is missing; temporary, gone with the session
create temporary table if not exists foretold_memories (id uuid not null, constraint foretold_memories_pkey primary key (id));
grant select on foretold_memories to {{ role | ident }};
