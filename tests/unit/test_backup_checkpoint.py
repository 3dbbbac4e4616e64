"""Checkpoints without a database: names, scopes, records, and the choice of the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from memharbor.backup import rollback
from memharbor.backup.changes import Change
from memharbor.backup.checkpoint import KEYS, Checkpoint, Checkpoints, Scope, check_name, summarise
from memharbor.backup.engine import Backup
from memharbor.backup.plan import RestorePlan
from memharbor.backup.rollback import plan_rollback
from memharbor.backup.rows import Fingerprint
from memharbor.backup.tables import SHARED_TABLES, USER_TABLES
from memharbor.errors import ConnectError, StateRefusedError, UsageError

GIB = 1024**3
TABLES = tuple(KEYS)
MADE = Checkpoint(
    "before", 3, datetime(2026, 1, 2, tzinfo=UTC), "checkpoint-before", 10 * GIB, 1, TABLES, None, True,
    copies={table: f"c3_{table}" for table in TABLES}, row_counts={"memories": 1000}, summary={"memories": [1, 2, "x"]},
)  # fmt: skip


def restore_plan(*, lsn: int = 10 * GIB - 112, timeline: int = 1, size_bytes: int = GIB) -> RestorePlan:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    segments = ("000000010000000000000001", "000000010000000000000002")
    backup = Backup("A", "full", at, at, size_bytes, GIB, 1, 9 * GIB, 9 * GIB, *segments, (), False, {})
    return RestorePlan(backup, timeline, "the point", ("--type=name",), target_lsn=lsn)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Plan with the answers of a database that are given."""

    def plan(made: Checkpoint, *, problem: str | None = None, changed: int = 10, **options: Any) -> Any:
        find_restore = options.pop("find_restore", restore_plan)
        monkeypatch.setattr(rollback, "_refuse_rows", lambda *_: problem)
        monkeypatch.setattr(rollback, "find_changes", lambda *_: {"memories": Change(0, changed, 0)})
        return plan_rollback(made, object(), find_restore, **options)  # type: ignore[arg-type]

    return plan


def test_every_table_of_users_and_of_all_is_covered_and_the_erase_ledger_is_not() -> None:
    assert {table.name for table in USER_TABLES} | {*SHARED_TABLES} <= set(KEYS)
    assert "erase_ledger" not in KEYS
    assert all(KEYS[table.name] == table.key for table in USER_TABLES)


@pytest.mark.parametrize("name", ["", "last", "a b", "../x", "-x", "x" * 49, "ü"])
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


def test_a_point_of_the_longest_name_is_one_that_postgresql_takes() -> None:
    assert len("checkpoint-" + check_name("x" * 48)) < 63


def test_a_scope_lists_its_tables_in_the_order_in_which_rows_go_in() -> None:
    assert Scope(("memory_history", "memories")).resolve(TABLES) == ("memories", "memory_history")
    assert Scope(user_id="a").resolve(TABLES) == tuple(table.name for table in USER_TABLES)
    assert "memory_history" not in Scope().resolve([table for table in TABLES if table != "memory_history"])
    with pytest.raises(UsageError, match="of a single user"):
        Scope(("categories",), "a").resolve(TABLES)


def test_a_record_reads_back_and_says_no_id() -> None:
    one = replace(MADE, user_sha256="ab" * 32, is_everything=False, tables=("memories",))
    assert Checkpoint.from_record(json.loads(json.dumps(one.as_record()))) == replace(
        one, copies=dict(one.copies), summary=dict(one.summary)
    )


def test_a_summary_changes_with_any_row_of_any_user_and_not_with_their_order() -> None:
    rows = [Fingerprint("a", "memories", 1, "x"), Fingerprint("b", "memories", 2, "y")]
    assert summarise(rows) == summarise(reversed(rows))
    for wrong in (rows[:1], [rows[0], replace(rows[1], digest="z")], [rows[0], replace(rows[1], user_sha256="c")]):
        assert summarise(wrong) != summarise(rows)


def test_copied_rows_are_put_back_where_that_is_cheaper(planned: Callable[..., Any]) -> None:
    plan = planned(MADE)
    assert plan.way == "copies"
    assert "restore takes about" in plan.why
    assert plan.seconds["copies"] < plan.seconds["restore"]


def test_a_restore_is_taken_where_so_much_changed_that_it_is_cheaper(planned: Callable[..., Any]) -> None:
    plan = planned(MADE, changed=1_000_000, find_restore=lambda: restore_plan(size_bytes=GIB // 10))
    assert plan.way == "restore"
    assert plan.seconds["restore"] < plan.seconds["copies"]


def test_changed_definitions_leave_only_the_restore(planned: Callable[..., Any]) -> None:
    plan = planned(MADE, problem="definitions are not as they were")
    assert plan.way == "restore"
    assert "copies is out: definitions are not as they were" in plan.why
    assert plan.changes is None


def test_a_part_is_never_rolled_back_by_restoring_the_whole(planned: Callable[..., Any]) -> None:
    part = replace(MADE, is_everything=False, tables=("memories",), user_sha256="ab" * 32)
    with pytest.raises(StateRefusedError, match="no way back") as refused:
        planned(part, problem="definitions are not as they were")
    assert refused.value.hints == ("to take everybody back: memharbor restore --name checkpoint-before",)
    assert planned(replace(part, copies={})).way == "restored-copy"


@pytest.mark.parametrize("found", [restore_plan(lsn=11 * GIB), restore_plan(lsn=9 * GIB), restore_plan(timeline=2)])
def test_another_point_of_the_same_name_is_not_taken(planned: Callable[..., Any], found: RestorePlan) -> None:
    with pytest.raises(StateRefusedError, match="is not this checkpoint's"):
        planned(replace(MADE, copies={}), find_restore=lambda: found)


def test_a_way_that_is_asked_for_is_taken_or_refused(planned: Callable[..., Any]) -> None:
    assert planned(MADE, wanted="restore").way == "restore"
    with pytest.raises(StateRefusedError, match="restored-copy: the rows were copied"):
        planned(MADE, wanted="restored-copy")


def test_without_a_database_the_restore_is_left() -> None:
    assert plan_rollback(MADE, None, restore_plan).way == "restore"
    with pytest.raises(StateRefusedError, match="does not answer"):
        plan_rollback(MADE, None, None)


def test_checkpoints_are_listed_also_where_the_database_is_down() -> None:
    class Kept:
        def get_all(self, folder: str) -> dict[str, dict[str, Any]]:
            return {f"{folder}/before.json": MADE.as_record()}

    def connect() -> Any:
        raise ConnectError("down")

    (found,) = Checkpoints(connect, Kept()).list()  # type: ignore[arg-type]
    assert (found.name, found.copies) == ("before", {})
    with pytest.raises(ConnectError):
        Checkpoints(connect, None).list()
