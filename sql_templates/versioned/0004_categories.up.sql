-- component: tables
-- purpose: categories that all users share, and which memory is in which
-- variables: none
-- runs as: owner
-- safe to repeat: versioned, the ledger runs it once
create table memharbor.categories (
  id uuid not null default gen_random_uuid(),
  name text not null,
  description text,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  constraint categories_pkey primary key (id),
  constraint categories_name_key unique (name)
);
comment on table memharbor.categories is 'Shared by all users; applications read them, the service role keeps them.';

create table memharbor.memory_categories (
  memory_id uuid not null,
  category_id uuid not null,
  user_id text,
  constraint memory_categories_pkey primary key (memory_id, category_id),
  constraint memory_categories_memory_fkey foreign key (memory_id)
    references memharbor.memories (id) on delete cascade,
  constraint memory_categories_category_fkey foreign key (category_id)
    references memharbor.categories (id) on delete cascade,
  constraint memory_categories_user_id_check check (user_id <> '')
);
create index memory_categories_category on memharbor.memory_categories (category_id);
create index memory_categories_user_id on memharbor.memory_categories (user_id);
comment on table memharbor.memory_categories is 'Which memory is in which category; user_id is the memory''s, for its policy.';
