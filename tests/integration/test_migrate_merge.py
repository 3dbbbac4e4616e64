"""What becomes of rows that meet other versions of themselves, and of what belongs to a memory that is another user's."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from memharbor.migrate.record import RawItem, Refusal
from tests.integration.test_migrate_load import Runner, both, database, memory, runner, vector
from tests.schema_databases import DIMS

__all__ = ["database", "runner"]

Items = list[RawItem | Refusal]


def edge(first: RawItem, second: RawItem, **fields: Any) -> RawItem:
    data = {
        "source_memory_id": first.source_id,
        "target_memory_id": second.source_id,
        "relationship_type": "about",
        "strength": 0.5,
        "metadata": {"seen": 1},
        "created_at": "2025-01-01T00:00:00Z",
        **fields,
    }
    return RawItem("relationship", str(uuid.UUID(int=7)), data, "9")


def zero(sign: float) -> tuple[float, ...]:
    return (sign * 0.0, *vector("any")[1:])


CHANGES = {
    "a sign of zero": (memory(1, vector=zero(1.0)), memory(1, vector=zero(-1.0))),
    "archived_at": tuple(
        replace(memory(1), state="archived", lifecycle={"archived_at": f"2025-01-0{day}T00:00:00Z"}) for day in (1, 2)
    ),
    "deleted_at": tuple(
        replace(memory(1), state="deleted", lifecycle={"deleted_at": f"2025-01-0{day}T00:00:00Z"}) for day in (1, 2)
    ),
    "strength": (edge(memory(1), memory(2)), edge(memory(1), memory(2), strength=0.25)),
    "metadata of an edge": (edge(memory(1), memory(2)), edge(memory(1), memory(2), metadata={})),
    "created_at of an edge": (edge(memory(1), memory(2)), edge(memory(1), memory(2), created_at="2025-01-02")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_version_that_differs_anywhere_is_another_one(runner: Runner, name: str) -> None:
    before, after = CHANGES[name]
    ends: Items = [memory(1), memory(2)] if before.kind == "relationship" else []
    runner.run([*ends, before])
    assert both(runner, [*ends, after])["skipped"] == 1
    assert both(runner, [*ends, after], on_conflict="overwrite")["updated"] == 1
    assert both(runner, [*ends, after])["same"] == len(ends) + 1
    assert both(runner, [*ends, before])["skipped"] == 1


def test_a_text_that_is_overwritten_loses_the_embedding_of_the_one_before(runner: Runner) -> None:
    """It would be found by what it said before, and never be embedded again."""
    kept, changed = memory(1), memory(2)
    entity = RawItem("entity", str(uuid.UUID(int=8)), {"data": "Berlin", "user_id": "alice"}, "3", vector("e"))
    runner.run([kept, changed, entity])
    items: Items = [
        memory(1, vector=None, weight=9),
        memory(2, vector=None, data="likes coffee"),
        replace(entity, data={"data": "Paris", "user_id": "alice"}, vector=None),
    ]
    assert both(runner, items, on_conflict="overwrite") == {"read": 3, "updated": 3}
    found = runner.connection.execute(
        "select memory, embedding is null from memharbor.memories union all"
        " select payload ->> 'data', vector is null from memharbor.entities order by 1"
    ).fetchall()
    assert found == [("Paris", True), ("fact 1", False), ("likes coffee", True)]
    assert len(vector("x")) == DIMS


def test_nothing_is_hung_on_a_memory_that_is_another_user_s(runner: Runner) -> None:
    theirs, own = memory(1, "mallory"), memory(2)
    runner.run([theirs, own])
    change = {"memory_id": theirs.source_id, "operation": "update", "old_value": {"data": "alice's secret"}}
    items: Items = [
        edge(theirs, own, user_id="alice"),
        RawItem("history", "c1", {**change, "user_id": "alice", "changed_at": "2024-05-01T12:00:00Z"}, "10"),
        # Of nobody, and no memory that could tell whose: an erasure would never find it.
        RawItem("history", "c2", {**change, "memory_id": str(uuid.UUID(int=99))}, "11"),
    ]
    assert both(runner, items) == {"read": 3, "refused": 3}


def test_changes_without_a_time_come_once(runner: Runner) -> None:
    """As Mem0 0.1 and 1.x write a deletion."""
    one = memory(1)
    change = {"memory_id": one.source_id, "event": "DELETE", "old_memory": "fact 1"}
    items: Items = [
        one,
        RawItem("history", "c", change, "2"),
        RawItem("history", "d", {**change, "user_id": "alice"}, "3"),
    ]
    done = both(runner, items, batch_size=2)
    assert done == {"read": 3, "inserted": 2, "skipped": 1}
    assert both(runner, items) == {"read": 3, "same": 2, "skipped": 1}
    query = "select user_id, operation, changed_at from memharbor.memory_history where operation = 'delete'"
    ((user, _, at),) = runner.connection.execute(query).fetchall()
    assert user == "alice"
    assert isinstance(at, datetime)


def test_what_was_met_is_noted_again_where_the_note_was_lost(runner: Runner) -> None:
    items: Items = [memory(1, data="likes tea"), memory(2), memory(3, data="likes tea"), memory(2, data="another")]
    pipeline, loader, folder = runner.begin(items, batch_size=2)
    whole = both(runner, items, batch_size=2)
    runner.connection.execute("delete from memharbor.memories")
    # Killed after its first segment, and the note is gone.
    source = pipeline.plan.source
    source.items = items[:2]  # type: ignore[attr-defined]
    pipeline.run("transform", loader, runner.texts)
    source.items = items  # type: ignore[attr-defined]
    (folder.path / "read" / "complete.json").unlink()
    (folder.path / "seen.sqlite").unlink()
    pipeline.run("verify", loader, runner.texts)
    found = {name: count for name, count in pipeline.report().as_data().items() if name != "reasons" and count}
    assert found == whole == {"read": 4, "inserted": 2, "skipped": 1, "refused": 1}
