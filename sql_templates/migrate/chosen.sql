-- component: tables
-- purpose: the ids that a person chose of the rows to embed
-- variables: role
-- runs as: administrator
-- safe to repeat: creates only what is missing; temporary, gone with the session
create temporary table if not exists chosen_ids (id uuid not null, constraint chosen_ids_pkey primary key (id));
grant select on chosen_ids to {{ role | ident }};
