"""What `migrate read` wrote comes back as what was read, from every source; and reading survives a kill at every step."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import struct
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mem0.memory.storage import SQLiteManager

from memharbor.errors import ConnectError, SourceDataError, StateRefusedError, UsageError
from memharbor.migrate import fetching
from memharbor.migrate.fetching import fetch
from memharbor.migrate.record import RawItem, Record, Refusal, Source, SourceInfo, item_as_data
from memharbor.migrate.sources import files
from memharbor.migrate.sources.dead_letters import DeadLetterSource
from memharbor.migrate.sources.files import FileSource
from memharbor.migrate.sources.openmemory import OpenMemorySource
from memharbor.migrate.sources.platform import PlatformSource
from memharbor.migrate.sources.sqlite import SqliteSource
from memharbor.migrate.transform import Choice, transform
from memharbor.migrate.vector import Vector
from memharbor.output import Output
from tests.command_line import ok, refused
from tests.platform_server import KEY, PlatformServer, client, memory_of
from tests.unit import test_migrate_openmemory as openmemory
from tests.unit.test_migrate_sqlite import CHATSG, PACKED, USERS, UUID, VECTORS, make, point

Item = RawItem | Refusal

QUIET = Output("json")
HALF = "\ud83d"
NO_FLOAT = (1e300, 0.5)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def spelled(items: Sequence[Item]) -> list[str]:
    """Spell good items to the bit, but for the places they were read from."""
    good = [each for each in items if isinstance(each, RawItem)]
    return [json.dumps(item_as_data(replace(each, position="")), sort_keys=True) for each in good]


def became(items: Sequence[Item], source: str) -> list[Any]:
    """Say what a run makes of good items: ids, and reasons of refusals."""
    made = [transform(each, source, Choice()) for each in items if isinstance(each, RawItem)]
    return [each.id if isinstance(each, Record) else each and (each.reason, each.detail) for each in made]


# One of everything


class Listed:
    """A source of items that are given."""

    def __init__(self, items: Sequence[Item], name: str = "listed", identity: str = "1") -> None:
        self.items, self.name, self.identity = list(items), name, identity

    def describe(self) -> SourceInfo:
        return SourceInfo(self.name, self.identity, {"memory": len(self.items)})

    def read(self, after: str | None = None) -> Iterator[Item]:
        yield from self.items[int(after or 0) :]


def numbered(items: Sequence[Item]) -> list[Item]:
    found: list[Item] = []
    for at, each in enumerate(items, 1):
        is_good = isinstance(each, RawItem)
        found.append(
            replace(each, position=str(at)) if is_good else replace(each, item=replace(each.item, position=str(at)))  # type: ignore[union-attr,call-arg]
        )
    return found


def of_all_kinds(folder: Path, stack: ExitStack) -> Source:
    moments = {"archived_at": "2026-01-01", "deleted_at": "2026-01-02 10:00:00", "expires_at": "never"}
    packed = Vector(struct.pack("<3f", -0.0, 1.401298464324817e-45, 1.0) + b"\x01\x00\xc0\x7f")  # a NaN of its own
    return Listed(
        numbered(
            [
                RawItem("memory", "m 1", {"memory": "é\u2028\n", "user_id": "u", "embedding": "mine", "id": 7}, ""),
                RawItem("memory", "", {"memory": "no id"}, "", (0.1, -0.0, 1e-45)),
                RawItem(
                    "memory", "m3", {"data": "x", "user_id": "u", "kind": "history"}, "", packed, "paused", moments
                ),
                RawItem("entity", "e", {"data": "Rome", "user_id": "u", "linked_memory_ids": ["m 1"]}, "", (1.0,)),
                RawItem("relationship", "r", {"source_memory_id": "m 1", "relationship_type": "of", "strength": 1}, ""),
                RawItem("history", "h", {"table": "history", "memory_id": "m 1", "event": "ADD"}, ""),
                RawItem("history", "t", {"table": "messages", "role": "user", "content": "hi"}, ""),
                RawItem("memory", "bad", {"memory": f"a\0{HALF}", "n": math.nan, "big": 10**40, HALF: -math.inf}, ""),
                RawItem("memory", "far", {"memory": "x", "user_id": "u"}, "", NO_FLOAT),
                RawItem("memory", "odd", {"memory": "x", "user_id": "u"}, "", (1e300, None)),  # type: ignore[arg-type]
                RawItem("memory", "s", {"data": "x", "user_id": "u"}, "", is_settled=True),
                Refusal("bad-json", "it is none", RawItem("memory", "line 9", {"raw": "{"}, "")),
            ]
        )
    )


def of_file(folder: Path, stack: ExitStack) -> Source:
    path = folder / "export.json"
    items: list[Any] = [
        {"id": "mem_1", "memory": "tea", "metadata": {"kind": "entity"}},
        {"memory": "no id of its own", "embedding": [0.1, -0.0]},
        {"id": "mem_3", "content": "far", "embedding": list(NO_FLOAT)},
        {"id": "mem_4", "data": "rain", "kind": "history", "state": "archived", "archived_at": "2026-01-01T00:00:00Z"},
        "no memory",
    ]
    path.write_text(json.dumps({"alice": items, "bob": {"results": [{"memory": "sea", "memharbor_item": 1}]}}))
    return FileSource(path)


def of_history(folder: Path, stack: ExitStack) -> Source:
    manager = SQLiteManager(str(folder / "history.db"))
    for n in range(3):
        manager.add_history(f"mem_{n}", "before", f"fact {n}", "UPDATE", created_at=f"2025-01-15T10:00:{n:02}-08:00")
    manager.save_messages([{"role": "user", "content": "hello"}], "user_id=alice")
    manager.connection.close()
    return SqliteSource(folder / "history.db")


def of_points(folder: Path, stack: ExitStack) -> Source:
    memory = {"userId": "u", "data": "tea", "id": "the payload's own", "state": "California"}
    entity = {"userId": "u", "data": "Rome", "entityType": "place", "linkedMemoryIds": ["a"]}
    rows = [point("a", PACKED, json.dumps(memory)), point("b", PACKED, json.dumps(entity)), point("c", b"x", "{}")]
    return SqliteSource(make(folder / "vector_store.db", VECTORS, rows))


def of_chatsg(folder: Path, stack: ExitStack) -> Source:
    path = make(folder / "chatsg.db", CHATSG + USERS.format(columns="username text"))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript("insert into users values (1, 'alice'), (2, 'bob')")
        for n in range(4):
            row = (f"m{n}", n % 3 + 1, "s", f"fact {n}", PACKED, '{"kind": "x"}', f"2025-01-1{n}", None)
            connection.execute("insert into mem0_memories values (?, ?, ?, ?, ?, ?, ?, ?)", row)
            change = (n, f"m{n}", n % 2 + 1, "ADD", None, f"fact {n}", "{}", "2025-01-15 10:00:00")
            connection.execute("insert into mem0_history values (?, ?, ?, ?, ?, ?, ?, ?)", change)
    return SqliteSource(path, users_from="username")


def of_openmemory(folder: Path, stack: ExitStack) -> Source:
    path = folder / "openmemory.db"
    openmemory.execute(path, openmemory.SCHEMA)
    at = "2026-01-01 10:00:00.000000"
    anna, tea, gone, orphan, change = (openmemory.uuid.UUID(int=number).hex for number in range(1, 6))
    openmemory.insert(path, "users", (anna, "anna", None, None, "{}", at, at))
    openmemory.insert(
        path,
        "memories",
        (tea, anna, "none", "tea", None, '{"kind": "drink"}', "active", at, at, None, None),
        (gone, anna, "none", "gone", None, "{}", "deleted", at, at, at, at),
        (orphan, "nobody", "none", "whose", None, "{}", "active", at, at, None, None),
    )
    openmemory.insert(path, "memory_status_history", (change, gone, anna, "active", "deleted", at))
    return OpenMemorySource([path])


def of_platform(folder: Path, stack: ExitStack) -> Source:
    memories = [memory_of(f"fact {n}", n, user_id="alice", run_id="r" if n % 2 else None) for n in range(5)]
    memories += [memory_of("of an app", 5, app_id="shop", metadata={"kind": "entity"}, expiration_date="2020-01-01")]
    memories += [{**memory_of(f"bad {HALF}\0", 6, agent_id="a", metadata={"x": math.nan}), "id": "mem_6"}]
    memories += [{**memory_of("no id", 7, user_id="bob"), "id": None}]
    server = stack.enter_context(PlatformServer(memories))
    return PlatformSource(stack.enter_context(client(server)))


SOURCES: dict[str, tuple[Callable[[Path, ExitStack], Source], str, dict[str, int]]] = {
    "all kinds": (of_all_kinds, "listed", {"memory": 7, "entity": 1, "relationship": 1, "history": 2}),
    "file": (of_file, "file", {"memory": 5}),
    "history": (of_history, "mem0-history", {"history": 4}),
    "points": (of_points, "sqlite-vectors", {"memory": 1, "entity": 1}),
    "chatsg": (of_chatsg, "chatsg", {"memory": 3, "history": 4}),
    "openmemory": (of_openmemory, "openmemory", {"memory": 2, "history": 1}),
    "platform": (of_platform, "platform", {"memory": 7}),
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Source]:
    with ExitStack() as stack:
        yield SOURCES[request.param][0](tmp_path, stack)


@pytest.mark.parametrize("file", ["out.jsonl", "out.json", "out"])
@pytest.mark.parametrize("name", SOURCES)
def test_what_was_read_comes_back_as_it_was(name: str, file: str, tmp_path: Path) -> None:
    begin, source_name, kinds = SOURCES[name]
    with ExitStack() as stack:
        source = begin(tmp_path, stack)
        direct = list(source.read())
        manifest = fetch(source, tmp_path / file, QUIET)
    assert (manifest["source"], manifest["items"]) == (source_name, kinds)
    found = FileSource(tmp_path / file)
    again = list(found.read())
    assert all(isinstance(each, RawItem) for each in again)
    assert spelled(again) == spelled(direct)
    # A run makes the same of them.
    assert found.describe().name == source_name
    assert became(again, found.describe().name) == became(direct, source_name)
    for at, each in enumerate(again, 1):
        assert spelled(list(found.read(each.position))) == spelled(again[at:])  # type: ignore[union-attr]
    letters = [each.item for each in direct if isinstance(each, Refusal)]
    assert sum(manifest["refused"].values()) == len(letters)
    assert (tmp_path / f"{file}.refused.jsonl").exists() == bool(letters)
    if letters:
        dead = DeadLetterSource(tmp_path / f"{file}.refused.jsonl")
        assert spelled(list(dead.read())) == spelled(letters)
        assert dead.describe().name == source_name
    # And so on for ever.
    fetch(found, tmp_path / "second", QUIET)
    assert (tmp_path / "second").read_bytes() == (tmp_path / file).read_bytes()


def test_what_was_read_may_be_reshaped_by_other_tools(source: Source, tmp_path: Path) -> None:
    fetch(source, tmp_path / "out.jsonl", QUIET)
    expected = spelled(list(FileSource(tmp_path / "out.jsonl").read()))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    shapes = {
        "list.json": json.dumps(lines),
        "pretty.json": "\n".join(json.dumps(line, indent=2) for line in lines),
        "one.json": json.dumps(lines[0]),
        "users.json": json.dumps({"zoe": lines}),
        "half.jsonl": "\n".join(map(json.dumps, lines[1:])),
    }
    wanted = {"one.json": expected[:1], "half.jsonl": expected[1:]}
    for name, text in shapes.items():
        (tmp_path / name).write_text(text)
        assert spelled(list(FileSource(tmp_path / name).read())) == wanted.get(name, expected), name


def test_keys_in_another_order_are_known_too(tmp_path: Path) -> None:
    item = RawItem("entity", "e", {"data": "Rome", "user_id": "u"}, "1", (1.0,))
    fetch(Listed([item]), tmp_path / "out.jsonl", QUIET)
    line = json.loads((tmp_path / "out.jsonl").read_text())
    (tmp_path / "sorted.jsonl").write_text(json.dumps(line, sort_keys=True))
    assert spelled(list(FileSource(tmp_path / "sorted.jsonl").read())) == spelled([item])


def test_an_item_that_is_larger_than_what_is_looked_at_first_is_known(tmp_path: Path) -> None:
    item = RawItem("history", "h", {"table": "messages", "content": "x" * (files._HEAD_BYTES + 1)}, "1")
    fetch(Listed([item]), tmp_path / "out.json", QUIET)
    assert spelled(list(FileSource(tmp_path / "out.json").read())) == spelled([item])


FOREIGN: list[dict[str, Any]] = [
    {"id": "a", "memory": "tea", "user_id": "u", "kind": "history"},
    {"id": "a", "memory": "tea", "user_id": "u", "kind": "entity", "source_id": "b", "source": "platform"},
    {"id": "a", "data": "tea", "user_id": "u", "memharbor_item": 1, "kind": "entity", "source_id": "b", "source": "x"},
    {"memharbor_item": 1, "source": "x", "kind": "entity", "source_id": "b", "data": "tea"},
    {"memharbor_item": 1, "source": "x", "kind": "entity", "source_id": "b", "data": {"data": "tea"}, "user_id": "u"},
]


@pytest.mark.parametrize("line", FOREIGN)
def test_a_foreign_line_is_never_taken_for_ours(line: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    (found,) = FileSource(tmp_path / "x.jsonl").read()
    assert isinstance(found, RawItem)
    assert (found.kind, found.data) == ("memory", line)
    assert found.source_id != "b"
    assert FileSource(tmp_path / "x.jsonl").describe().name == "file"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"memharbor_item": 2}, "bad-json"),
        ({"kind": "memories"}, "bad-json"),
        ({"kind": ["memory"]}, "bad-json"),
        ({"source_id": 7}, "bad-json"),
        ({"state": "sleeping"}, "bad-json"),
        ({"lifecycle": {"archived_at": 7}}, "bad-json"),
        ({"lifecycle": []}, None),
        ({"vector": "AACA"}, "wrong-dims"),
        ({"vector": "?"}, "bad-vector"),
        ({"vector": {"x": 1}}, "bad-vector"),
        ({"vector": [0.5, "1"]}, None),
    ],
)
def test_a_line_of_ours_that_somebody_broke_is_refused_and_the_next_is_read(
    change: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    fetch(Listed(numbered([RawItem("memory", name, {"memory": "x"}, "") for name in "ab"])), path, QUIET)
    first, second = path.read_text().splitlines()
    path.write_text(json.dumps({**json.loads(first), **change}) + "\n" + second + "\n")
    broken, good = FileSource(path).read()
    assert (broken.reason if isinstance(broken, Refusal) else None) == reason
    assert isinstance(good, RawItem)
    assert good.source_id == "b"


@pytest.mark.parametrize("other", ["sqlite-vectors", None])
@pytest.mark.parametrize("is_first", [True, False])
def test_what_was_read_of_two_sources_is_not_mixed(other: str | None, is_first: bool, tmp_path: Path) -> None:
    item = RawItem("memory", "m", {"memory": "x", "user_id": "u"}, "1")
    fetch(Listed([item], "platform"), tmp_path / "a.jsonl", QUIET)
    if other is None:
        (tmp_path / "b.jsonl").write_text(json.dumps({"id": "m", "memory": "x"}) + "\n")
    else:
        fetch(Listed([item], other), tmp_path / "b.jsonl", QUIET)
    parts = [(tmp_path / name).read_text() for name in (("a.jsonl", "b.jsonl") if is_first else ("b.jsonl", "a.jsonl"))]
    (tmp_path / "both.jsonl").write_text("".join(parts))
    with pytest.raises(SourceDataError, match="holds items of .* whose ids are made otherwise") as error:
        list(FileSource(tmp_path / "both.jsonl").read())
    assert "`platform`" in error.value.message
    (tmp_path / "twice.jsonl").write_text(parts[0] * 2)
    assert len(list(FileSource(tmp_path / "twice.jsonl").read())) == 2


def test_a_digest_is_made_only_where_a_name_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, nameless = {"id": "a", "memory": "tea"}, {"memory": "rain"}
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, (good, nameless))))
    made: list[bytes] = []
    sha256 = files.hashlib.sha256
    monkeypatch.setattr(files.hashlib, "sha256", lambda raw: made.append(raw) or sha256(raw))
    assert len(list(FileSource(path).read())) == 2
    assert made == [json.dumps(nameless).encode()]


def test_an_embedding_that_no_float32_holds_does_not_stop_the_reading(tmp_path: Path) -> None:
    items = [RawItem("memory", "far", {"memory": "x", "user_id": "u"}, "1", NO_FLOAT)]
    items += [RawItem("memory", "near", {"memory": "y", "user_id": "u"}, "2", (1.0, 0.5))]
    assert fetch(Listed(items), tmp_path / "out.jsonl", QUIET)["items"] == {"memory": 2}
    far, near = FileSource(tmp_path / "out.jsonl").read()
    assert isinstance(far, RawItem)
    assert isinstance(near, RawItem)
    assert (far.vector, near.vector) == (NO_FLOAT, (1.0, 0.5))
    made = transform(far, "listed", Choice(dims=2))
    assert isinstance(made, Refusal)
    assert made.reason == "bad-vector"


def test_an_item_too_deep_to_be_written_is_refused(tmp_path: Path) -> None:
    deep: Any = []
    for _ in range(5_000):
        deep = [deep]
    items = [RawItem("memory", "deep", {"x": deep}, "1"), RawItem("memory", "flat", {"memory": "y"}, "2")]
    manifest = fetch(Listed(items), tmp_path / "out.jsonl", QUIET)
    assert (manifest["items"], manifest["refused"]) == ({"memory": 1}, {"bad-json": 1})


# Dead letters, mended


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Expecting"),
        ("[" * 100_000, "recursion"),
        ("[]", "no JSON object"),
        ("{}", "neither `item` nor `record`"),
        ('{"source": "chatsg", "item": 7}', "no JSON object"),
        ('{"source": "chatsg", "item": {"kind": "memory", "source_id": "a"}}', "has no `data`"),
        ('{"source": "chatsg", "item": {"kind": "memory", "source_id": "a", "data": []}}', "wrong type"),
        ('{"source": "chatsg", "record": []}', "neither"),
        ('{"source": "chatsg", "record": {"kind": "memory", "id": "7", "data": {}}}', "no UUID"),
        (f'{{"source": "chatsg", "record": {{"kind": "x", "id": "{UUID}", "data": {{}}}}}}', "wrong type"),
    ],
)
def test_a_dead_letter_that_was_mended_badly_is_refused_and_the_next_is_read(
    line: str, said: str, tmp_path: Path
) -> None:
    identity = "00000000-0000-0000-0000-000000000001"
    good = {"item": item_as_data(RawItem("entity", "e", {"data": "Rome"}, "9", (1.0,))), "source": "chatsg"}
    record = {"record": {"kind": "memory", "id": identity, "source_id": "m", "data": {"data": "x"}, "state": "paused"}}
    path = tmp_path / "letters.jsonl"
    path.write_text("\n".join([line, json.dumps(good), "", json.dumps({**record, "source": "chatsg"})]))
    bad, first, second = DeadLetterSource(path).read()
    assert isinstance(bad, Refusal)
    assert said in bad.detail
    assert bad.item.data["raw"].strip() == line
    assert first == RawItem("entity", "e", {"data": "Rome"}, "2", (1.0,))
    assert second == RawItem("memory", identity, {"data": "x"}, "4", state="paused", is_settled=True)
    assert list(DeadLetterSource(path).read("2")) == [second]
    assert DeadLetterSource(path).describe().name == "chatsg"


def test_dead_letters_of_two_sources_are_not_mixed(tmp_path: Path) -> None:
    item = item_as_data(RawItem("memory", "m", {}, "1"))
    lines = [json.dumps({"item": item, "source": "chatsg"}), json.dumps({"item": item})]
    (tmp_path / "letters.jsonl").write_text("\n".join(lines))
    with pytest.raises(SourceDataError, match="`chatsg` and `dead-letters`"):
        DeadLetterSource(tmp_path / "letters.jsonl").describe()
    (tmp_path / "letters.jsonl").write_text(lines[1])
    assert DeadLetterSource(tmp_path / "letters.jsonl").describe().name == "dead-letters"


# Which items are kept


def day(number: int) -> datetime:
    return datetime(2025, 1, number, tzinfo=UTC)


CHOICES = {
    "a user": Choice(users=frozenset(["alice"]), carry_vectors=False),
    "nobody": Choice(users=frozenset(["zoe"]), carry_vectors=False),
    "some days": Choice(from_at=day(11), to_at=day(13), carry_vectors=False),
}


@pytest.mark.parametrize("chosen", CHOICES)
def test_what_is_kept_is_what_a_run_would_choose(chosen: str, source: Source, tmp_path: Path) -> None:
    choice = CHOICES[chosen]
    direct = list(source.read())
    wanted = [
        each
        for each in direct
        if isinstance(each, RawItem) and transform(each, source.describe().name, choice) is not None
    ]
    manifest = fetch(source, tmp_path / "out.jsonl", QUIET, choice=choice)
    assert spelled(list(FileSource(tmp_path / "out.jsonl").read())) == spelled(wanted)
    assert sum(manifest["refused"].values()) == sum(isinstance(each, Refusal) for each in direct)
    assert manifest["chosen"]


def test_a_choice_leaves_others_out(tmp_path: Path) -> None:
    with ExitStack() as stack:
        source = of_chatsg(tmp_path, stack)
        fetch(source, tmp_path / "out.jsonl", QUIET, choice=CHOICES["a user"])
        fetch(source, tmp_path / "days.jsonl", QUIET, choice=CHOICES["some days"])
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["source_id"] for each in kept if each["kind"] == "memory"] == ["m0", "m3"]
    assert {each["data"]["user_id"] for each in kept} == {"alice"}
    days = [json.loads(line)["source_id"] for line in (tmp_path / "days.jsonl").read_text().splitlines()]
    assert days == ["m1"]  # the third one's user has no name


def test_the_command_line_chooses(tmp_path: Path) -> None:
    with ExitStack() as stack:
        of_chatsg(tmp_path, stack)
    path = tmp_path / "out.jsonl"
    read = ["migrate", "read", "--from", "sqlite", "--input", str(tmp_path / "chatsg.db"), "--users-from", "username"]
    read += ["--output-file", str(path)]
    refused(2, "names nobody", "", *read, "--users", " ,")
    refused(2, "`--from-date` is no moment", "", *read, "--from-date", "soon")
    refused(2, "no folder", "", *read[:-1], str(tmp_path / "none" / "out.jsonl"))
    assert ok("", *read, "--users", "alice", "--dry-run")["counts"] == {"memory": 4, "history": 4}
    assert not path.exists()
    manifest = ok("", *read, "--users", "alice, zoe", "--to-date", "2025-01-12")
    assert manifest["items"] == {"memory": 1}
    assert manifest["chosen"] == {"users": ["alice", "zoe"], "to": "2025-01-12T00:00:00+00:00"}
    assert json.loads((tmp_path / "out.jsonl.manifest.json").read_text()) == manifest
    refused(9, "is there already", "", *read)
    refused(9, "is there already", "", *read, "--dry-run")
    assert ok("", *read, "--replace")["items"] == {"memory": 3, "history": 4}


def test_the_platform_is_asked_for_the_users_that_are_chosen(tmp_path: Path) -> None:
    memories = [memory_of(f"fact {n}", n, user_id=("alice", "bob", "carol")[n % 3]) for n in range(9)]
    with PlatformServer(memories) as server:
        read = ["migrate", "read", "--from", "platform", "--url", server.base_url, "--users", "alice,bob"]
        manifest = ok("", *read, "--output-file", str(tmp_path / "out.jsonl"), MEM0_API_KEY=KEY)
        assert manifest["items"] == {"memory": 6}
        asked = [request.body["filters"] for request in server.requests if request.query.get("page_size") == "200"]
    assert asked
    assert not [filters for filters in asked if {"user_id": "*"} in filters.get("AND", [])]


# Killed


def some_items(count: int, word: str = "fact") -> list[Item]:
    items: list[Item] = [RawItem("memory", f"m{n}", {"memory": f"{word} {n}"}, "", (float(n),)) for n in range(count)]
    items[1] = Refusal("bad-json", f"{word} is none", RawItem("memory", "bad", {"raw": word}, ""))
    return numbered(items)


class Steps:
    """
    Count what `fetch` does to the disk, and each item that it takes; before one of them the process is killed.

    Args:
        fatal: Its number from 1; 0 for none.
    """

    def __init__(self, fatal: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self._fatal = 0, fatal
        for owner, name in ((os, "open"), (os, "fsync"), (os, "truncate"), (Path, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self._stepping(getattr(owner, name)))

    def _stepping(self, done: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*arguments: Any, **options: Any) -> Any:
            self.step()
            return done(*arguments, **options)

        return stepping

    def step(self) -> None:
        self.count += 1
        if self.count == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def fetch_in_child(items: Sequence[Item], path: Path, fatal: int, *, replace_it: bool) -> int:
    """Fetch in a process that is killed before a step; returns which signal ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads
        child = os.fork()
    if not child:
        code = 1
        try:
            with pytest.MonkeyPatch.context() as patch:
                take(items, path, Steps(fatal, patch), replace_it=replace_it)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def take(items: Sequence[Item], path: Path, steps: Steps, *, replace_it: bool) -> dict[str, Any]:
    class Stepping(Listed):
        def read(self, after: str | None = None) -> Iterator[Item]:
            for item in super().read(after):
                steps.step()
                yield item

    return fetch(Stepping(items), path, QUIET, replace=replace_it)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("before", "flush_items"), [("nothing", 1), ("an older file", 1000), ("one that refused more", 2)]
)
def test_a_reading_that_was_killed_at_any_step_goes_on(
    before: str, flush_items: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_FLUSH_ITEMS", flush_items)
    items = some_items(5)
    if before == "one that refused more":
        items = numbered([each for each in items if isinstance(each, RawItem)])
    replace_it = before != "nothing"

    def begin(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        if replace_it:
            fetch(Listed(some_items(4, "older")), folder / "out.jsonl", QUIET)
        return folder / "out.jsonl"

    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(0, patch)
        path = begin("whole")
        steps.count = 0
        expected = take(items, path, steps, replace_it=replace_it)
        count = steps.count
    whole = files_of(path.parent)
    assert set(whole) == {"out.jsonl", "out.jsonl.manifest.json"} | (
        {"out.jsonl.refused.jsonl"} if expected["refused"] else set()
    )
    assert count > len(items) + 10
    for fatal in range(1, count + 1):
        path = begin(f"killed before {fatal}")
        assert fetch_in_child(items, path, fatal, replace_it=replace_it) == signal.SIGKILL
        # The one who repeats the call is killed too, or has less to do than that.
        if fatal % 3 or fetch_in_child(items, path, fatal // 2, replace_it=replace_it):
            assert fetch(Listed(items), path, QUIET, replace=replace_it) == expected
        assert files_of(path.parent) == whole, f"killed before step {fatal}"


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    items, path = some_items(6), tmp_path / "out.jsonl"

    class Ending(Listed):
        begun: list[str | None]

        def read(self, after: str | None = None) -> Iterator[Item]:
            self.begun = [after]
            yield from self.items[int(after or 0) : 4]
            if after is None:
                raise ConnectError("gone")
            yield from self.items[4:]

    source = Ending(items)
    with pytest.raises(ConnectError):
        fetch(source, path, QUIET)
    assert not path.exists()
    fetch(source, path, QUIET)
    assert source.begun == ["4"]
    assert len(path.read_text().splitlines()) == 5


def test_a_file_of_somebody_else_is_never_taken_for_a_finished_one(tmp_path: Path) -> None:
    path, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        fetch(Listed(some_items(4)), path, QUIET)
    left = partial.read_bytes()
    path.write_text("mine")
    with pytest.raises(StateRefusedError, match="is there already"):
        fetch(Listed(some_items(4)), path, QUIET)
    assert (path.read_text(), partial.read_bytes()) == ("mine", left)
    for other in (Listed(some_items(4), identity="2"), Listed(some_items(4))):
        choice = None if other.identity == "2" else CHOICES["a user"]
        with pytest.raises(StateRefusedError, match="is of another source or choice"):
            fetch(other, path, QUIET, replace=True, choice=choice)
    manifest = fetch(Listed(some_items(4)), path, QUIET, replace=True)
    assert manifest["items"] == {"memory": 3}
    assert not partial.exists()


@pytest.mark.parametrize("damage", ["[1]", '{"identity": "2"}', "nothing", ""])
def test_a_partial_file_that_is_none_is_not_taken_for_one(damage: str, tmp_path: Path) -> None:
    path, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    partial.write_text(f"{damage}\n")
    if damage.startswith("{"):
        with pytest.raises(StateRefusedError, match="another source"):
            fetch(Listed(some_items(4)), path, QUIET)
        assert partial.read_text() == f"{damage}\n"
    else:
        assert fetch(Listed(some_items(4)), path, QUIET)["items"] == {"memory": 3}


def test_nobody_else_can_read_what_was_read(tmp_path: Path) -> None:
    modes: set[str] = set()

    class Looking(Listed):
        def read(self, after: str | None = None) -> Iterator[Item]:
            for item in super().read(after):
                modes.update(f"{path.name} {path.stat().st_mode & 0o777:o}" for path in tmp_path.iterdir())
                yield item

    fetch(Looking(some_items(4)), tmp_path / "out.jsonl", QUIET)
    assert modes == {"out.jsonl.partial 600"}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_there_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        fetch(Listed([]), tmp_path / "none" / "out.jsonl", QUIET)


def test_memory_stays_flat(tmp_path: Path) -> None:
    class Many:
        def __init__(self, count: int) -> None:
            self.count = count

        def describe(self) -> SourceInfo:
            return SourceInfo("many", str(self.count))

        def read(self, after: str | None = None) -> Iterator[Item]:
            for n in range(self.count):
                yield RawItem("memory", str(n), {"memory": "x" * 2_000, "user_id": "u"}, str(n))

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        tracemalloc.start()
        try:
            fetch(Many(count), path, QUIET, choice=Choice(users=frozenset("u"), carry_vectors=False))
            assert sum(1 for _ in FileSource(path).read()) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(2_500) - peak(1_000) < 1_000_000
