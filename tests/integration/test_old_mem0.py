"""
Tables that releases of Mem0 wrote by themselves, 0.1, 1.x and 2.x: read, migrated, adopted; and the way back.

Every release runs in its own environment, unmodified, against a real database. The old ones need the package index once:
`make soak` runs these.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from memharbor import schema
from memharbor.migrate.record import RawItem, pack_vector
from memharbor.migrate.sources.mem0_pgvector import Mem0PgvectorSource
from tests.command_line import ok
from tests.containers import Server
from tests.old_mem0 import OLD_RELEASES, environment, run_program
from tests.openai_stub import OpenAIStub
from tests.schema_databases import DIMS, admin_connection, scratch_database, settings_for
from tests.unmodified_mem0 import unmodified_mem0

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "upgrade-mem0.md"
RELEASES = (*OLD_RELEASES, "2.x")
USERS = ("anna", "ben", 'o\'brien-"日本"')
# Where each release keeps a collection `MyMem`: it was not quoted before 2.0.2.
TABLES = {"0.1.118": "mymem", "1.0.11": "mymem", "2.x": "MyMem"}
# What an instant looks like: 0.1 wrote the time of California, with its offset in winter or in summer.
OFFSETS = {"0.1.118": r"-0[78]:00", "1.0.11": r"\+00:00", "2.x": r"\+00:00"}

BEGIN = """
import json, os
from mem0 import Memory

memory = Memory.from_config(json.loads(os.environ["TEST_CONFIG"]))
users = json.loads(os.environ["TEST_USERS"])


def add(text, **ids):
    return memory.add([{"role": "user", "content": text}], infer=False, **ids)["results"][0]["id"]

"""

# The same in every release: memories of users, of an agent and a run, one changed, one deleted.
WRITE = (
    BEGIN
    + """
kept = {}
for user in users:
    for number in range(8):
        text = f"{user} went on journey {number}"
        metadata = {"number": number, "é東": [1.5, None, {"a": True}]}
        kept[add(text, user_id=user, metadata=metadata)] = text
kept[add("an agent's own", agent_id="guide", run_id="run-1", user_id=users[0])] = "an agent's own"
memory.delete(add("to be forgotten", user_id=users[0]))
changed = next(iter(kept))
memory.update(changed, data="changed afterwards")
kept[changed] = "changed afterwards"
if hasattr(memory, "_upsert_entity"):  # what 2.x does with spaCy
    for user in users:
        memory._upsert_entity(f"Zubin of {user}", "PROPER", list(kept)[-1], {"user_id": user})
print(json.dumps(kept))
"""
)


def run(release: str, program: str, dsn: str, folder: Path, *, collection: str = "mem0") -> Any:
    """Run a program of a release on a database; returns what its last line says."""
    config = {
        "vector_store": {
            "provider": "pgvector",
            "config": {"connection_string": dsn, "collection_name": collection, "embedding_model_dims": DIMS},
        },
        "embedder": {
            "provider": "openai",
            "config": {"model": "text-embedding-3-small", "embedding_dims": DIMS},
        },
        "llm": {"provider": "openai", "config": {"model": "stub"}},
        "history_db_path": str(folder / f"history-{release}.db"),
    }
    python = sys.executable if release == "2.x" else environment(release)
    with OpenAIStub(DIMS) as stub:
        done = run_program(
            python,
            program,
            folder / f"program-{release}",
            stub.base_url,
            TEST_CONFIG=json.dumps(config),
            TEST_USERS=json.dumps(USERS),
        )
    return json.loads(done.splitlines()[-1])


def rows(server: Server, name: str, table: str) -> dict[str, tuple[str, Any]]:
    """Read a collection: the bits of each vector, and the payload."""
    with closing(admin_connection(server, name)) as connection:
        found = connection.execute(
            f"select id::text, encode(vector_send(vector), 'hex'), payload from public.\"{table}\"".encode()
        ).fetchall()
    return {key: (bits, payload) for key, bits, payload in found}


@pytest.fixture
def stock(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A database with pgvector and nothing of ours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MEMHARBOR_EMBEDDING_DIMS", str(DIMS))
    with scratch_database(server, rolled_out=False) as name:
        with closing(admin_connection(server, name)) as connection:
            connection.execute("create extension vector")
        yield name


def check_written(release: str, written: dict[str, str], found: dict[str, tuple[str, Any]]) -> None:
    """See that the release wrote what this test is about."""
    assert {key: payload["data"] for key, (_, payload) in found.items()} == written
    for _, payload in found.values():
        times = [payload[name] for name in ("created_at", "updated_at") if payload.get(name)]
        assert times
        assert all(re.fullmatch(rf"\d{{4}}-.*{OFFSETS[release]}", each) for each in times), payload
        assert ("text_lemmatized" in payload) is (release == "2.x")


def check_carried(server: Server, name: str, source: dict[str, tuple[str, Any]], table: str = "mem0") -> None:
    """See that every row came along: its id, the bits of its vector, and all that its payload had, times as written."""
    carried = rows(server, name, table)
    assert set(carried) == set(source)
    for key, (bits, payload) in source.items():
        assert carried[key][0] == bits
        assert {field: carried[key][1].get(field) for field in payload} == payload


def check_usable(server: Server, name: str, written: dict[str, str]) -> None:
    """See that the present release finds all of it through the pool, by words too, each user their own."""
    with unmodified_mem0("app", server.pool_dsn(name, "app"), dims=DIMS) as memories:
        shown = {}
        for user in USERS:
            memory = memories.of(user)
            for each in memory.get_all(filters={"user_id": user}, top_k=100)["results"]:
                shown[each["id"]] = each["memory"]
            found = memory.search(f"{user} went on journey 5", filters={"user_id": user}, explain=True)["results"]
            assert found[0]["memory"] == f"{user} went on journey 5"
            assert found[0]["score_details"]["bm25_score"] > 0, found[0]
        assert shown == written


@pytest.mark.parametrize("release", RELEASES)
def test_what_a_release_wrote_is_carried_into_another_database(
    server: Server, stock: str, release: str, tmp_path: Path
) -> None:
    dsn = server.admin_dsn(stock)
    written = run(release, WRITE, dsn, tmp_path, collection="MyMem")
    table = TABLES[release]
    source = rows(server, stock, table)
    check_written(release, written, source)
    items = [item for item in Mem0PgvectorSource(dsn, "MyMem").read() if isinstance(item, RawItem)]
    read = {item.source_id: (pack_vector(item.vector), item.data) for item in items if item.kind == "memory"}
    assert {key: payload for key, (_, payload) in read.items()} == {
        key: payload for key, (_, payload) in source.items()
    }
    entities = rows(server, stock, f"{table}_entities") if release == "2.x" else {}
    assert len(entities) == sum(item.kind == "entity" for item in items) == (len(USERS) if entities else 0)
    with scratch_database(server) as target:
        ours = server.admin_dsn(target)
        run_it = ("migrate", "run", "--from", "mem0-pgvector", "--collection", "MyMem")
        done = ok(ours, *run_it, MEMHARBOR_SOURCE_DSN=dsn)
        assert (done["inserted"], done["refused"]) == (len(written) + len(entities), 0)
        check_carried(server, target, source)
        check_carried(server, target, entities, "mem0_entities")
        compared = ok(ours, "migrate", "compare")
        assert (compared["missing"], compared["different"]) == (0, 0)
        again = ok(ours, *run_it, MEMHARBOR_SOURCE_DSN=dsn)
        assert (again["same"], again["inserted"], again["updated"]) == (len(written) + len(entities), 0, 0)
        check_usable(server, target, written)
    assert rows(server, stock, table) == source


@pytest.mark.parametrize("release", RELEASES)
def test_what_a_release_wrote_is_adopted_in_its_own_database(
    server: Server, stock: str, release: str, tmp_path: Path
) -> None:
    dsn = server.admin_dsn(stock)
    written = run(release, WRITE, dsn, tmp_path)
    with closing(admin_connection(server, stock)) as connection:
        connection.execute("alter table mem0 rename to mem0_old")
        connection.execute("alter table if exists mem0_entities rename to mem0_old_entities")
        schema.apply(connection, settings_for(stock))
    source = rows(server, stock, "mem0_old")
    check_written(release, written, source)
    entities = rows(server, stock, "mem0_old_entities") if release == "2.x" else {}
    done = ok(dsn, "migrate", "run", "--from", "mem0-pgvector", "--collection", "mem0_old", MEMHARBOR_SOURCE_DSN=dsn)
    assert (done["inserted"], done["refused"]) == (len(written) + len(entities), 0)
    check_carried(server, stock, source)
    check_carried(server, stock, entities, "mem0_entities")
    assert ok(dsn, "migrate", "compare")["different"] == 0
    check_usable(server, stock, written)
    assert rows(server, stock, "mem0_old") == source


@pytest.mark.parametrize("release", OLD_RELEASES)
def test_an_id_that_the_present_release_refuses_gets_another_one(
    server: Server, stock: str, release: str, tmp_path: Path
) -> None:
    dsn = server.admin_dsn(stock)
    key = run(release, BEGIN + 'print(json.dumps(add("likes tea", user_id="Anna Maria")))', dsn, tmp_path)
    names = tmp_path / "names.csv"
    names.write_text("Anna Maria,anna-maria\n")
    with scratch_database(server) as target:
        ours = server.admin_dsn(target)
        options = ("--from", "mem0-pgvector", "--remap-users", str(names))
        assert ok(ours, "migrate", "run", *options, MEMHARBOR_SOURCE_DSN=dsn)["inserted"] == 1
        with unmodified_mem0("app", server.pool_dsn(target, "app"), dims=DIMS) as memories:
            memory = memories.of("anna-maria")
            with pytest.raises(ValueError, match="whitespace"):
                memory.get_all(filters={"user_id": "Anna Maria"})
            (found,) = memory.get_all(filters={"user_id": "anna-maria"})["results"]
            assert (found["id"], found["memory"]) == (key, "likes tea")


# The way back: calls as they were before 2.x, on what 2.x wrote.
READ_AS_BEFORE = (
    BEGIN
    + """
shown = {}
for user in users:
    for each in memory.get_all(user_id=user, limit=100)["results"]:
        shown[each["id"]] = [each["memory"], each["metadata"]]
        assert memory.get(each["id"])["memory"] == each["memory"]
    found = memory.search(f"{user} went on journey 5", user_id=user, limit=3)["results"]
    assert found[0]["memory"] == f"{user} went on journey 5", found
    assert found[0]["score"] < 1e-6, "a distance"
    near = memory.search(f"{user} went on journey 5", user_id=user, limit=100, threshold=0.7)["results"]
    assert found[0]["id"] not in [each["id"] for each in near], "what is nearest is dropped"
mine = add("written after the way back", user_id=users[0])
memory.update(mine, data="written and changed")
assert memory.get(mine)["memory"] == "written and changed"
memory.delete(mine)
assert memory.get(mine) is None
print(json.dumps(shown))
"""
)


def prepare_the_way_back(server: Server, name: str, release: str, dsn: str, folder: Path) -> None:
    """Make the table that 0.1 does not start without, as the page says; the schema is what it was."""
    if release.startswith("0.1."):
        with pytest.raises(AssertionError, match=r"permission denied.*\n.*mem0migrations"):
            run(release, BEGIN, dsn, folder)
    (statements,) = re.findall(r"^psql -c '(create table mem0migrations .*)'$", PAGE.read_text(), re.MULTILINE)
    with closing(admin_connection(server, name)) as connection:
        found = schema.verify(connection, settings_for(name))  # something: it is a copy of a database
        connection.execute(statements.replace("vector(1536)", f"vector({DIMS})").encode())
        assert schema.verify(connection, settings_for(name)) == found


@pytest.mark.parametrize("rolled_out", [False, True], ids=["stock", "memharbor"])
@pytest.mark.parametrize("release", OLD_RELEASES)
def test_old_releases_read_what_the_present_one_wrote(
    server: Server, release: str, tmp_path: Path, rolled_out: bool
) -> None:
    with scratch_database(server, rolled_out=rolled_out) as name:
        if not rolled_out:
            with closing(admin_connection(server, name)) as connection:
                connection.execute("create extension vector")
        dsn = server.pool_dsn(name, "service") if rolled_out else server.admin_dsn(name)
        written = run("2.x", WRITE, dsn, tmp_path)
        before = rows(server, name, "mem0"), rows(server, name, "mem0_entities")
        if rolled_out:
            prepare_the_way_back(server, name, release, dsn, tmp_path)
        shown = run(release, READ_AS_BEFORE, dsn, tmp_path)
        assert {key: text for key, (text, _) in shown.items()} == written
        assert all(metadata["text_lemmatized"] for _, metadata in shown.values())
        assert (rows(server, name, "mem0"), rows(server, name, "mem0_entities")) == before
