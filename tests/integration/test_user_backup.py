"""One user: out of a live database and back, beside what others have, under another id, and never after an erasure."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from memharbor.backup.erasure import user_digest
from memharbor.backup.rows import differences
from tests.containers import Server
from tests.integration.test_logical_backup import Admin, admin, database, dsn, empty, ok, refused, state_of, template
from tests.memory_database import memory_database
from tests.schema_databases import admin_connection
from tests.user_rows import USERS, memory_id, populate, state, wipe

__all__ = ["admin", "database", "dsn", "empty", "template"]


def backup(dsn: str, user: str, folder: Path, *options: str) -> str:
    place: str = ok(dsn, "user", "backup", user, "--destination", str(folder), *options)["place"]
    return place


def restore(dsn: str, place: str, *options: str) -> Any:
    return ok(dsn, "user", "restore", place, "--yes", *options)


def of(user: str, everybody: Any) -> Any:
    return {key: value for key, value in everybody.items() if key[0] == user_digest(user)}


@pytest.mark.parametrize("user", USERS)
def test_a_user_who_was_wiped_comes_back_bit_for_bit_and_nobody_else_changes(
    dsn: str, admin: Admin, tmp_path: Path, user: str
) -> None:
    before = state(admin)
    vectors = "select id, embedding::text, updated_at, hash, payload::text from memharbor.memories order by id"
    rows = admin.execute(vectors).fetchall()
    place = backup(dsn, user, tmp_path)
    assert wipe(admin, user) > 60
    assert of(user, state(admin)) == {}
    foretold = restore(dsn, place, "--dry-run")
    assert of(user, state(admin)) == {}
    done = restore(dsn, place)
    assert done == {**foretold, "dry_run": False}
    assert differences(before, state(admin)) == []
    assert admin.execute(vectors).fetchall() == rows
    again = restore(dsn, place)
    assert (again["inserted"], again["same"]) == (0, done["inserted"] + done["same"])
    assert state(admin) == before


def test_halfvec_embeddings_of_3072_dimensions_come_back_bit_for_bit(server: Server, tmp_path: Path) -> None:
    name = memory_database(server, "user_backup_wide", 3072)
    dsn = server.admin_dsn(name)
    with closing(admin_connection(server, name)) as connection:
        populate(connection, 3072, ("alice", "bob"))
        before = state(connection)
        place = backup(dsn, "alice", tmp_path)
        wipe(connection, "alice")
        restore(dsn, place)
        assert differences(before, state(connection)) == []
        assert connection.execute(
            "select bool_or(embedding::text like '[-0,%') from memharbor.memories"
        ).fetchone() == (True,)


def test_one_user_comes_out_of_a_whole_backup(dsn: str, admin: Admin, tmp_path: Path) -> None:
    before = state(admin)
    place = ok(dsn, "backup", "create", "--type", "logical", "--destination", str(tmp_path))["place"]
    wipe(admin, "alice")
    wipe(admin, "bob")
    refused(2, "more than one user", dsn, "user", "restore", place, "--yes")
    refused(9, "no rows of this user", dsn, "user", "restore", place, "--yes", "--user", "nobody")
    restore(dsn, place, "--user", "alice")
    expected = {key: value for key, value in before.items() if key[0] != user_digest("bob")}
    assert differences(expected, state(admin), tables=["memories", "entities", "org_members", "memory_history"]) == []
    assert of("bob", state(admin)) == {}


def test_a_chain_of_one_user(dsn: str, admin: Admin, tmp_path: Path) -> None:
    backup(dsn, "alice", tmp_path)
    admin.execute("delete from memharbor.memories where id = %s", (memory_id("alice", 4),))
    admin.execute("delete from memharbor.memories where id = %s", (memory_id("bob", 4),))
    place = backup(dsn, "alice", tmp_path, "--since", "last")
    before = state(admin)
    wipe(admin, "alice")
    restore(dsn, place)
    assert differences(before, state(admin)) == []


# --- rows that are there already --------------------------------------------------------------------------------------


@pytest.fixture
def changed(dsn: str, admin: Admin, tmp_path: Path) -> str:
    """A backup of alice, who then changed one memory, lost one and wrote a new one."""
    place = backup(dsn, "alice", tmp_path)
    admin.execute(
        'update memharbor.memories set payload = payload || \'{"data": "changed"}\' where id = %s',
        (memory_id("alice", 6),),
    )
    admin.execute("delete from memharbor.memories where id = %s", (memory_id("alice", 8),))
    admin.execute('insert into public.memories (payload) values (\'{"user_id": "alice", "data": "new"}\')')
    return place


def text_of(admin: Admin, number: int) -> str | None:
    row = admin.execute("select memory from memharbor.memories where id = %s", (memory_id("alice", number),)).fetchone()
    return row[0] if row else None


def test_skip_keeps_what_is_there_and_brings_back_what_is_not(dsn: str, admin: Admin, changed: str) -> None:
    others = {key: value for key, value in state(admin).items() if key[0] != user_digest("alice")}
    done = restore(dsn, changed)
    assert done["tables"]["memories"] == {"inserted": 1, "overwritten": 0, "skipped": 1, "same": 10, "orphaned": 0}
    assert text_of(admin, 6) == "changed"
    assert text_of(admin, 8) is not None
    # The edges of the deleted memory went with it and came back with it.
    assert done["tables"]["memory_relationships"]["inserted"] == 2
    assert done["tables"]["memory_categories"]["inserted"] == 1
    after = {key: value for key, value in state(admin).items() if key[0] != user_digest("alice")}
    assert after == others


def test_overwrite_takes_the_backup_s_rows(dsn: str, admin: Admin, changed: str) -> None:
    done = restore(dsn, changed, "--on-conflict", "overwrite")
    assert done["tables"]["memories"] == {"inserted": 1, "overwritten": 1, "skipped": 0, "same": 10, "orphaned": 0}
    assert text_of(admin, 6) not in ("changed", None)
    assert admin.execute("select count(*) from memharbor.memories where user_id = 'alice'").fetchone() == (13,)


def test_new_id_keeps_both_and_says_it_once(dsn: str, admin: Admin, changed: str) -> None:
    foretold = restore(dsn, changed, "--on-conflict", "new-id", "--dry-run")
    done = restore(dsn, changed, "--on-conflict", "new-id")
    assert done == {**foretold, "dry_run": False}
    assert done["tables"]["memories"] == {"inserted": 2, "overwritten": 0, "skipped": 0, "same": 10, "orphaned": 0}
    assert text_of(admin, 6) == "changed"
    (copy,) = admin.execute(
        "select id, memory, payload ->> 'data' from memharbor.memories where user_id = 'alice'"
        " and not id = any (%s) and memory <> 'new'",
        ([memory_id("alice", number) for number in range(12)],),
    ).fetchall()
    assert copy[1] == copy[2] != "changed"
    edges = admin.execute(
        "select source_memory_id, target_memory_id from memharbor.memory_relationships where %s in (source_memory_id, target_memory_id)",
        (copy[0],),
    ).fetchall()
    assert sorted(edges) == sorted([(memory_id("alice", 5), copy[0]), (copy[0], memory_id("alice", 7))])
    kept = state(admin)
    assert restore(dsn, changed, "--on-conflict", "new-id")["inserted"] == 0
    assert state(admin) == kept


def test_a_row_that_is_somebody_else_s_by_now_is_never_taken(dsn: str, admin: Admin, tmp_path: Path) -> None:
    place = backup(dsn, "alice", tmp_path)
    wipe(admin, "alice")
    admin.execute(
        'insert into public.memories (id, payload) values (%s, \'{"user_id": "bob", "data": "mine"}\')',
        (memory_id("alice", 6),),
    )
    before = of("bob", state(admin))
    refused(9, "belong to other users", dsn, "user", "restore", place, "--yes", "--on-conflict", "overwrite")
    assert of("alice", state(admin)) == {}
    assert restore(dsn, place)["tables"]["memories"]["skipped"] == 1
    wipe(admin, "alice")
    assert restore(dsn, place, "--on-conflict", "new-id")["tables"]["memories"]["inserted"] == 12
    assert of("bob", state(admin)) == before


def link_to_bob(admin: Admin) -> None:
    """An edge of alice's to a memory of bob's, as only the service role can make one."""
    admin.execute(
        "insert into memharbor.memory_relationships (source_memory_id, target_memory_id, relationship_type, user_id)"
        " values (%s, %s, 'knows', 'alice')",
        (memory_id("alice", 1), memory_id("bob", 1)),
    )


def test_an_edge_to_what_is_not_there_any_more_is_left_out_and_counted(dsn: str, admin: Admin, tmp_path: Path) -> None:
    link_to_bob(admin)
    place = backup(dsn, "alice", tmp_path)
    before = of("alice", state(admin))
    wipe(admin, "alice")
    admin.execute("delete from memharbor.memories where id = %s", (memory_id("bob", 1),))
    foretold = restore(dsn, place, "--dry-run")
    done = restore(dsn, place)
    assert done["orphaned"] == foretold["orphaned"] == 1
    after = of("alice", state(admin))
    assert [line.split(":")[0].split(" of ")[0] for line in differences(before, after)] == ["memory_relationships"]


def test_what_is_deleted_while_it_is_referred_to_stops_the_merge(dsn: str, admin: Admin, tmp_path: Path) -> None:
    link_to_bob(admin)
    place = backup(dsn, "alice", tmp_path)
    wipe(admin, "alice")
    failures: list[str] = []

    def merge() -> None:
        refused(9, "were deleted while the backup was merged", dsn, "user", "restore", place, "--yes")
        failures.append("none")

    with closing(psycopg.connect(dsn)) as other:
        other.execute("delete from memharbor.memories where id = %s", (memory_id("bob", 1),))
        thread = threading.Thread(target=merge)
        thread.start()
        until = time.monotonic() + 30
        waiting = (
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        )
        while admin.execute(waiting).fetchone() == (0,):
            assert time.monotonic() < until, "the merge does not wait for the one who deletes"
        other.commit()
        thread.join(30)
    assert failures == ["none"]
    assert of("alice", state(admin)) == {}


# --- under another id -------------------------------------------------------------------------------------------------


def test_a_user_comes_in_under_a_new_id_beside_themselves(dsn: str, admin: Admin, tmp_path: Path) -> None:
    before = state(admin)
    place = backup(dsn, "alice", tmp_path)
    new = "o'neil \\ 🐘"
    done = restore(dsn, place, "--into", new)
    after = state(admin)
    # An edge of nobody between two memories of hers is an edge of nobody between their copies.
    assert differences(before, {key: value for key, value in after.items() if key[0] != user_digest(new)}) == [
        "memory_relationships of nobody: 7 rows instead of 6"
    ]
    assert {t: after[user_digest(new), t].rows for t in ("memories", "entities", "memory_history", "org_members")} == {
        t: before[user_digest("alice"), t].rows for t in ("memories", "entities", "memory_history", "org_members")
    }
    assert done["tables"]["memories"]["inserted"] == 12
    wrong = admin.execute(
        "select count(*) from memharbor.memories where user_id = %(new)s and payload ->> 'user_id' is distinct from %(new)s",
        {"new": new},
    ).fetchone()
    assert wrong == (0,)
    old = admin.execute(
        "select count(*) from memharbor.memory_history where user_id = %s and old_value ->> 'user_id' = 'alice'", (new,)
    ).fetchone()
    assert old == (0,)
    links = admin.execute(
        "select count(*), count(m.id) from memharbor.entities e"
        " cross join jsonb_array_elements_text(e.payload -> 'linked_memory_ids') as link(id)"
        " left join memharbor.memories m on m.id::text = link.id and m.user_id = %(new)s"
        " where e.payload ->> 'user_id' = %(new)s",
        {"new": new},
    ).fetchone()
    assert links == (6, 6)
    vectors = "select embedding::text from memharbor.memories where user_id = %s order by created_at"
    assert admin.execute(vectors, (new,)).fetchall() == admin.execute(vectors, ("alice",)).fetchall()
    assert restore(dsn, place, "--into", new)["inserted"] == 0
    refused(2, "cannot be a user's id", dsn, "user", "restore", place, "--yes", "--into", " x")


# --- erased -----------------------------------------------------------------------------------------------------------


def test_who_was_erased_since_does_not_come_back(dsn: str, admin: Admin, empty: str, tmp_path: Path) -> None:
    mine = backup(dsn, "alice", tmp_path)
    everybody = ok(dsn, "backup", "create", "--type", "logical", "--destination", str(tmp_path))["place"]
    wipe(admin, "alice")
    erased = "insert into memharbor.erase_ledger (user_id_sha256, erased_at) values (%s, now())"
    admin.execute(erased, (user_digest("alice"),))
    for options in ([], ["--into", "carol"], ["--dry-run"]):
        refused(9, "was erased after the backup", dsn, "user", "restore", mine, "--yes", *options)
    with closing(psycopg.connect(empty, autocommit=True)) as connection:
        connection.execute(erased, (user_digest("alice"),))
    done = ok(empty, "backup", "restore", everybody, "--yes")
    assert done["erased_users_left_out"] == 1
    assert of("alice", state_of(empty)) == {}
    assert of("bob", state_of(empty)) == of("bob", state(admin))


def test_who_came_back_after_an_erasure_can_be_restored(dsn: str, admin: Admin, tmp_path: Path) -> None:
    admin.execute(
        "insert into memharbor.erase_ledger (user_id_sha256, requested_at, erased_at) values (%s, now(), now())",
        (user_digest("alice"),),
    )
    place = backup(dsn, "alice", tmp_path)
    before = state(admin)
    wipe(admin, "alice")
    restore(dsn, place)
    assert differences(before, state(admin)) == []


# --- whoever the administrator is -------------------------------------------------------------------------------------


@pytest.fixture
def administrator(dsn: str, admin: Admin) -> Iterator[str]:
    """The DSN of an administrator who is no superuser, as managed services have it."""
    admin.execute("create role user_test_admin login password 'managed'")  # pragma: allowlist secret
    admin.execute("grant memharbor_owner, memharbor_service to user_test_admin with inherit true, set true")
    try:
        yield make_conninfo(dsn, user="user_test_admin", password="managed")  # pragma: allowlist secret
    finally:
        admin.execute("drop owned by user_test_admin cascade")
        admin.execute("drop role user_test_admin")


def test_an_administrator_who_is_no_superuser_restores_as_exactly(
    administrator: str, admin: Admin, tmp_path: Path, dsn: str
) -> None:
    before = state(admin)
    place = backup(administrator, "alice", tmp_path)
    wipe(admin, "alice")
    restore(administrator, place)
    assert differences(before, state(admin)) == []
    enabled = admin.execute(
        "select distinct tgenabled from pg_trigger where tgrelid = 'memharbor.memories'::regclass"
    ).fetchall()
    assert enabled == [("O",)]
    admin.execute("update memharbor.memories set embedding = null where id = %s", (memory_id("alice", 6),))
    assert restore(administrator, place, "--on-conflict", "overwrite")["overwritten"] == 1
    assert differences(before, state(admin)) == []


def test_a_broken_merge_changes_nothing(dsn: str, admin: Admin, tmp_path: Path) -> None:
    place = backup(dsn, "alice", tmp_path)
    wipe(admin, "alice")
    before = state(admin)
    # A constraint of the database's own that one row breaks, after others went in.
    admin.execute("alter table memharbor.org_members add constraint test_only check (user_id <> 'alice') not valid")
    refused(5, "test_only", dsn, "user", "restore", place, "--yes")
    assert state(admin) == before
    admin.execute("alter table memharbor.org_members drop constraint test_only")
    restore(dsn, place)


# --- show -------------------------------------------------------------------------------------------------------------


def test_what_there_is_of_a_user_is_shown(dsn: str, admin: Admin) -> None:
    shown = ok(dsn, "user", "show", USERS[2])
    assert shown["rows"] == {
        "memories": 12, "entities": 3, "memory_relationships": 11, "memory_categories": 11,
        "memory_history": 14, "org_members": 1,
    }  # fmt: skip
    assert shown["states"] == {"active": 11, "archived": 1}
    assert shown["first_memory_at"].startswith("2024-01-01T00:0")
    assert shown["size_bytes"] > 1000
    assert shown["vector_index"] is None
    assert shown["erased_at"] is None
    nobody = ok(dsn, "user", "show", str(uuid.uuid4()))
    assert set(nobody["rows"].values()) == {0}
    assert json.dumps(nobody["first_memory_at"]) == "null"
