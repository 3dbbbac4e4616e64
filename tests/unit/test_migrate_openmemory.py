"""OpenMemory as a source of a migration: its database, its export zips in both spellings, and vectors of Qdrant."""

from __future__ import annotations

import gzip
import json
import sqlite3
import struct
import tempfile
import tracemalloc
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from memharbor.errors import SourceDataError
from memharbor.migrate.reasons import REASONS
from memharbor.migrate.record import RawItem, Refusal, item_as_data, item_from_data
from memharbor.migrate.sources import sqlite_rows
from memharbor.migrate.sources.json_values import Problem
from memharbor.migrate.sources.openmemory import OpenMemorySource
from memharbor.migrate.sources.qdrant_points import PointsExport, find_dims, point_vectors

Item = RawItem | Refusal

# As SQLAlchemy makes them of openmemory/api/app/models.py.
SCHEMA = """
CREATE TABLE users (id CHAR(32) NOT NULL, user_id VARCHAR NOT NULL, name VARCHAR, email VARCHAR, metadata JSON,
  created_at DATETIME, updated_at DATETIME, PRIMARY KEY (id));
CREATE TABLE apps (id CHAR(32) NOT NULL, owner_id CHAR(32) NOT NULL, name VARCHAR NOT NULL, description VARCHAR,
  metadata JSON, is_active BOOLEAN, created_at DATETIME, updated_at DATETIME, PRIMARY KEY (id),
  CONSTRAINT uq_user_app_name UNIQUE (owner_id, name), FOREIGN KEY(owner_id) REFERENCES users (id));
CREATE TABLE configs (id CHAR(32) NOT NULL, "key" VARCHAR NOT NULL, value JSON NOT NULL, PRIMARY KEY (id));
CREATE TABLE memories (id CHAR(32) NOT NULL, user_id CHAR(32) NOT NULL, app_id CHAR(32) NOT NULL, content VARCHAR NOT NULL,
  vector VARCHAR, metadata JSON, state VARCHAR(8), created_at DATETIME, updated_at DATETIME, archived_at DATETIME,
  deleted_at DATETIME, PRIMARY KEY (id), FOREIGN KEY(user_id) REFERENCES users (id));
CREATE TABLE categories (id CHAR(32) NOT NULL, name VARCHAR NOT NULL, description VARCHAR, created_at DATETIME,
  updated_at DATETIME, PRIMARY KEY (id));
CREATE TABLE memory_categories (memory_id CHAR(32) NOT NULL, category_id CHAR(32) NOT NULL,
  PRIMARY KEY (memory_id, category_id));
CREATE TABLE memory_status_history (id CHAR(32) NOT NULL, memory_id CHAR(32) NOT NULL, changed_by CHAR(32) NOT NULL,
  old_state VARCHAR(8) NOT NULL, new_state VARCHAR(8) NOT NULL, changed_at DATETIME, PRIMARY KEY (id));
CREATE TABLE memory_access_logs (id CHAR(32) NOT NULL, memory_id CHAR(32) NOT NULL, app_id CHAR(32) NOT NULL,
  accessed_at DATETIME, access_type VARCHAR NOT NULL, metadata JSON, PRIMARY KEY (id));
CREATE INDEX ix_memory_access_logs_memory_id ON memory_access_logs (memory_id);
"""
FLOATS = (1.0, -0.5, 1.401298464324817e-45, -0.0)
AT = "2026-01-0{} 10:00:00.000000"


def made_id(number: int) -> str:
    return str(uuid.UUID(int=number))


ANNA, BEN, CURSOR, CLAUDE = (uuid.UUID(int=number).hex for number in (1, 2, 11, 12))
DRINKS, WEATHER = (uuid.UUID(int=number).hex for number in (21, 22))
TEA, RAIN, JAZZ, GONE = (uuid.UUID(int=number).hex for number in (101, 102, 103, 104))
CHANGE, OTHER_CHANGE = (uuid.UUID(int=number).hex for number in (201, 202))


def insert(path: Path, table: str, *rows: Sequence[Any]) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for row in rows:
            connection.execute(f"insert into {table} values ({', '.join('?' * len(row))})", row)


def execute(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(script)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "openmemory.db"
    execute(path, SCHEMA)
    insert(path, "users", (ANNA, "anna", None, None, "{}", AT, AT), (BEN, "ben", None, None, "{}", AT, AT))
    insert(
        path,
        "apps",
        *[(each, ANNA, name, None, "{}", 1, AT, AT) for each, name in ((CURSOR, "cursor"), (CLAUDE, "claude"))],
    )
    insert(path, "configs", ("c", "main", '{"llm": {"api_key": "sk-very-secret"}}'))  # pragma: allowlist secret
    insert(
        path, "categories", *[(each, name, None, AT, AT) for each, name in ((DRINKS, "drinks"), (WEATHER, "weather"))]
    )
    first, second, third = (AT.format(day) for day in (1, 2, 3))
    insert(
        path,
        "memories",
        (TEA, ANNA, CURSOR, "tea", None, '{"source_app": "mine", "n": 1}', "active", first, second, None, None),
        (RAIN, BEN, CLAUDE, "rain", None, "null", "archived", first, first, second, None),
        (JAZZ, ANNA, CLAUDE, "jazz", None, None, "paused", first, first, None, None),
        (GONE, ANNA, "nobody", "gone", None, "{}", "deleted", first, first, second, third),
    )
    insert(path, "memory_categories", (TEA, WEATHER), (TEA, DRINKS), (RAIN, WEATHER))
    logs = [(TEA, second), (TEA, third), (TEA, first), (JAZZ, None)]
    insert(
        path,
        "memory_access_logs",
        *[(f"l{at}", each, CURSOR, on, "search", "{}") for at, (each, on) in enumerate(logs)],
    )
    insert(
        path,
        "memory_status_history",
        (CHANGE, RAIN, BEN, "active", "archived", second),
        (OTHER_CHANGE, GONE, uuid.UUID(int=9).hex, "active", "deleted", third),
    )
    return path


def read(source: OpenMemorySource | Path, after: str | None = None) -> list[Item]:
    return list((OpenMemorySource(source) if isinstance(source, Path) else source).read(after))


def raw(item: Item) -> RawItem:
    return item.item if isinstance(item, Refusal) else item


def assert_resumes(source: OpenMemorySource | Path) -> None:
    whole = read(source)
    assert len({raw(each).position for each in whole}) == len(whole)
    for at, each in enumerate(whole, 1):
        assert read(source, raw(each).position) == whole[at:]


def test_memories_of_a_database_are_read_with_all_that_is_known_of_them(database: Path) -> None:
    tea, rain, jazz, gone, *_ = map(raw, read(database))
    assert tea == RawItem(
        "memory",
        made_id(101),
        {
            "id": made_id(101),
            "content": "tea",
            "user_id": "anna",
            # What the application itself wrote stays.
            "metadata": {
                "app": "cursor",
                "source_app": "mine",
                "n": 1,
                "access_count": 3,
                "last_accessed_at": AT.format(3),
            },
            "categories": ["drinks", "weather"],
            "created_at": AT.format(1),
            "updated_at": AT.format(2),
        },
        "memories 1",
    )
    assert (rain.data["user_id"], rain.state, rain.lifecycle) == ("ben", "archived", {"archived_at": AT.format(2)})
    assert rain.data["metadata"] == {"app": "claude", "source_app": "claude"}
    assert (jazz.state, jazz.lifecycle, jazz.data["categories"]) == ("paused", {}, [])
    assert jazz.data["metadata"]["access_count"] == 1
    assert jazz.data["metadata"]["last_accessed_at"] is None
    assert (gone.state, gone.data["metadata"]) == ("deleted", {})
    assert gone.lifecycle == {"archived_at": AT.format(2), "deleted_at": AT.format(3)}


def test_changes_of_states_become_the_history(database: Path) -> None:
    *_, change, other = map(raw, read(database))
    assert change == RawItem(
        "history",
        made_id(201),
        {
            "table": "memory_status_history",
            "id": made_id(201),
            "memory_id": made_id(102),
            "user_id": "ben",
            "changed_by": "ben",
            "old_state": "active",
            "new_state": "archived",
            "changed_at": AT.format(2),
        },
        "memory_status_history 1",
    )
    assert (other.data["user_id"], other.data["changed_by"]) == ("anna", made_id(9))


def test_a_database_says_what_it_has(database: Path) -> None:
    info = OpenMemorySource(database).describe()
    assert (info.name, info.counts, info.dims) == ("openmemory", {"memory": 4, "history": 2}, None)
    assert info.size_bytes == database.stat().st_size


def test_reading_is_taken_up_behind_every_item(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_resumes(database)
    whole = read(database)
    monkeypatch.setattr(sqlite_rows, "PAGE_ROWS", 1)
    assert read(database) == whole
    assert_resumes(database)


def test_a_database_of_an_older_version_has_fewer_tables(database: Path) -> None:
    execute(database, "drop table memory_categories; drop table memory_access_logs; drop table memory_status_history")
    found = [raw(each) for each in read(database)]
    assert [each.data["categories"] for each in found] == [[], [], [], []]
    assert found[0].data["metadata"] == {"app": "cursor", "source_app": "mine", "n": 1}
    assert OpenMemorySource(database).describe().counts == {"memory": 4}
    assert_resumes(database)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("update memories set user_id = 'x' where id = '{}'", "not-mapped"),
        ("update memories set state = 'ACTIVE' where id = '{}'", "bad-json"),
        ("update memories set metadata = '[1]' where id = '{}'", "bad-json"),
        ("update memories set metadata = '{{' where id = '{}'", "bad-json"),
        ("update memories set metadata = '{{\"a\": Infinity}}' where id = '{}'", "bad-number"),
        ("update memories set content = cast(x'ff' as text) where id = '{}'", "bad-text"),
        ("update memories set content = 'a' || char(0) where id = '{}'", "bad-text"),
        ("update categories set name = cast(x'ff' as text) where id = '{}'", "bad-text"),
        ("update users set user_id = 'a' || char(0)", "bad-text"),
    ],
)
def test_one_bad_row_is_refused_and_the_next_is_read(change: str, reason: str, database: Path) -> None:
    execute(database, change.format(DRINKS if "categories" in change else TEA))
    refused, *others = read(database)
    assert isinstance(refused, Refusal)
    assert (refused.reason, refused.item.source_id) == (reason, made_id(101))
    assert refused.reason in REASONS
    assert len(others) == 5
    text = json.dumps(item_as_data(refused.item), allow_nan=False).encode()
    assert item_from_data(json.loads(text)) == refused.item
    assert_resumes(database)


def test_a_change_of_a_memory_that_is_not_there_dangles(database: Path) -> None:
    execute(
        database,
        f"delete from memories where id = '{RAIN}'; update memory_status_history set new_state = x'ff' where id = '{OTHER_CHANGE}'",
    )
    *_, dangling, damaged = read(database)
    assert isinstance(dangling, Refusal)
    assert (dangling.reason, dangling.item.kind) == ("dangling", "history")
    assert made_id(102) in dangling.detail
    assert isinstance(damaged, Refusal)
    assert (damaged.reason, damaged.item.source_id) == ("bad-text", made_id(202))
    assert_resumes(database)


def test_the_identity_is_of_what_is_read(database: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    copy.write_bytes(database.read_bytes())
    first = OpenMemorySource(database).describe().identity
    assert OpenMemorySource(copy).describe().identity == first
    execute(database, "update configs set value = '{}'")
    assert OpenMemorySource(database).describe().identity == first
    identities = {first}
    for change in (
        "update memories set content = 'sea' where content = 'tea'",
        "update users set user_id = 'hanna' where user_id = 'anna'",
        "update apps set name = 'vim' where name = 'cursor'",
        "delete from memory_categories where rowid = 1",
        "delete from memory_access_logs where rowid = 1",
        "update memory_status_history set new_state = 'paused'",
    ):
        execute(database, change)
        identities.add(OpenMemorySource(database).describe().identity)
    assert len(identities) == 7


def test_keys_of_the_configuration_are_never_read(database: Path) -> None:
    found = json.dumps([item_as_data(raw(each)) for each in read(database)])
    assert "tea" in found
    assert "sk-very-secret" not in found


@pytest.mark.parametrize("position", ["", "memories", "memories x", "users 1", "zip 0 1"])
def test_a_position_of_another_source_is_refused(position: str, database: Path) -> None:
    with pytest.raises(SourceDataError, match="no position"):
        read(database, position)


def test_what_is_no_database_of_openmemorys_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    execute(path, "create table memories (id, memory); create table users (id); create table apps (id)")
    for use in (OpenMemorySource(path).describe, lambda: read(path)):
        with pytest.raises(
            SourceDataError, match="no database of OpenMemory's; its tables are `apps`, `memories`, `users`"
        ):
            use()
    with pytest.raises(SourceDataError, match="is no file"):
        read(tmp_path / "y.db")
    (tmp_path / "z.db").write_bytes(b"hello" * 1000)
    with pytest.raises(SourceDataError, match="not a database"):
        read(tmp_path / "z.db")


def spelled(number: int, *, dashes: bool) -> str:
    return str(uuid.UUID(int=number)) if dashes else uuid.UUID(int=number).hex


def export(*, dashes: bool = True, user: str = "anna", **changed: Any) -> dict[str, Any]:
    def id_of(number: int) -> str:
        return spelled(number, dashes=dashes)

    at = "2026-01-01T10:00:00+00:00"
    memory = {"user_id": id_of(1), "app_id": id_of(11), "created_at": at, "updated_at": at, "deleted_at": None}
    return {
        "user": {"id": id_of(1), "user_id": user, "name": None, "email": None, "metadata": {}},
        "apps": [{"id": id_of(11), "owner_id": id_of(1), "name": "cursor"}],
        "categories": [{"id": id_of(21), "name": "weather"}, {"id": id_of(22), "name": "drinks"}],
        "memories": [
            {
                **memory,
                "id": id_of(101),
                "content": "tea",
                "metadata": {"n": 1},
                "state": "archived",
                "archived_at": at,
                "category_ids": [id_of(21), id_of(22)],
            },
            {**memory, "id": id_of(102), "content": "rain", "metadata": None, "state": "active", "category_ids": []},
        ],
        "memory_categories": [{"memory_id": id_of(101), "category_id": id_of(21)}],
        "status_history": [
            {
                "id": id_of(201),
                "memory_id": id_of(101),
                "changed_by": id_of(1),
                "old_state": "active",
                "new_state": "archived",
                "changed_at": at,
            }
        ],
        "access_controls": [],
        "export_meta": {"version": "1"},
        **changed,
    }


def zipped(path: Path, content: Mapping[str, Any] | str | None, *, folder: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("memories.jsonl.gz", gzip.compress(b""))
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content, indent=2)
            archive.writestr(f"{folder}memories.json", text)
    return path


@pytest.mark.parametrize("folder", ["", "backup/"])
@pytest.mark.parametrize("dashes", [True, False])
def test_a_zip_of_either_program_is_read(dashes: bool, folder: str, tmp_path: Path) -> None:
    path = zipped(tmp_path / "anna.zip", export(dashes=dashes), folder=folder)
    at = "2026-01-01T10:00:00+00:00"
    tea, rain, change = map(raw, read(path))
    assert tea.data == {
        "id": made_id(101),
        "content": "tea",
        "user_id": "anna",
        "metadata": {"app": "cursor", "source_app": "cursor", "n": 1},
        "categories": ["drinks", "weather"],
        "created_at": at,
        "updated_at": at,
    }
    assert (tea.source_id, tea.state, tea.lifecycle) == (made_id(101), "archived", {"archived_at": at})
    assert (rain.source_id, rain.state, rain.data["categories"]) == (made_id(102), "active", [])
    assert (change.kind, change.source_id) == ("history", made_id(201))
    assert (change.data["memory_id"], change.data["user_id"], change.data["changed_by"]) == (
        made_id(101),
        "anna",
        "anna",
    )
    assert_resumes(path)


def test_a_zip_whose_user_comes_last_is_read(tmp_path: Path) -> None:
    content = export()
    path = zipped(tmp_path / "x.zip", {**{key: content[key] for key in reversed(content)}})
    assert sorted(raw(each).kind for each in read(path)) == ["history", "memory", "memory"]
    assert {raw(each).data["user_id"] for each in read(path)} == {"anna"}


def test_several_zips_are_read_one_after_the_other(tmp_path: Path) -> None:
    anna = zipped(tmp_path / "anna.zip", export())
    ben = zipped(tmp_path / "ben.zip", export(user="ben"))
    source = OpenMemorySource([anna, ben])
    assert [raw(each).data["user_id"] for each in read(source)] == ["anna"] * 3 + ["ben"] * 3
    assert_resumes(source)
    info = source.describe()
    assert (info.name, info.counts) == ("openmemory", {})
    assert info.size_bytes == anna.stat().st_size + ben.stat().st_size


def test_the_identity_of_zips_is_of_their_content(tmp_path: Path) -> None:
    anna, ben = zipped(tmp_path / "anna.zip", export()), zipped(tmp_path / "ben.zip", export(user="ben"))
    copy = tmp_path / "copy.zip"
    copy.write_bytes(anna.read_bytes())
    identity = OpenMemorySource(anna).describe().identity
    assert OpenMemorySource(copy).describe().identity == identity
    others = [OpenMemorySource(paths).describe().identity for paths in (ben, [anna, ben], [ben, anna])]
    assert len({identity, *others}) == 4


@pytest.mark.parametrize(
    ("memory", "reason"),
    [
        ({"user_id": made_id(2)}, "not-mapped"),
        ({"state": "lost"}, "bad-json"),
        ({"metadata": "text"}, "bad-json"),
        ("text", "bad-json"),
        ({"content": "\ud800"}, "bad-text"),
        ({"content": float("nan")}, "bad-number"),
    ],
)
def test_one_bad_memory_of_a_zip_is_refused(memory: Any, reason: str, tmp_path: Path) -> None:
    content = export()
    bad = {**content["memories"][0], **memory} if isinstance(memory, dict) else memory
    content["memories"].insert(1, bad)
    path = zipped(tmp_path / "x.zip", content)
    good, refused, *others = read(path)
    assert isinstance(refused, Refusal)
    assert refused.reason == reason
    assert [raw(each).source_id for each in (good, *others)] == [made_id(101), made_id(102), made_id(201)]
    text = json.dumps(item_as_data(refused.item), allow_nan=False).encode()
    assert item_from_data(json.loads(text)) == refused.item
    assert_resumes(path)


def test_a_category_without_a_name_is_known_by_its_id(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", export(categories=[{"id": made_id(21), "name": "weather"}]))
    assert raw(read(path)[0]).data["categories"] == [made_id(22), "weather"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no `memories.json`"),
        (export(user=None), "whose memories"),  # type: ignore[arg-type]
        ({"memories": []}, "whose memories"),
        ("[]", "is no JSON: it has `\\["),
        ("", "ends at byte 0"),
        (json.dumps(export())[:-200], "ends inside"),
    ],
)
def test_a_zip_that_is_no_export_is_said_to_be_none(content: Any, said: str, tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", content)
    for use in (OpenMemorySource(path).describe, lambda: read(path)):
        with pytest.raises(SourceDataError, match=said) as error:
            use()
        assert str(path) in error.value.message


def test_a_damaged_zip_is_said_to_be_damaged(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", export())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceDataError, match="damaged"):
        read(path)
    at = content.index(b"memories.json", content.index(b"memories.json") + 20) + 200
    path.write_bytes(content[:at] + b"\0" * 50 + content[at + 50 :])
    with pytest.raises(SourceDataError, match="damaged"):
        read(path)


def test_an_encrypted_zip_is_said_to_be_encrypted(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", export())
    content = bytearray(path.read_bytes())
    # Its flag, in the directory at the end and in front of the member.
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 8] |= 1
    content[content.rindex(b"PK\x03\x04") + 6] |= 1
    path.write_bytes(content)
    with pytest.raises(SourceDataError, match="is encrypted"):
        read(path)


def test_a_database_does_not_mix_with_zips(database: Path, tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", export())
    for paths in ([database, path], [database, database], []):
        with pytest.raises(SourceDataError, match="must all be zips"):
            read(OpenMemorySource(paths))


@pytest.mark.parametrize("position", ["", "memories 1", "zip 1 0", "zip 0", "zip 0 x", "zip -1 0"])
def test_a_position_that_is_none_of_these_zips_is_refused(position: str, tmp_path: Path) -> None:
    with pytest.raises(SourceDataError, match="no position"):
        read(zipped(tmp_path / "x.zip", export()), position)


POINT = {"id": made_id(101), "vector": list(FLOATS), "payload": {"data": "tea", "vector": [9.0]}}
OTHER = {"id": uuid.UUID(int=102).hex, "vector": {"": [2.0, 3.0], "bm25": {"indices": [1], "values": [0.5]}}}
EXPORTS = {
    "lines": f"{json.dumps(POINT)}\n{json.dumps(OTHER)}\n",
    "an answer": json.dumps(
        {"time": 0.1, "result": {"next_page_offset": None, "points": [POINT, OTHER]}, "status": "ok"}
    ),
    "answers": "\n".join(json.dumps({"result": {"points": [each]}}) for each in (POINT, OTHER)),
    "points": json.dumps({"points": [POINT, OTHER]}),
    "a list": json.dumps([POINT, OTHER], indent=1),
    "a list of answers": json.dumps([{"result": {"points": [POINT]}}, {"result": [OTHER]}]),
}


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("kind", EXPORTS)
def test_vectors_of_an_export_of_qdrant_are_carried(kind: str, is_packed: bool, database: Path, tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    path.write_bytes(gzip.compress(EXPORTS[kind].encode()) if is_packed else EXPORTS[kind].encode())
    source = OpenMemorySource(database, PointsExport(path))
    tea, rain, jazz, *_ = map(raw, read(source))
    assert struct.pack("<4f", *tea.vector or ()) == struct.pack("<4f", *FLOATS)
    assert rain.vector == (2.0, 3.0)
    assert jazz.vector is None
    assert source.describe().dims == 4
    assert source.describe().identity != OpenMemorySource(database).describe().identity
    assert_resumes(source)
    in_zip, *_ = map(raw, read(OpenMemorySource(zipped(tmp_path / "x.zip", export()), PointsExport(path))))
    assert in_zip.vector == tea.vector


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        ('["x"]', "bad-vector"),
        ("[1e39]", "bad-vector"),
        ("[1, NaN]", "bad-vector"),
        ('"AACA"', "wrong-dims"),
        ('{"a": [1], "b": [2]}', "bad-vector"),
    ],
)
def test_a_memory_whose_vector_is_bad_is_refused(vector: str, reason: str, database: Path, tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_text(f'{{"id": "{made_id(101)}", "vector": {vector}}}\n{json.dumps(OTHER)}\n')
    refused, rain, *others = read(OpenMemorySource(database, PointsExport(path)))
    assert isinstance(refused, Refusal)
    assert (refused.reason, refused.item.source_id) == (reason, made_id(101))
    assert raw(rain).vector == (2.0, 3.0)
    assert len(others) == 4


@pytest.mark.parametrize("vector", ["null", "[]", "{}", '{"bm25": {"indices": []}}'])
def test_a_point_without_a_vector_has_none(vector: str, tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_text(f'{{"id": 7, "vector": {vector}}}\n')
    with point_vectors(path) as vectors:
        assert vectors.find_many(["7", "8"]) == {}
    assert find_dims(path) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"id": 1, "vector": [1]}\n{"id": 2, "vector": [1', "ends inside"),
        ('{"id": 1, "vector": [1]}\n{"name": "x"}', "no point of Qdrant's"),
        ('{"id": 1, "vector": [1]}\nhello', "no JSON: it has `h`"),
        ("", None),
    ],
)
def test_a_damaged_export_of_vectors_ends_the_reading(
    content: str, said: str | None, database: Path, tmp_path: Path
) -> None:
    path = tmp_path / "points.jsonl"
    path.write_text(content)
    if said is None:
        assert len(read(OpenMemorySource(database, PointsExport(path)))) == 6
        return
    with pytest.raises(SourceDataError, match=said):
        read(OpenMemorySource(database, PointsExport(path)))


def test_the_temporary_file_goes_also_when_reading_is_left(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    path = tmp_path / "points.jsonl"
    path.write_text(EXPORTS["lines"])
    items = OpenMemorySource(database, PointsExport(path)).read()
    next(items)
    assert list((tmp_path / "tmp").iterdir())
    items.close()  # type: ignore[attr-defined]
    assert not list((tmp_path / "tmp").iterdir())


def traced_peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["database", "zip"])
def test_memory_stays_flat(kind: str, database: Path, tmp_path: Path) -> None:
    def peak(count: int) -> int:
        ids = [uuid.UUID(int=1000 + number).hex for number in range(count)]
        path = database
        if kind == "database":
            execute(database, "delete from memories; delete from memory_status_history")
            row = (ANNA, CURSOR, "x" * 200, None, "{}", "active", AT, AT, None, None)
            insert(database, "memories", *[(each, *row) for each in ids])
        else:
            memories = [{"id": each, "content": "x" * 200, "metadata": {}, "state": "active"} for each in ids]
            path = zipped(tmp_path / "x.zip", export(memories=memories, status_history=[]))

        def work() -> None:
            assert sum(1 for each in OpenMemorySource(path).read() if isinstance(each, RawItem)) == count

        return traced_peak(work)

    # Chunks and what Python keeps for itself; the items alone would be several times as much.
    assert peak(20_000) - peak(2_000) < 1_000_000


def test_memory_stays_flat_with_vectors(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"

    def peak(count: int) -> int:
        path.write_text("\n".join(json.dumps({"id": made_id(at), "vector": [0.5] * 32}) for at in range(count)))

        def work() -> None:
            with point_vectors(path) as vectors:
                (found,) = vectors.find_many([made_id(count - 1), "none"]).values()
                assert not isinstance(found, Problem)
                assert tuple(found) == (0.5,) * 32

        return traced_peak(work)

    assert peak(20_000) - peak(2_000) < 1_000_000
