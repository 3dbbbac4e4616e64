"""What the custodian purges, brings back and copies, decided without a store; and how the command line reads its answers."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memharbor.backup.custodian import Custodian, offsite_text, summarise_works, works_text
from memharbor.containers import Finished
from memharbor.errors import ConfigError, ConnectError, ExternalToolError, StateRefusedError
from memharbor_custodian.copying import CopyState, is_same
from memharbor_custodian.errors import RefusedError
from memharbor_custodian.places import Stored
from memharbor_custodian.versions import Entry, group, plan_purge, plan_undelete, plan_undelete_at, ulid_time

NOW = datetime(2026, 6, 30, 12, tzinfo=UTC)
KEEP = timedelta(days=30)
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # pragma: allowlist secret - its digits


def ulid(moment: datetime) -> str:
    milliseconds = round(moment.timestamp() * 1000)
    digits = []
    for _ in range(10):
        milliseconds, digit = divmod(milliseconds, 32)
        digits.append(CROCKFORD[digit])
    return "".join(reversed(digits)) + "0" * 16


def entry(key: str, days_ago: float, *, marker: bool = False) -> Entry:
    """An entry whose time is in its version ID; what the store says of it is wrong, as versitygw's is."""
    made_at = NOW - timedelta(days=days_ago)
    return Entry(key, ulid(made_at), marker, NOW - timedelta(minutes=1), 10)


FRESH = [entry("fresh", 0.1)]


def purge(*entries: Entry, now: datetime = NOW) -> tuple[list[Entry], list[Entry]]:
    plan = plan_purge(group([*FRESH, *entries]), now=now, keep=KEEP)
    return list(plan.versions), list(plan.tombstones)


@given(st.datetimes(min_value=datetime(1970, 1, 2), max_value=datetime(9999, 1, 1)))  # noqa: DTZ001 - made aware below
def test_the_time_of_a_ulid_is_read_to_the_millisecond(moment: datetime) -> None:
    aware = moment.replace(tzinfo=UTC)
    found = ulid_time(ulid(aware))
    assert found is not None
    assert abs(found - aware) <= timedelta(milliseconds=1)


@pytest.mark.parametrize("text", ["", "null", "3/L4kqtJlcpXroDTDmJ+rmSpXd3dIbrHY", "0" * 25, "Z" * 26, "I" * 26])
def test_another_version_id_is_no_ulid(text: str) -> None:
    assert ulid_time(text) is None


def test_age_counts_from_when_a_version_was_superseded() -> None:
    newest, recent, old = entry("k", 5), entry("k", 40), entry("k", 90)
    assert purge(newest, recent, old) == ([old], []), "made 40 days ago, but current until 5 days ago"


def test_a_current_version_is_never_purged_however_old() -> None:
    assert purge(entry("k", 4000)) == ([], [])


def test_a_deleted_object_goes_whole_once_the_promise_is_over() -> None:
    marker, version = entry("k", 31, marker=True), entry("k", 100)
    assert purge(marker, version) == ([version], [marker])
    assert purge(entry("k", 29, marker=True), version) == ([], [])


def test_a_delete_marker_stays_while_something_below_it_does() -> None:
    newest, marker, version = entry("k", 10, marker=True), entry("k", 40, marker=True), entry("k", 41)
    assert purge(newest, marker, version) == ([version], [])


def test_a_clock_that_was_set_back_makes_nothing_older() -> None:
    # The newest entry claims to be the oldest; the one below it was superseded when that was, at the earliest.
    wrong, version, older = entry("k", 300), entry("k", 10), entry("k", 200)
    assert older not in purge(wrong, version, older)[0]


@pytest.mark.parametrize("jump", [timedelta(days=-1), timedelta(days=20), timedelta(days=3650)])
def test_a_clock_that_contradicts_the_store_purges_nothing(jump: timedelta) -> None:
    with pytest.raises(RefusedError, match="clock"):
        purge(entry("k", 31, marker=True), entry("k", 100), now=NOW + jump)


@given(st.data())
def test_whatever_a_purge_does_the_state_within_the_promise_stays(data: st.DataObject) -> None:
    ages = sorted(data.draw(st.sets(st.integers(1, 100), min_size=1, max_size=8)))
    entries = [entry("k", age, marker=data.draw(st.booleans())) for age in ages]
    versions, tombstones = purge(*entries)
    left = [each for each in entries if each not in versions + tombstones]

    def at(days_ago: int, among: list[Entry]) -> Entry | None:
        found = next((each for each in among if each.made_at <= NOW - timedelta(days=days_ago)), None)
        return None if found is None or found.is_marker else found

    for days_ago in range(30):
        assert at(days_ago, left) == at(days_ago, entries)
    if not left:
        assert entries[0].is_marker


def test_undelete_removes_every_marker_above_the_newest_version() -> None:
    first, second, version = entry("k", 1, marker=True), entry("k", 2, marker=True), entry("k", 9)
    plan = plan_undelete(group([first, second, version, entry("kept", 3)]), since=NOW - KEEP)
    assert (plan.markers, plan.brought_back) == ((first, second), 1)


def test_undelete_leaves_what_was_deleted_before() -> None:
    again, before, version = entry("k", 1, marker=True), entry("k", 20, marker=True), entry("k", 25)
    assert plan_undelete(group([again, before, version]), since=NOW - timedelta(days=2)).brought_back == 0


def test_a_key_without_a_version_is_counted_as_gone() -> None:
    assert plan_undelete(group([entry("k", 1, marker=True)]), since=NOW - KEEP).gone == 1


def test_undelete_at_a_moment_brings_back_deleted_and_overwritten_and_leaves_the_rest() -> None:
    at = NOW - timedelta(days=5)
    deleted = [entry("deleted", 1, marker=True), entry("deleted", 9)]
    overwritten = [entry("overwritten", 1), entry("overwritten", 2), entry("overwritten", 9)]
    both = [entry("both", 1, marker=True), entry("both", 2), entry("both", 9)]
    rest = [entry("new", 1), entry("same", 9), entry("gone then", 1), entry("gone then", 6, marker=True)]
    plan = plan_undelete_at(group([*deleted, *overwritten, *both, *rest]), at=at)
    assert plan.markers == (deleted[0],)
    assert plan.copies == (overwritten[-1], both[-1])
    assert plan.brought_back == 3


def test_an_object_is_the_same_only_while_neither_side_changed() -> None:
    source, copied = Stored("k", "e1", 5), Stored("k", "e2-3", 5)
    state = CopyState(etags={"k": ["e1", "e2-3"]})
    assert is_same(source, copied, state)
    assert not is_same(Stored("k", "e9", 5), copied, state)
    assert not is_same(source, Stored("k", "damaged", 5), state)
    assert not is_same(source, Stored("k", "e1", 4), state)
    assert not is_same(source, None, state)


def test_a_damaged_state_counts_as_none() -> None:
    state = CopyState("id", "2026-01-01T00:00:00+00:00", 1, 2, {"k": ["a", "b"]})
    assert CopyState.parse(state.render()) == state
    assert CopyState.parse(b"{") == CopyState.parse(b'{"unknown": 1}') == CopyState.parse(b"[]") == CopyState()


class FakeContainers:
    """Answers every command in the custodian with the same lines."""

    def __init__(self, exit_code: int, *lines: dict[str, Any], stderr: str = "") -> None:
        self.done = Finished(exit_code, "".join(json.dumps(line) + "\n" for line in lines), stderr)
        self.commands: list[list[str]] = []

    def execute(self, name: str, command: list[str], *, on_line: Any = None) -> Finished:
        assert name == "dev-custodian-0"
        self.commands.append(command[1:])
        for line in self.done.stdout.splitlines() if on_line else ():
            on_line(line)
        return self.done


class FakeEngine:
    stanza = "main"

    def __init__(self) -> None:
        self.commands: list[str] = []

    def run_beside(self, command: list[str]) -> Finished:
        self.commands.append(command[-1])
        return Finished(0, "", "")


def custodian(containers: Any, engine: Any = None) -> Custodian:
    return Custodian(containers, {"custodian": ["dev-custodian-0"]}, engine or FakeEngine())  # type: ignore[arg-type]


def test_progress_and_result_are_told_apart() -> None:
    shares: list[float] = []
    containers = FakeContainers(0, {"progress": {"done": 1, "of": 4, "bytes": 9}}, {"result": {"copied": 4}})
    assert custodian(containers).copy(on_percent=shares.append) == {"copied": 4}
    assert shares == [25]


@pytest.mark.parametrize(
    ("exit_code", "error"), [(3, ConfigError), (4, ConnectError), (9, StateRefusedError), (6, ExternalToolError)]
)
def test_an_error_keeps_its_exit_code_and_its_hint(exit_code: int, error: type[Exception]) -> None:
    containers = FakeContainers(exit_code, {"error": {"message": "no", "hint": "do"}})
    with pytest.raises(error, match="no") as caught:
        custodian(containers).purge()
    assert caught.value.exit_code == exit_code  # type: ignore[attr-defined]
    assert caught.value.hints == ("do",)  # type: ignore[attr-defined]


def test_a_custodian_that_dies_says_its_last_words() -> None:
    with pytest.raises(ExternalToolError, match="MemoryError"):
        custodian(FakeContainers(1, stderr="MemoryError")).purge()


def test_a_stack_of_an_older_version_has_no_custodian() -> None:
    with pytest.raises(StateRefusedError, match="no custodian yet"):
        Custodian(FakeContainers(0), {}, FakeEngine())  # type: ignore[arg-type]


def test_archiving_rests_while_the_store_is_filled_and_goes_on_whatever_happens() -> None:
    engine = FakeEngine()
    custodian(FakeContainers(0, {"result": {}}), engine).fetch()
    assert engine.commands == ["stop", "start"]
    refused = FakeContainers(9, {"error": {"message": "no", "hint": ""}})
    with pytest.raises(StateRefusedError):
        custodian(refused, engine).fetch(replace=True)
    assert engine.commands == ["stop", "start"], "a refusal needs no rest"
    assert refused.commands == [["fetch", "--replace", "--dry-run"]]


def test_the_status_says_how_far_behind_the_copy_is() -> None:
    offsite = {
        "as_of": (NOW - timedelta(seconds=90)).isoformat(),
        "objects": 1200,
        "bytes": 2048,
        "is_versioned": False,
    }
    offsite |= {"waiting_objects": 3, "waiting_bytes": 10, "only_in_copy": 7}
    failed = {"ended_at": "T", "error": {"message": "cannot list the off-site copy"}}
    said = offsite_text({"offsite": offsite, "copy": failed}, now=NOW)
    for part in ("1,200 objects", "90 s ago", "3 objects", "7 objects", "no versions", "cannot list the off-site copy"):
        assert part in said
    assert "not complete yet" in offsite_text({"offsite": {**offsite, "as_of": None}, "copy": None}, now=NOW)


GOOD_COPY = {"last_good_at": "2026-06-30T11:55:00+00:00", "result": {}}


@pytest.mark.parametrize(
    ("copy", "interval_seconds", "said"),
    [
        (None, 300, "off-site copy not made yet"),
        (GOOD_COPY, 300, "off-site copy 5 min ago"),
        (GOOD_COPY, 60, "off-site copy 5 min ago, which is late"),
        (
            {"last_good_at": None, "error": {"message": "the off-site copy does not answer", "hint": ""}},
            60,
            "off-site copy not made yet; the last copy failed: the off-site copy does not answer",
        ),
    ],
)
def test_a_copy_that_is_late_or_failed_is_told(copy: dict[str, Any] | None, interval_seconds: int, said: str) -> None:
    works = {"offsite": {"interval_seconds": interval_seconds}, "copy": copy, "purge": None}
    assert works_text(summarise_works(works, now=NOW)) == said


def test_a_purge_that_failed_is_told_also_without_a_copy() -> None:
    failed = {"last_good_at": None, "error": {"message": "its lists are deleted", "hint": ""}}
    summary = summarise_works({"offsite": None, "copy": None, "purge": failed}, now=NOW)
    assert works_text(summary) == "no off-site copy; the last purge failed: its lists are deleted"
