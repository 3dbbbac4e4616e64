"""The pipeline of a migration into a real database: judged, merged, never lost, never doubled."""

from __future__ import annotations

import hashlib
import random
import shutil
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from memharbor.database import Connection
from memharbor.errors import StateRefusedError, VerificationError
from memharbor.migrate.embedding.model import EmbeddingRefusal
from memharbor.migrate.load import Loader, OnConflict
from memharbor.migrate.pipeline import Pipeline, Plan, Report
from memharbor.migrate.record import NAMESPACE, RawItem, Refusal, SourceInfo, pack_vector
from memharbor.migrate.transform import Choice
from memharbor.migrate.workfolder import WorkFolder
from memharbor.output import Output
from memharbor.settings import Settings
from tests.memory_database import Server
from tests.schema_databases import DIMS, admin_connection, scratch_database

SETTINGS = Settings(embedding_dims=DIMS)
TEXTS = "select id, user_id, agent_id, run_id, md5(memory) from memharbor.memories where state = 'active'"
Rows = dict[str, tuple[Any, ...]]


class ListSource:
    """A source that is a list; its position is the number of items that were read."""

    def __init__(self, items: list[RawItem | Refusal]) -> None:
        self.items = items

    def describe(self) -> SourceInfo:
        return SourceInfo("list", hashlib.sha256(repr(self.items).encode()).hexdigest())

    def read(self, after: str | None = None) -> Iterator[RawItem | Refusal]:
        yield from self.items[int(after or 0) :]


def vector(seed: str, dims: int = DIMS) -> tuple[float, ...]:
    draw = random.Random(seed)
    return tuple(draw.uniform(-1, 1) for _ in range(dims))


def memory(number: int, user: str = "alice", /, **fields: Any) -> RawItem:
    """The number also says where it stands in its list."""
    source_id = fields.pop("source_id", str(uuid.uuid5(NAMESPACE, f"test {number}")))
    embedding = fields.pop("vector", vector(str(number)))
    data = {
        "data": f"fact {number}",
        "user_id": user,
        "created_at": f"2025-01-01T00:00:{number % 60:02}-08:00",
        "weight": number / 3,
        **fields,
    }
    return RawItem("memory", source_id, data, str(number), embedding)


def many(count: int, *, begin: int = 1) -> list[RawItem | Refusal]:
    return [memory(number, f"user {number % 7}") for number in range(begin, begin + count)]


@pytest.fixture
def database(server: Server) -> Iterator[Connection]:
    with scratch_database(server) as name, closing(admin_connection(server, name)) as connection:
        yield connection


class Runner:
    """Runs migrations of lists into one database."""

    def __init__(self, connection: Connection, folder: Path) -> None:
        self.connection, self._folder = connection, folder
        self._count = 0

    def begin(
        self, items: list[RawItem | Refusal], *, on_conflict: OnConflict = "skip", dry_run: bool = False, **options: Any
    ) -> tuple[Pipeline, Loader, WorkFolder]:
        self._count += 1
        folder = WorkFolder(self._folder / str(self._count))
        source = ListSource(items)
        folder.begin({"source": {"identity": source.describe().identity}})
        choice = Choice(dims=DIMS, **options.pop("choice", {}))
        plan = Plan(source, source.describe(), choice, batch_size=options.pop("batch_size", 10), **options)
        loader = Loader(self.connection, SETTINGS, uuid.uuid4(), "list", on_conflict)
        return Pipeline(folder, plan, Output()), loader, folder

    def run(self, items: list[RawItem | Refusal], *, dry_run: bool = False, **options: Any) -> Report:
        pipeline, loader, _ = self.begin(items, **options)
        pipeline.run("verify", loader, self.texts, dry_run=dry_run)
        return pipeline.report()

    def texts(self) -> Iterator[Any]:
        yield from self.connection.execute(TEXTS).fetchall()

    def rows(self) -> Rows:
        found = self.connection.execute(
            "select id::text, user_id, payload, state, encode(vector_send(embedding), 'hex') from memharbor.memories"
        ).fetchall()
        return {row[0]: tuple(row[1:]) for row in found}


@pytest.fixture
def runner(database: Connection, tmp_path: Path) -> Runner:
    return Runner(database, tmp_path)


def counts(report: Report) -> dict[str, int]:
    return {name: count for name, count in report.as_data().items() if name != "reasons" and count}


def both(runner: Runner, items: list[RawItem | Refusal], **options: Any) -> dict[str, int]:
    """Foretell a run, do it, and hold the two equal."""
    before = runner.rows()
    foretold = runner.run(items, dry_run=True, **options)
    assert runner.rows() == before, "a dry run wrote something"
    done = runner.run(items, **options)
    assert done.as_data() == foretold.as_data()
    return counts(done)


def test_what_comes_in_is_what_was_there_to_the_bit_and_comes_in_once(runner: Runner) -> None:
    items = many(35)
    assert both(runner, items) == {"read": 35, "inserted": 35}
    rows = runner.rows()
    for item in items:
        assert isinstance(item, RawItem)
        user, payload, state, bits = rows[item.source_id]
        assert (user, payload["data"], state) == (item.data["user_id"], item.data["data"], "active")
        assert payload["created_at"] == item.data["created_at"], "an instant with an offset stays as it was written"
        assert payload["weight"] == item.data["weight"]
        expected = runner.connection.execute(
            "select encode(vector_send(%s::real[]::vector), 'hex')", (list(item.vector or ()),)
        ).fetchone()
        assert expected == (bits,)
    trail = runner.connection.execute("select operation, count(*) from memharbor.memory_history group by 1").fetchall()
    assert trail == [("create", 35)], "the audit trail is on"
    assert both(runner, items) == {"read": 35, "same": 35}
    assert runner.rows() == rows


@pytest.mark.parametrize(
    ("on_conflict", "expected"),
    [
        ("skip", {"read": 4, "same": 1, "skipped": 2, "inserted": 1}),
        ("overwrite", {"read": 4, "same": 1, "updated": 1, "inserted": 1, "refused": 1}),
        ("new-id", {"read": 4, "same": 1, "inserted": 3}),
    ],
)
def test_an_id_that_is_taken(runner: Runner, on_conflict: OnConflict, expected: dict[str, int]) -> None:
    runner.run([memory(1), memory(2), memory(3)])
    before = runner.rows()
    foreign = memory(3, "mallory", data="not alice's")
    items: list[RawItem | Refusal] = [memory(1), memory(2, data="changed"), foreign, memory(4)]
    assert both(runner, items, on_conflict=on_conflict) == expected
    rows = runner.rows()
    assert rows[foreign.source_id] == before[foreign.source_id], "another user's row is never overwritten"
    changed = rows[memory(2).source_id][1]["data"]
    assert changed == ("changed" if on_conflict == "overwrite" else "fact 2")
    # Whatever was chosen: the same run again changes nothing.
    again = both(runner, items, on_conflict=on_conflict)
    assert not {"inserted", "updated"} & again.keys()
    assert runner.rows() == rows


def test_the_same_text_of_the_same_owner_is_one_memory_and_of_another_owner_is_another(runner: Runner) -> None:
    runner.run([memory(1, data="likes tea")])
    items: list[RawItem | Refusal] = [
        memory(2, data="likes tea"),
        memory(3, "bob", data="likes tea"),
        memory(4, data="likes tea", run_id="r1"),
        memory(5, "bob", data="likes tea"),
        memory(6, data="likes coffee"),
    ]
    assert both(runner, items, batch_size=2) == {"read": 5, "inserted": 3, "skipped": 2}


def test_an_id_that_comes_twice(runner: Runner) -> None:
    items: list[RawItem | Refusal] = [memory(1), memory(2), memory(1), memory(2, data="says something else")]
    assert both(runner, items, batch_size=1) == {"read": 4, "inserted": 2, "skipped": 1, "refused": 1}


BAD = {
    "no-owner": memory(10, ""),
    "no-text": memory(11, data="  "),
    "wrong-dims": memory(12, vector=(1.0, 2.0)),
    "bad-vector": memory(13, vector=(float("nan"),) * DIMS),
    "bad-time": memory(14, created_at="yesterday"),
    "bad-text": memory(15, data="half \ud800 of a pair"),
    "bad-number": memory(16, weight=float("inf")),
    "text-too-long": memory(17, data=" ".join(f"w{number}x" for number in range(120_000))),
    # Longer than an entry of an index on the owner may be, and of a kind that does not compress.
    "rejected": memory(18, user_id=random.Random(1).randbytes(3000).hex()),
    "no-id": memory(19, source_id=""),
    "erased-user": memory(20, "erased"),
}


def test_one_bad_row_never_stops_a_batch(runner: Runner) -> None:
    items: list[RawItem | Refusal] = []
    for place, bad in enumerate(BAD.values()):
        items += [bad, memory(100 + place)]
    nul = Refusal("bad-json", "line 7 is no JSON", RawItem("memory", "7", {"line": "{"}, "7"))
    pipeline, loader, folder = runner.begin(
        [*items, nul], batch_size=8, erased=frozenset({hashlib.sha256(b"erased").hexdigest()})
    )
    pipeline.run("verify", loader, runner.texts)
    report = pipeline.report()
    assert counts(report) == {"read": len(items) + 1, "inserted": len(BAD), "refused": len(BAD) + 1}
    assert report.reasons == {**dict.fromkeys(BAD, 1), "bad-json": 1}
    assert folder.write_dead_letters() == len(BAD) + 1
    assert {each["reason"] for each in folder.dead_letters()} == {*BAD, "bad-json"}


def test_relationships_and_history_follow_their_memories(runner: Runner) -> None:
    first, second = memory(1), memory(2)
    edge = {
        "source_memory_id": first.source_id,
        "target_memory_id": second.source_id,
        "relationship_type": "about",
        "strength": 0.5,
    }
    change = {
        "memory_id": first.source_id,
        "operation": "update",
        "old_value": {"data": "before"},
        "changed_at": "2024-05-01T12:00:00+00:00",
    }
    items: list[RawItem | Refusal] = [
        first,
        second,
        RawItem("relationship", "edge 1", edge, "3"),
        RawItem("relationship", "edge 2", {**edge, "target_memory_id": str(uuid.uuid4())}, "4"),
        RawItem("history", "change 1", change, "5"),
    ]
    assert both(runner, items) == {"read": 5, "inserted": 4, "refused": 1}
    assert runner.connection.execute(
        "select user_id, strength::float from memharbor.memory_relationships"
    ).fetchall() == [("alice", 0.5)]
    assert runner.connection.execute(
        "select user_id, old_value ->> 'data' from memharbor.memory_history where operation = 'update'"
    ).fetchall() == [("alice", "before")]
    assert both(runner, items) == {"read": 5, "same": 4, "refused": 1}


def test_a_segment_whose_mark_was_lost_is_not_loaded_twice(runner: Runner) -> None:
    pipeline, loader, folder = runner.begin(many(25), on_conflict="new-id")
    pipeline.run("load", loader, runner.texts)
    rows, report = runner.rows(), pipeline.report()
    # Killed between the commit in the database and the mark in the folder.
    (folder.path / "loaded" / "000003.json").unlink()
    pipeline.run("verify", loader, runner.texts)
    assert runner.rows() == rows
    assert pipeline.report() == report


def test_a_run_whose_rows_were_rolled_back_does_not_go_on(runner: Runner) -> None:
    pipeline, loader, folder = runner.begin(many(25))
    pipeline.run("load", loader, runner.texts)
    (folder.path / "loaded" / "000003.json").unlink()
    runner.connection.execute("delete from memharbor.migration_ledger")
    with pytest.raises(StateRefusedError, match="rolled back"):
        pipeline.run("load", loader, runner.texts)


@pytest.mark.parametrize("step", ["read", "transform", "embed", "load"])
def test_steps_by_themselves_make_what_one_run_makes(runner: Runner, step: Any, tmp_path: Path) -> None:
    items = [*many(25), memory(3, "user 3", data="other")]
    pipeline, loader, folder = runner.begin(items)
    pipeline.run(step, loader, runner.texts)
    # What a later step needs is in the folder, not in memory.
    again = Pipeline(folder, pipeline._plan, Output())
    again.run("verify", loader, runner.texts)
    assert counts(again.report()) == {"read": 26, "inserted": 25, "refused": 1}
    shutil.rmtree(folder.path)


def test_verify_finds_one_changed_float(runner: Runner) -> None:
    pipeline, loader, _ = runner.begin(many(25))
    pipeline.run("load", loader, runner.texts)
    victim = memory(17).source_id
    changed = list(vector("17"))
    changed[1] += 1e-6
    runner.connection.execute(
        "update memharbor.memories set embedding = %s::real[]::vector where id = %s", (changed, victim)
    )
    assert pack_vector(changed) != pack_vector(vector("17"))
    with pytest.raises(VerificationError, match=victim):
        pipeline.run("verify", loader, runner.texts)


def test_only_what_was_chosen_travels_and_under_its_new_name(runner: Runner) -> None:
    items = [memory(1, "1"), memory(2, "2"), memory(3, "3"), memory(4, "1", created_at="2020-01-01T00:00:00Z")]
    choice = {"users": frozenset({"1", "2"}), "remap_users": {"1": "alice"}}
    assert both(runner, items, choice=choice) == {"read": 4, "inserted": 2, "not_chosen": 1, "refused": 1}
    assert {row[0] for row in runner.rows().values()} == {"alice"}


class FakeEmbedder:
    """Refuses one text, and counts what it is asked."""

    model, dims = "fake", DIMS

    def __init__(self) -> None:
        self.asked: list[str] = []

    def embed(self, texts: Any) -> list[Any]:
        self.asked += texts
        too_long = EmbeddingRefusal("text-too-long", "it is too long")
        return [too_long if text == "fact 3" else vector(text) for text in texts]


def test_what_has_no_embedding_is_embedded_once_and_filled_in_later(runner: Runner) -> None:
    items: list[RawItem | Refusal] = [memory(number, vector=None) for number in range(1, 6)]
    assert both(runner, items) == {"read": 5, "inserted": 5}
    assert {row[3] for row in runner.rows().values()} == {None}
    embedder = FakeEmbedder()
    done = runner.run(items, embedder=embedder)
    assert counts(done) == {"read": 5, "updated": 4, "refused": 1}
    assert len(embedder.asked) == 5
    assert sum(row[3] is not None for row in runner.rows().values()) == 4
