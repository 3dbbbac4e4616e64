-- component: tables
-- purpose: copy rows of a table aside, for a checkpoint
-- variables: condition, copy, owner, table
-- runs as: administrator
-- safe to repeat: fails where the copy is there
create table memharbor_checkpoint.{{ copy | ident }} as
select * from memharbor.{{ table | ident }} where {{ condition }};
alter table memharbor_checkpoint.{{ copy | ident }} owner to {{ owner | ident }};
alter table memharbor_checkpoint.{{ copy | ident }} enable row level security;
