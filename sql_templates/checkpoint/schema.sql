-- component: tables
-- purpose: the private schema of checkpoints: what each one is, and what every user's rows were then
-- variables: owner
-- runs as: administrator
-- safe to repeat: creates only what is missing
-- Not a part of the schema that is rolled out: it comes with the first checkpoint, and no application may look into it.
create schema if not exists memharbor_checkpoint authorization {{ owner | ident }};
revoke all on schema memharbor_checkpoint from public;
create table if not exists memharbor_checkpoint.checkpoints (
  number bigint generated always as identity,
  name text not null,
  record jsonb not null,
  catalog jsonb not null,
  constraint checkpoints_pkey primary key (number),
  constraint checkpoints_name_key unique (name)
);
create table if not exists memharbor_checkpoint.fingerprints (
  number bigint not null,
  user_sha256 text not null,
  table_name text not null,
  row_count bigint not null,
  fingerprint text not null,
  constraint fingerprints_pkey primary key (number, user_sha256, table_name),
  constraint fingerprints_number_fkey foreign key (number)
    references memharbor_checkpoint.checkpoints (number) on delete cascade
);
alter table memharbor_checkpoint.checkpoints owner to {{ owner | ident }};
alter table memharbor_checkpoint.fingerprints owner to {{ owner | ident }};
alter table memharbor_checkpoint.checkpoints enable row level security;
alter table memharbor_checkpoint.fingerprints enable row level security;
