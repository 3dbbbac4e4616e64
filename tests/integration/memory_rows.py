"""Rows of users in every table, for the tests of checkpoints and erasures."""

from __future__ import annotations

from memharbor.backup.rows import DatabaseRows, Fingerprint, fingerprint
from memharbor.database import Connection
from tests.schema_databases import DIMS


def insert_user(connection: Connection, user: str, *, memories: int = 30, word: str = "fact") -> None:
    """Insert memories with a history, entities, relationships, categories and a membership of one user."""
    connection.execute(
        """
        insert into memharbor.memories (embedding, payload)
        select (select array_agg((random() - 0.5)::real) from generate_series(1, %(dims)s) d where n > 0)::public.vector,
          jsonb_build_object('user_id', %(user)s::text, 'data', %(word)s || ' ' || n, 'text_lemmatized', %(word)s || n)
        from generate_series(1, %(memories)s) n
        """,
        {"dims": DIMS, "user": user, "word": word, "memories": memories},
    )
    connection.execute(
        "update memharbor.memories set payload = payload || jsonb_build_object('data', %s || ' changed')"
        " where user_id = %s and memory like '%% 1'",
        (word, user),
    )
    connection.execute(
        "insert into memharbor.entities (id, payload) select gen_random_uuid(), jsonb_build_object('user_id', %s::text,"
        " 'data', %s::text, 'text_lemmatized', %s || n) from generate_series(1, 4) n",
        (user, word, word),
    )
    connection.execute(
        """
        insert into memharbor.memory_relationships (source_memory_id, target_memory_id, relationship_type, metadata, user_id)
        select a.id, b.id, 'related', jsonb_build_object('word', %(word)s::text), %(user)s
        from (select id from memharbor.memories where user_id = %(user)s order by id limit 3) a,
          (select id from memharbor.memories where user_id = %(user)s order by id offset 3 limit 2) b
        """,
        {"word": word, "user": user},
    )
    connection.execute("insert into memharbor.categories (name) values ('work'), ('home') on conflict do nothing")
    connection.execute(
        "insert into memharbor.memory_categories select m.id, c.id, m.user_id from memharbor.memories m,"
        " memharbor.categories c where m.user_id = %s and m.memory like '%% 2%%'",
        (user,),
    )
    connection.execute("insert into memharbor.org_members values ('acme', %s)", (user,))


def fingerprints(connection: Connection) -> dict[tuple[str, str], Fingerprint]:
    return fingerprint(DatabaseRows(connection))
