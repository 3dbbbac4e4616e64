"""
Row level security: a battery of isolation checks, and the proof that the battery can fail.

Every check runs in one superuser session that acts as a role and is rolled back. For each policy, row security flag, view
option and guard there is a mutation that removes or weakens it; at least one check must then fail.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing

import psycopg
import pytest

from memharbor import schema
from memharbor.database import Connection, run_statement
from tests.memory_database import Server
from tests.schema_databases import DIMS, acting, admin_connection, apply_roles, drop_database, settings_for

VECTOR = "[" + ",".join(["1"] * DIMS) + "]"
ALICE, BOB = uuid.UUID(int=0xA), uuid.UUID(int=0xB)
ALICE_2, BOB_2 = uuid.UUID(int=0xA2), uuid.UUID(int=0xB2)
CATEGORY = uuid.UUID(int=0xC)

# What an application reads, and how a row there says whose it is.
READABLE = {
    "public.memories": "payload ->> 'user_id'",
    "public.mem0": "payload ->> 'user_id'",
    "public.mem0_entities": "payload ->> 'user_id'",
    "public.memories_entities": "payload ->> 'user_id'",
    "public.mem0_memories": "user_id",
    "public.mem0_history": "user_id",
    "public.mem0_metadata": "user_id",
    "public.memory_history": "user_id",
    "public.memory_relationships": "user_id",
    "memharbor.memories": "user_id",
    "memharbor.entities": "payload ->> 'user_id'",
    "memharbor.memory_history": "user_id",
    "memharbor.memory_relationships": "user_id",
    "memharbor.memory_categories": "user_id",
    "memharbor.memory_stats": "user_id",
    "memharbor.org_members": "user_id",
}
TABLES = (
    "memories", "entities", "memory_history", "memory_relationships", "categories", "memory_categories", "configs",
    "org_members", "erase_ledger", "migration_ledger", "schema_migrations", "schema_state",
)  # fmt: skip
ALL = "select insert update delete"
# Everything that a role may do to a table or view; what is not here is refused.
PRIVILEGES: dict[str, dict[str, str]] = {
    "app": {
        **dict.fromkeys(
            ("memharbor.memories", "memharbor.entities", "memharbor.memory_relationships",
             "memharbor.memory_categories", "public.memories", "public.mem0", "public.mem0_entities",
             "public.memories_entities", "public.memory_relationships", "public.mem0_memories"), ALL),
        **dict.fromkeys(
            ("memharbor.memory_history", "memharbor.categories", "memharbor.org_members", "memharbor.memory_stats",
             "public.memory_history", "public.mem0_history", "public.mem0_metadata"), "select"),
    },
    "service": {
        **dict.fromkeys(
            ("memharbor.memories", "memharbor.entities", "memharbor.memory_relationships",
             "memharbor.memory_categories", "public.memories", "public.mem0", "public.mem0_entities",
             "public.memories_entities", "public.memory_relationships", "public.mem0_memories",
             "memharbor.categories", "memharbor.configs", "memharbor.org_members", "memharbor.migration_ledger"), ALL),
        **dict.fromkeys(
            ("memharbor.memory_history", "memharbor.memory_stats", "public.memory_history", "public.mem0_history",
             "public.mem0_metadata", "memharbor.schema_migrations", "memharbor.schema_state"), "select"),
        "memharbor.erase_ledger": "select insert update",
    },
    "readonly": dict.fromkeys(
        (*READABLE, "memharbor.categories", "memharbor.migration_ledger", "memharbor.schema_migrations"), "select"
    ),
    "backup": dict.fromkeys((*READABLE, *(f"memharbor.{table}" for table in TABLES)), "select"),
    "pooler": {},
    "replicator": {},
    "rewind": {},
}  # fmt: skip

Check = Callable[[Connection], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def one(connection: Connection, query: str, *parameters: object) -> object:
    row = connection.execute(query, parameters).fetchone()
    return None if row is None else row[0]


def refused(connection: Connection, statement: str, *parameters: object, state: str = "42501") -> None:
    """Demand that a statement fails with a state: 42501 is a missing right, also that of a policy."""
    with pytest.raises(psycopg.Error) as caught, connection.transaction(force_rollback=True):
        connection.execute(statement, parameters)
    assert caught.value.sqlstate == state, f"{statement}: {caught.value}"


def changed_rows(connection: Connection, statement: str, *parameters: object) -> int:
    with connection.transaction(force_rollback=True):
        return connection.execute(statement, parameters).rowcount


# --- who sees what ---------------------------------------------------------------------------------------------------


def reads_only_own(relation: str, owner: str) -> Check:
    def run(connection: Connection) -> None:
        for user in ("alice", "bob"):
            with acting(connection, "app", user):
                assert one(connection, f"select count(*) from {relation}") != 0
                assert (
                    one(connection, f"select count(*) from {relation} where ({owner}) is distinct from %s", user) == 0
                )

    return run


def shows_nobody_nothing(relation: str) -> Check:
    def run(connection: Connection) -> None:
        for user in (None, "", "mallory"):
            with acting(connection, "app", user):
                assert one(connection, f"select count(*) from {relation}") == 0

    return run


def shows_all(relation: str, owner: str, role: str) -> Check:
    def run(connection: Connection) -> None:
        with connection.transaction(force_rollback=True):
            # Where only a superuser could give BYPASSRLS, the policy alone must do.
            connection.execute("alter role memharbor_backup nobypassrls")
            with acting(connection, role):
                found = one(connection, f"select array_agg(distinct {owner} order by {owner}) from {relation}")
            assert {"alice", "bob"} <= set(found or []), (relation, role, found)  # type: ignore[call-overload]

    return run


for _relation, _owner in READABLE.items():
    CHECKS[f"{_relation} shows each user only their own"] = reads_only_own(_relation, _owner)
    CHECKS[f"{_relation} shows nobody nothing"] = shows_nobody_nothing(_relation)
    for _role in ("service", "readonly", "backup"):
        CHECKS[f"{_relation} shows {_role} everything"] = shows_all(_relation, _owner, _role)
for _table in ("categories", "configs", "erase_ledger", "migration_ledger", "schema_migrations", "schema_state"):
    for _role in ("service", "readonly", "backup"):
        if "select" in PRIVILEGES[_role].get(f"memharbor.{_table}", ""):

            def _reads(connection: Connection, table: str = _table, role: str = _role) -> None:
                with connection.transaction(force_rollback=True):
                    connection.execute("alter role memharbor_backup nobypassrls")
                    with acting(connection, role):
                        assert one(connection, f"select count(*) from memharbor.{table}") != 0

            CHECKS[f"memharbor.{_table} shows {_role} everything"] = _reads


@check
def categories_are_shared(connection: Connection) -> None:
    for user in (None, "alice"):
        with acting(connection, "app", user):
            assert one(connection, "select count(*) from memharbor.categories") == 1


@check
def an_unfiltered_join_stays_within_the_user(connection: Connection) -> None:
    with acting(connection, "app", "alice"):
        found = connection.execute(
            "select m.payload ->> 'user_id', r.user_id, h.user_id from public.memories m"
            " full join public.memory_relationships r on true full join public.memory_history h on true"
        ).fetchall()
    assert {user for row in found for user in row} == {"alice"}


@check
def the_owner_without_an_identity_sees_nothing(connection: Connection) -> None:
    for table in TABLES:
        if not table.startswith("schema_"):
            with acting(connection, "owner"):
                assert one(connection, f"select count(*) from memharbor.{table}") == 0, table


@check
def the_owner_keeps_the_ledger(connection: Connection) -> None:
    with acting(connection, "owner"):
        assert one(connection, "select count(*) from memharbor.schema_migrations") != 0
        assert one(connection, "select count(*) from memharbor.schema_state") == 1
        assert changed_rows(connection, "update memharbor.schema_state set recorded_at = now()") == 1
        assert changed_rows(
            connection,
            "insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)"
            " values ('x', 'tables', 'versioned', 'up', 'x', 0)",
        )


@check
def related_memories_stay_within_the_user(connection: Connection) -> None:
    with acting(connection, "app", "bob"):
        assert one(connection, "select count(*) from memharbor.related_memories(%s)", ALICE) == 0
    with acting(connection, "app", "alice"):
        assert one(connection, "select id from memharbor.related_memories(%s)", ALICE) == ALICE_2


@check
def jwt_claims_say_who_is_asking_and_app_user_id_wins(connection: Connection) -> None:
    for claims, user, expected in (
        ('{"sub": "alice"}', None, "alice"),
        ('{"sub": "alice"}', "", "alice"),
        ('{"sub": "bob"}', "alice", "alice"),
        ('{"sub": ""}', None, None),
        ('{"role": "anon"}', None, None),
        ("", None, None),
    ):
        with acting(connection, "app", user):
            connection.execute("select set_config('request.jwt.claims', %s, true)", (claims,))
            assert one(connection, "select memharbor.current_user_id()") == expected, (claims, user)
            assert one(connection, "select count(*) from public.mem0") == (2 if expected else 0), (claims, user)


@check
def empty_is_nobody(connection: Connection) -> None:
    with acting(connection, "app", ""):
        assert one(connection, "select memharbor.current_user_id() is null")


# --- who writes what -------------------------------------------------------------------------------------------------

PAYLOAD = "jsonb_build_object('data', 'x', 'user_id', %s::text)"
INSERTS = {
    "memories by payload": f"insert into public.mem0 values (gen_random_uuid(), null, {PAYLOAD})",
    "memories by column": "insert into public.memories (memory, user_id) values ('x', %s)",
    "memories by ChatSG": "insert into public.mem0_memories (memory, user_id) values ('x', %s)",
    "entities": f"insert into public.mem0_entities values (gen_random_uuid(), null, {PAYLOAD})",
}
UPDATES = {
    "memories": "update public.memories set agent_id = 'x' where id = %s",
    "mem0": "update public.mem0 set payload = payload || '{\"x\": 1}' where id = %s",
    "entities": "update public.mem0_entities set payload = payload || '{\"x\": 1}' where id = %s",
    "relationships": "update public.memory_relationships set strength = 0 where id = %s",
    "categories of a memory": "update memharbor.memory_categories set category_id = category_id where memory_id = %s",
}
DELETES = {
    "mem0": "delete from public.mem0 where id = %s",
    "entities": "delete from public.mem0_entities where id = %s",
    "relationships": "delete from public.memory_relationships where id = %s",
    "categories of a memory": "delete from memharbor.memory_categories where memory_id = %s",
}
MOVES = {
    "memories by payload": 'update public.mem0 set payload = payload || \'{"user_id": "bob"}\' where id = %s',
    "memories by column": "update public.memories set user_id = 'bob' where id = %s",
    "entities": 'update public.mem0_entities set payload = payload || \'{"user_id": "bob"}\' where id = %s',
    "relationships": "update public.memory_relationships set user_id = 'bob' where id = %s",
    "categories of a memory": "update memharbor.memory_categories set user_id = 'bob' where memory_id = %s",
}


@check
def each_user_writes_their_own(connection: Connection) -> None:
    with acting(connection, "app", "alice"):
        for statement in INSERTS.values():
            assert changed_rows(connection, statement, "alice") == 1, statement
        for statement in (*UPDATES.values(), *DELETES.values()):
            assert changed_rows(connection, statement, ALICE) == 1, statement
        assert changed_rows(connection, RELATE, ALICE, ALICE_2) == 1
        assert changed_rows(connection, CATEGORIZE, ALICE_2) == 1


def inserts_for_another_are_refused(name: str) -> Check:
    def run(connection: Connection) -> None:
        for user, other in ((None, "alice"), ("", "alice"), ("alice", "bob"), ("alice", None)):
            with acting(connection, "app", user):
                refused(connection, INSERTS[name], other)

    return run


for _name in INSERTS:
    CHECKS[f"inserting {_name} for another is refused"] = inserts_for_another_are_refused(_name)


@check
def changing_and_deleting_what_is_anothers_hits_nothing(connection: Connection) -> None:
    for user in (None, "", "alice"):
        with acting(connection, "app", user):
            for statement in (*UPDATES.values(), *DELETES.values()):
                assert changed_rows(connection, statement, BOB) == 0, (user, statement)


@check
def deleting_everything_deletes_ones_own(connection: Connection) -> None:
    with acting(connection, "app", "alice"):
        assert changed_rows(connection, "delete from public.memories") == 2
        assert changed_rows(connection, "update public.mem0 set payload = payload") == 2


def moves_are_refused(name: str) -> Check:
    def run(connection: Connection) -> None:
        with acting(connection, "app", "alice"):
            refused(connection, MOVES[name], ALICE)

    return run


for _name in MOVES:
    CHECKS[f"moving {_name} to another is refused"] = moves_are_refused(_name)


@check
def an_upsert_over_anothers_memory_is_refused(connection: Connection) -> None:
    with acting(connection, "app", "alice"):
        refused(
            connection,
            "insert into public.memories (id, memory, user_id) values (%s, 'x', 'alice')"
            " on conflict (id) do update set memory = excluded.memory",
            BOB,
        )


RELATE = (
    "insert into public.memory_relationships (source_memory_id, target_memory_id, relationship_type)"
    " values (%s, %s, 'related_to')"
)
CATEGORIZE = f"insert into memharbor.memory_categories (memory_id, category_id) values (%s, '{CATEGORY}')"


@check
def a_relationship_to_anothers_memory_is_refused_like_one_to_none(connection: Connection) -> None:
    for foreign in (BOB, uuid.UUID(int=0xDEAD)):
        with acting(connection, "app", "alice"):
            refused(connection, RELATE, ALICE, foreign)
            refused(connection, RELATE, foreign, ALICE)
            refused(connection, "update public.memory_relationships set target_memory_id = %s", foreign)


@check
def a_relationship_in_anothers_name_is_refused(connection: Connection) -> None:
    statement = RELATE.replace("relationship_type)", "relationship_type, user_id)").replace(
        "'related_to')", "'x', 'bob')"
    )
    with acting(connection, "app", "alice"):
        refused(connection, statement, ALICE, ALICE_2)


@check
def a_category_for_anothers_memory_is_refused(connection: Connection) -> None:
    with acting(connection, "app", "alice"):
        refused(connection, CATEGORIZE, BOB_2)
        refused(connection, CATEGORIZE, uuid.UUID(int=0xDEAD))


@check
def a_category_in_anothers_name_is_refused(connection: Connection) -> None:
    statement = CATEGORIZE.replace("category_id)", "category_id, user_id)").replace("')", "', 'bob')")
    with acting(connection, "app", "alice"):
        refused(connection, statement, ALICE_2)


@check
def a_memory_keeps_its_id(connection: Connection) -> None:
    with acting(connection, "app", "alice"):
        refused(connection, "update public.memories set id = gen_random_uuid()", state="23000")


@check
def service_writes_for_everyone(connection: Connection) -> None:
    with acting(connection, "service"):
        for user in ("alice", "bob", None):
            for statement in INSERTS.values():
                assert changed_rows(connection, statement, user) == 1, (user, statement)
        for statement in (*UPDATES.values(), *DELETES.values()):
            for identifier in (ALICE, BOB):
                assert changed_rows(connection, statement, identifier) == 1, statement
        assert changed_rows(connection, RELATE, ALICE, BOB) == 1
        assert changed_rows(connection, CATEGORIZE, ALICE_2) == 1


@check
def nobody_stores_for_the_empty_user(connection: Connection) -> None:
    with acting(connection, "service"):
        for statement in INSERTS.values():
            refused(connection, statement, "", state="23514")
        for statement in ("update memharbor.memory_relationships set user_id = ''",
                          "update memharbor.memory_categories set user_id = ''",
                          "update memharbor.org_members set user_id = ''"):  # fmt: skip
            refused(connection, statement, state="23514")


@check
def service_keeps_the_shared_tables(connection: Connection) -> None:
    with acting(connection, "service"):
        for statement in (
            "insert into memharbor.categories (name) values ('x')",
            "update memharbor.categories set name = 'x'",
            "delete from memharbor.categories",
            "insert into memharbor.configs (key, value) values ('x', '1')",
            "update memharbor.configs set value = '1'",
            "delete from memharbor.configs",
            "insert into memharbor.org_members (org_id, user_id) values ('o', 'carol')",
            "update memharbor.org_members set role = 'admin' where user_id = 'bob'",
            "delete from memharbor.org_members where user_id = 'bob'",
            "insert into memharbor.erase_ledger (user_id_sha256) values (repeat('0', 64))",
            "update memharbor.erase_ledger set erased_at = now()",
            "insert into memharbor.migration_ledger (run_id, step, source) values (gen_random_uuid(), 'x', 'x')",
            "update memharbor.migration_ledger set state = 'done'",
            "delete from memharbor.migration_ledger",
        ):
            assert changed_rows(connection, statement) == 1, statement
        refused(connection, "delete from memharbor.erase_ledger")


@check
def the_history_is_written_for_those_who_cannot_write_it(connection: Connection) -> None:
    count = "select count(*) from memharbor.memory_history where memory_id = %s"
    for role, user in (("app", "alice"), ("service", None)):
        with acting(connection, role, user):
            before = one(connection, count, ALICE)
            connection.execute(UPDATES["mem0"], (ALICE,))
            connection.execute(DELETES["mem0"], (ALICE,))
            assert one(connection, count, ALICE) == before + 2  # type: ignore[operator]
            connection.execute(INSERTS["memories by column"], ("alice",))
            assert one(connection, "select count(*) from memharbor.memory_history where memory_id not in (%s, %s, %s, %s)",
                       ALICE, ALICE_2, BOB, BOB_2) == 1  # fmt: skip
            refused(connection, "insert into memharbor.memory_history (memory_id, operation, actor)"
                                " values (gen_random_uuid(), 'create', 'x')")  # fmt: skip


@check
def a_shadow_in_another_schema_does_not_catch_the_history(connection: Connection) -> None:
    with connection.transaction(force_rollback=True):
        connection.execute("create schema trap; create function trap.session_user() returns text language sql"
                           " as 'select ''mallory'''; grant usage on schema trap to public")  # fmt: skip
        connection.execute("create table trap.memories (like memharbor.memories)")
        with acting(connection, "app", "alice"):
            connection.execute("set local search_path = trap, memharbor, public")
            connection.execute(INSERTS["memories by column"], ("alice",))
    settings = "select proconfig from pg_proc where oid = 'memharbor.record_history()'::regprocedure and prosecdef"
    assert one(connection, settings) == ['search_path=""']


@check
def privileges_are_exactly_the_reviewed_ones(connection: Connection) -> None:
    rows = connection.execute(
        "select r.role, n.nspname || '.' || c.relname, array_agg(k.kind)"
        " from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " cross join unnest(%s::text[]) r (role)"
        " cross join unnest('{select,insert,update,delete,truncate,references,trigger}'::text[]) k (kind)"
        " where c.relkind in ('r', 'v')"
        " and (n.nspname = 'memharbor' or pg_get_userbyid(c.relowner) = 'memharbor_owner')"
        " and has_table_privilege('memharbor_' || r.role, c.oid, k.kind) group by 1, 2",
        (list(PRIVILEGES),),
    ).fetchall()
    held = {(role, relation): set(kinds) for role, relation, kinds in rows}
    reviewed = {
        (role, relation): set(kinds.split()) for role in PRIVILEGES for relation, kinds in PRIVILEGES[role].items()
    }
    assert held == reviewed


@check
def functions_are_callable_by_those_who_need_them(connection: Connection) -> None:
    callable_by = {
        "memharbor.current_user_id()": {"app", "service", "readonly"},
        "memharbor.related_memories(uuid, integer)": {"app", "service", "readonly"},
        "memharbor.sync_memory()": set(),
        "memharbor.record_history()": set(),
        "memharbor_pooler.lookup(text)": {"pooler"},
    }
    for function, expected in callable_by.items():
        held = {
            role
            for role in PRIVILEGES
            if one(connection, "select has_function_privilege(%s, %s, 'execute')", f"memharbor_{role}", function)
        }
        assert held == expected, (function, held)


@check
def the_pooler_learns_no_login_that_goes_around_row_security(connection: Connection) -> None:
    with acting(connection, "pooler"):
        assert one(connection, "select count(*) from memharbor_pooler.lookup('memharbor_app')") == 1
        for login in ("postgres", "memharbor_replicator"):
            assert one(connection, "select count(*) from memharbor_pooler.lookup(%s)", login) == 0, login


@check
def a_privilege_given_by_mistake_shows_and_changes_nothing(connection: Connection) -> None:
    with connection.transaction(force_rollback=True):
        connection.execute("grant all on all tables in schema memharbor to memharbor_app, memharbor_readonly")
        for table in ("configs", "erase_ledger", "migration_ledger", "schema_migrations", "schema_state"):
            with acting(connection, "app", "alice"):
                assert one(connection, f"select count(*) from memharbor.{table}") == 0, table
                assert changed_rows(connection, f"delete from memharbor.{table}") == 0, table
        for table in ("configs", "erase_ledger", "schema_state"):
            with acting(connection, "readonly"):
                assert one(connection, f"select count(*) from memharbor.{table}") == 0, table


@check
def no_application_makes_objects(connection: Connection) -> None:
    for role in PRIVILEGES:
        with acting(connection, role):
            refused(connection, "create table public.x (id int)")
            refused(connection, "create temporary table x (id int)")
            assert one(connection, "select has_schema_privilege('public', 'create')") is False


@check
def no_role_owns_or_bypasses(connection: Connection) -> None:
    bypassing = one(
        connection,
        "select array_agg(rolname::text) from pg_roles where rolname like 'memharbor\\_%%' and (rolsuper or rolbypassrls)",
    )
    assert bypassing == ["memharbor_backup"]
    owners = one(
        connection,
        "select array_agg(distinct pg_get_userbyid(relowner)::text) from pg_class"
        " where relnamespace = 'memharbor'::regnamespace",
    )
    assert owners == ["memharbor_owner"]


# --- the battery and its mutations -----------------------------------------------------------------------------------


def fill(connection: Connection) -> None:
    """Two users who each have memories, an entity, a relationship, a category, a membership; and the shared rows."""
    connection.execute("insert into memharbor.categories (id, name) values (%s, 'drinks')", (CATEGORY,))
    for user, first, second in (("alice", ALICE, ALICE_2), ("bob", BOB, BOB_2)):
        payload = f'{{"data": "secret of {user}", "user_id": "{user}"}}'
        for identifier in (first, second):
            connection.execute("insert into public.mem0 values (%s, %s, %s)", (identifier, VECTOR, payload))
        connection.execute("insert into public.mem0_entities values (%s, %s, %s)", (first, VECTOR, payload))
        connection.execute(
            "insert into memharbor.memory_relationships values (%s, %s, %s, 'related_to', 0.5, '{}', %s)",
            (first, first, second, user),
        )
        connection.execute("insert into memharbor.memory_categories values (%s, %s, %s)", (first, CATEGORY, user))
        connection.execute("insert into memharbor.org_members (org_id, user_id) values ('org', %s)", (user,))
    connection.execute("insert into memharbor.configs (key, value) values ('secret', '1')")
    connection.execute("insert into memharbor.erase_ledger (user_id_sha256) values (repeat('a', 64))")
    connection.execute(
        "insert into memharbor.migration_ledger (run_id, step, source) values (gen_random_uuid(), 'a', 'b')"
    )


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[Connection]:
    name = "schema_rls"
    settings = settings_for(name)
    apply_roles(server)
    drop_database(server, name)
    with closing(admin_connection(server)) as maintenance:
        schema.ensure_database(maintenance, settings)
    with closing(admin_connection(server, name)) as opened:
        schema.apply(opened, settings)
        fill(opened)
        yield opened
    drop_database(server, name)


def fails(connection: Connection, name: str) -> bool:
    try:
        with connection.transaction(force_rollback=True):
            CHECKS[name](connection)
    except (AssertionError, pytest.fail.Exception, psycopg.Error):
        return True
    return False


@pytest.mark.parametrize("name", CHECKS)
def test_isolation(connection: Connection, name: str) -> None:
    with connection.transaction(force_rollback=True):
        CHECKS[name](connection)


POLICIES = """
select tablename, policyname, cmd, qual, with_check, roles::text[] from pg_policies where schemaname = 'memharbor' order by 1, 2
"""


def policy_mutations(connection: Connection) -> dict[str, str]:
    mutations = {}
    for table, policy, command, using, with_check, roles in connection.execute(POLICIES).fetchall():
        where = f"policy {policy} on memharbor.{table}"
        mutations[f"drop {where} to {roles}"] = f"drop {where}"
        if using not in (None, "true"):
            mutations[f"weaken using of {where}"] = f"alter {where} using (true)"
            mutations[f"forget who asks in using of {where}"] = (
                f"alter {where} using ({using.replace('memharbor.current_user_id()', chr(39) + 'alice' + chr(39))})"
            )
        if with_check not in (None, "true"):
            mutations[f"weaken check of {where}"] = f"alter {where} with check (true)"
        if using is not None and command in ("ALL", "SELECT") and using == "true" and roles != ["memharbor_app"]:
            mutations[f"give {where} to everybody"] = f"alter {where} to public"
    return mutations


def guard_mutations() -> dict[str, str]:
    mutations = {}
    for table in TABLES:
        mutations[f"row security of {table}"] = f"alter table memharbor.{table} disable row level security"
        if not table.startswith("schema_"):
            mutations[f"force of {table}"] = f"alter table memharbor.{table} no force row level security"
        for privilege in ("select", "insert", "update", "delete", "truncate"):
            if privilege not in PRIVILEGES["app"].get(f"memharbor.{table}", ""):
                mutations[f"{privilege} on {table}"] = f"grant {privilege} on memharbor.{table} to memharbor_app"
    for view in READABLE:
        # The views on these two are security_invoker too, and ask for the rights of who asks whatever stands above them.
        stacked = view in ("public.mem0_history", "public.mem0_metadata")
        if not stacked and (view.startswith("public.") or view == "memharbor.memory_stats"):
            mutations[f"invoker of {view}"] = f"alter view {view} set (security_invoker = false)"
    for table, constraint in (
        ("memories", "memories_user_id_check"),
        ("entities", "entities_user_id_check"),
        ("memory_relationships", "memory_relationships_user_id_check"),
        ("memory_categories", "memory_categories_user_id_check"),
        ("org_members", "org_members_ids_check"),
    ):
        mutations[f"constraint {constraint}"] = f"alter table memharbor.{table} drop constraint {constraint}"
    for trigger in ("sync", "history_insert", "history_update", "history_delete"):
        mutations[f"trigger {trigger}"] = f"drop trigger {trigger} on memharbor.memories"
    for end in ("source", "target"):
        mutations[f"the {end} of a relationship"] = (
            "alter policy isolate on memharbor.memory_relationships with check (user_id = memharbor.current_user_id()"
            f" and exists (select from memharbor.memories m where m.id = {'target' if end == 'source' else 'source'}_memory_id))"
        )
    function = "create or replace function memharbor.current_user_id() returns text language sql stable as"
    return mutations | {
        "the memory of a category": "alter policy isolate on memharbor.memory_categories"
        " with check (user_id = memharbor.current_user_id())",
        "the name in a relationship": "alter policy isolate on memharbor.memory_relationships with check ("
        "exists (select from memharbor.memories m where m.id = source_memory_id)"
        " and exists (select from memharbor.memories m where m.id = target_memory_id))",
        "the name in a category": "alter policy isolate on memharbor.memory_categories with check ("
        "exists (select from memharbor.memories m where m.id = memory_id))",
        "the empty identity": f"{function} $$ select current_setting('app.user_id', true) $$",
        "the empty claim": f"{function} $$ select coalesce(nullif(current_setting('app.user_id', true), ''),"
        " nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub') $$",
        "the order of identities": f"{function} $$ select coalesce(nullif(nullif(current_setting('request.jwt.claims',"
        " true), '')::jsonb ->> 'sub', ''), nullif(current_setting('app.user_id', true), '')) $$",
        "the definer of the history": "alter function memharbor.record_history() security invoker",
        "the search path of the history": "alter function memharbor.record_history() reset search_path",
        "a definer of the graph's walk": "alter function memharbor.related_memories(uuid, integer) security definer;"
        " alter function memharbor.related_memories(uuid, integer) owner to postgres;"
        " grant execute on function memharbor.related_memories(uuid, integer) to memharbor_app",
        "the pooler's lookup for all": "grant execute on function memharbor_pooler.lookup(text) to public",
        "the pooler's lookup of superusers": "create or replace function memharbor_pooler.lookup(p_user text)"
        " returns table (username text, secret text) language sql stable security definer as"
        " $$ select rolname::text, rolpassword from pg_authid where rolname = p_user $$",
        "bypass": "alter role memharbor_app bypassrls",
        "ownership": "alter table memharbor.memories owner to memharbor_app",
        "membership in the owner": "grant memharbor_owner to memharbor_app",
        "membership in the service": "grant memharbor_service to memharbor_app",
        "create in public": "grant create on schema public to public",
        "temporary tables": "do $$ begin execute format('grant temporary on database %I to public', current_database());"
        " end $$",
        "execution by everybody": "grant execute on function memharbor.record_history() to public",
    }


def test_the_battery_notices_every_policy_that_is_removed_or_weakened(connection: Connection) -> None:
    mutations = policy_mutations(connection)
    assert len(mutations) > 60
    assert survivors(connection, mutations) == []


def test_the_battery_notices_every_flag_view_and_guard_that_is_removed_or_weakened(connection: Connection) -> None:
    assert survivors(connection, guard_mutations()) == []


def survivors(connection: Connection, mutations: dict[str, str]) -> list[str]:
    survived = []
    order = list(CHECKS)  # what noticed one mutation often notices the next
    for name, statement in mutations.items():
        words = set(re.findall("[a-z]+", name)) - {"memharbor", "on", "of", "policy"}
        order.sort(key=lambda check_name: -len(words & set(re.findall("[a-z]+", check_name))))
        with connection.transaction(force_rollback=True):
            run_statement(connection, statement)
            noticed = next((check_name for check_name in order if fails(connection, check_name)), None)
        if noticed is None:
            survived.append(name)
        else:
            order.remove(noticed)
            order.insert(0, noticed)
    return survived


def test_every_table_of_the_schema_is_in_the_battery(connection: Connection) -> None:
    found = {row[0] for row in connection.execute(
        "select relname from pg_class where relnamespace = 'memharbor'::regnamespace and relkind = 'r'"
    ).fetchall()}  # fmt: skip
    assert found == set(TABLES)
