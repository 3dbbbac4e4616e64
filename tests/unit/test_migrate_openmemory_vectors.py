"""OpenMemory's embeddings from where its vector store keeps them: asked for page by page, and by which options."""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from memharbor.errors import ConfigError, SourceDataError, UsageError
from memharbor.migrate.opening import DSN_VARIABLE, SourceSpec, open_source
from memharbor.migrate.record import RawItem, Refusal
from memharbor.migrate.sources import openmemory_zip, sqlite_rows
from memharbor.migrate.sources.json_values import Problem
from memharbor.migrate.sources.openmemory import OpenMemorySource
from tests.unit.test_migrate_openmemory import ANNA, AT, CURSOR, SCHEMA, execute, export, insert, made_id, zipped

DSN = "postgresql://nobody:hush@127.0.0.1:1/none"  # pragma: allowlist secret


class Store:
    """Embeddings of a dictionary, which remembers what it was asked for."""

    def __init__(self, vectors: Mapping[str, Sequence[float] | Problem]) -> None:
        self.vectors = vectors
        self.asked: list[list[str]] = []
        self.is_open = False

    def describe(self) -> tuple[str, int | None]:
        return f"a dictionary of {len(self.vectors)}", 2

    @contextmanager
    def lend(self) -> Iterator[Store]:
        self.is_open = True
        try:
            yield self
        finally:
            self.is_open = False

    def find_many(self, ids: Sequence[str]) -> Mapping[str, Sequence[float] | Problem]:
        assert self.is_open
        self.asked.append(list(ids))
        return {each: self.vectors[each] for each in ids if each in self.vectors}


def database(folder: Path, count: int, *, ids: Sequence[str] | None = None) -> Path:
    path = folder / "openmemory.db"
    execute(path, SCHEMA)
    insert(path, "users", (ANNA, "anna", None, None, "{}", AT, AT))
    insert(path, "apps", (CURSOR, ANNA, "cursor", None, "{}", 1, AT, AT))
    row = (ANNA, CURSOR, "tea", None, "{}", "active", AT.format(1), AT.format(1), None, None)
    names = ids or [uuid.UUID(int=number + 1).hex for number in range(count)]
    insert(path, "memories", *[(each, *row) for each in names])
    insert(path, "memory_status_history", ("h", names[0], ANNA, "active", "paused", AT.format(2)))
    return path


def zip_of(folder: Path, count: int) -> Path:
    memories = [{"id": made_id(number + 1), "content": "tea", "state": "active"} for number in range(count)]
    return zipped(folder / "anna.zip", export(memories=memories))


def vectors_of(items: Sequence[RawItem | Refusal]) -> dict[str, Any]:
    return {item.source_id: item.vector for item in items if isinstance(item, RawItem) and item.kind == "memory"}


@pytest.mark.parametrize("make", [database, zip_of])
def test_embeddings_are_asked_for_page_by_page(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_rows, "PAGE_ROWS", 4)
    monkeypatch.setattr(openmemory_zip, "_BATCH_ITEMS", 4)
    path = make(tmp_path, 10)
    store = Store({made_id(2): (1.0, 2.0), made_id(10): (3.0, 4.0), made_id(11): (5.0, 6.0)})
    source = OpenMemorySource(path, store)
    items = list(source.read())
    found = vectors_of(items)
    assert len(found) == 10
    assert {key: each for key, each in found.items() if each} == {made_id(2): (1.0, 2.0), made_id(10): (3.0, 4.0)}
    assert [each for page in store.asked for each in page] == [made_id(number + 1) for number in range(10)]
    assert max(map(len, store.asked)) <= 4
    assert not store.is_open
    for at, item in enumerate(items, 1):
        position = item.item.position if isinstance(item, Refusal) else item.position
        assert list(source.read(position)) == items[at:]


def test_large_items_of_a_zip_are_held_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmemory_zip, "_BATCH_BYTES", 100)
    memories = [{"id": made_id(number), "content": "x" * 200, "state": "active"} for number in range(3)]
    store = Store({made_id(1): (1.0, 2.0)})
    items = list(OpenMemorySource(zipped(tmp_path / "x.zip", export(memories=memories)), store).read())
    assert vectors_of(items)[made_id(1)] == (1.0, 2.0)
    assert [page for page in store.asked if page] == [[made_id(0)], [made_id(1)], [made_id(2)]]


def test_a_bad_embedding_refuses_its_memory_and_no_other(tmp_path: Path) -> None:
    store = Store({made_id(1): Problem("bad-vector", "it is odd"), made_id(2): (1.0, 2.0)})
    refused, second, *_ = OpenMemorySource(database(tmp_path, 2), store).read()
    assert isinstance(refused, Refusal)
    assert (refused.reason, refused.detail, refused.item.source_id) == ("bad-vector", "it is odd", made_id(1))
    assert isinstance(second, RawItem)
    assert second.vector == (1.0, 2.0)


def test_an_id_that_cannot_be_read_is_not_asked_for(tmp_path: Path) -> None:
    store = Store({})
    path = database(tmp_path, 2, ids=["plain", uuid.UUID(int=7).hex])
    execute(path, "update memories set id = cast(x'ff' as text) where id = 'plain'")
    first, *_ = OpenMemorySource(path, store).read()
    assert isinstance(first, Refusal)
    assert first.reason == "bad-text"
    assert store.asked == [[made_id(7)]]


def test_the_identity_is_of_the_embeddings_too(tmp_path: Path) -> None:
    path = database(tmp_path, 1)
    plain = OpenMemorySource(path).describe()
    first = OpenMemorySource(path, Store({})).describe()
    other = OpenMemorySource(path, Store({made_id(1): (1.0, 2.0)})).describe()
    assert (plain.dims, first.dims) == (None, 2)
    assert first.identity == f"{plain.identity}, vectors a dictionary of 0"
    assert other.identity != first.identity


def test_only_one_place_of_the_embeddings_is_named(tmp_path: Path) -> None:
    path = str(database(tmp_path, 1))
    both = SourceSpec("openmemory", (path,), collection="openmemory", vectors="points.jsonl")
    with pytest.raises(UsageError, match="both say where"), open_source(both, environ={DSN_VARIABLE: DSN}):
        pass


def test_a_table_of_embeddings_needs_the_address_of_its_database(tmp_path: Path) -> None:
    spec = SourceSpec("openmemory", (str(database(tmp_path, 1)),), collection="openmemory")
    with (
        pytest.raises(ConfigError, match="the database that has the embeddings") as caught,
        open_source(spec, environ={}),
    ):
        pass
    assert DSN_VARIABLE in caught.value.hints[0]


def test_a_database_without_a_collection_asks_for_no_address(tmp_path: Path) -> None:
    spec = SourceSpec("openmemory", (str(database(tmp_path, 1)),))
    with open_source(spec, environ={DSN_VARIABLE: DSN}) as source:
        assert vectors_of(list(source.read())) == {made_id(1): None}


def test_points_of_qdrant_are_found_by_their_option(tmp_path: Path) -> None:
    points = tmp_path / "points.jsonl"
    points.write_text(f'{{"id": "{made_id(1)}", "vector": [0.5, 1.5]}}')
    spec = SourceSpec("openmemory", (str(database(tmp_path, 1)),), vectors=str(points))
    with open_source(spec, environ={}) as source:
        (found,) = vectors_of(list(source.read())).values()
        assert tuple(found) == (0.5, 1.5)
    missing = SourceSpec("openmemory", spec.paths, vectors=str(tmp_path / "none.jsonl"))
    with open_source(missing, environ={}) as source, pytest.raises(SourceDataError, match=r"none\.jsonl"):
        source.describe()


def test_no_password_is_in_a_message(tmp_path: Path) -> None:
    spec = SourceSpec("openmemory", (str(database(tmp_path, 1)),), collection="openmemory")
    broken = DSN.replace("hush", "hush%ZZ")
    with open_source(spec, environ={DSN_VARIABLE: broken}) as source, pytest.raises(ConfigError) as caught:
        source.describe()
    assert "libpq" in caught.value.message
    assert "hush" not in "".join(traceback.format_exception(caught.value))
