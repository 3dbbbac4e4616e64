"""What is decided about backups and restores without touching anything: parsing, choosing, refusing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memharbor.backup.engine import BackupEngine
from memharbor.backup.plan import parse_instant, plan_restore
from memharbor.backup.wal import SEGMENT_BYTES, Segment, find_gaps, format_lsn, leads_to, parse_lsn, parse_segment
from memharbor.containers import Finished
from memharbor.errors import ExternalToolError, StateRefusedError, UsageError

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def backup(label: str, *, timeline: int = 1, segment: int, hour: int, error: bool = False) -> dict[str, Any]:
    name = Segment(timeline, segment).name
    at = int(datetime(2026, 1, 1, hour, tzinfo=UTC).timestamp())
    return {
        "label": label,
        "type": "full",
        "timestamp": {"start": at - 60, "stop": at},
        "info": {"size": 1000, "repository": {"delta": 300}},
        "archive": {"start": name, "stop": name},
        "lsn": {"start": format_lsn(segment * SEGMENT_BYTES + 40), "stop": format_lsn(segment * SEGMENT_BYTES + 400)},
        "error": error,
    }


class FakeContainers:
    """Answers as pgBackRest in a container would, from a repository described in memory."""

    def __init__(self, backups: Sequence[dict[str, Any]], segments: Sequence[Segment], **extra: Any) -> None:
        self.backups, self.segments = backups, segments
        self.points: dict[str, str] = extra.get("points", {})
        self.histories: dict[int, str] = extra.get("histories", {})
        self.status: dict[str, Any] = extra.get("status", {"code": 0, "message": "ok"})
        self.commands: list[list[str]] = []

    def is_running(self, name: str) -> bool:
        return True

    def execute(self, name: str, command: Sequence[str], **_: Any) -> Finished:
        self.commands.append(list(command))
        text = " ".join(command)
        if "info" in command:
            stanza = {"name": "main", "status": self.status, "backup": list(self.backups), "repo": []}
            return Finished(0, json.dumps([stanza]), "")
        if "repo-ls" in command:
            files = [f"18-1/x/{segment.name}-ab.zst" for segment in self.segments]
            files += [f"18-1/{timeline:08X}.history" for timeline in self.histories]
            return Finished(0, json.dumps({file: {"type": "file"} for file in files} | {"18-1": {"type": "path"}}), "")
        if "repo-get" in command:
            timeline = int(command[-1].rsplit("/", 1)[-1][:8], 16)
            return Finished(0, self.histories[timeline], "")
        if "ls " in text:
            return Finished(0, "", "")
        named = [segment for segment in command if parse_segment(segment)]
        return Finished(0, "".join(f"segment {name}\n{self.points.get(name, '')}" for name in named), "")


def planned(containers: FakeContainers, *, at: datetime | None = None, name: str | None = None) -> Any:
    engine = BackupEngine(containers, "db", "main")  # type: ignore[arg-type]
    return plan_restore(engine, at=at, name=name)


def point(segment: Segment, name: str) -> dict[str, str]:
    lsn = format_lsn(segment.number * SEGMENT_BYTES + 1000)
    return {segment.name: f"rmgr: XLOG len: 98, lsn: {lsn}, prev 0/1, desc: RESTORE_POINT {name}\n"}


SEGMENTS = [Segment(1, number) for number in range(3, 12)]


def test_the_newest_backup_before_a_named_point_is_taken_not_the_newest_of_all() -> None:
    containers = FakeContainers(
        [backup("A", segment=4, hour=1), backup("B", segment=9, hour=2)], SEGMENTS, points=point(Segment(1, 6), "p")
    )
    plan = planned(containers, name="p")
    assert plan.backup.id == "A"
    assert plan.options == ("--type=name", "--target=p", "--target-timeline=1", "--target-action=promote")


def test_a_point_that_does_not_exist_is_refused() -> None:
    containers = FakeContainers([backup("A", segment=4, hour=1)], SEGMENTS, points=point(Segment(1, 6), "p"))
    with pytest.raises(StateRefusedError, match="no restore point `q`"):
        planned(containers, name="q")


def test_a_point_before_the_first_backup_is_refused() -> None:
    containers = FakeContainers([backup("A", segment=6, hour=1)], SEGMENTS, points=point(Segment(1, 5), "p"))
    with pytest.raises(StateRefusedError):
        planned(containers, name="p")


def test_a_point_on_an_abandoned_timeline_is_reached_on_that_timeline() -> None:
    # Timeline 2 left timeline 1 in segment 6; the point is on timeline 1, after that.
    containers = FakeContainers(
        [backup("A", segment=4, hour=1), backup("B", timeline=2, segment=8, hour=2)],
        [*SEGMENTS, *(Segment(2, number) for number in range(6, 12))],
        points=point(Segment(1, 8), "undo"),
        histories={2: f"1\t{format_lsn(6 * SEGMENT_BYTES)}\tbefore\n"},
    )
    plan = planned(containers, name="undo")
    assert (plan.backup.id, plan.timeline) == ("A", 1)


def test_to_the_end_never_takes_a_backup_of_an_abandoned_branch() -> None:
    containers = FakeContainers(
        [backup("A", segment=4, hour=1), backup("B", segment=9, hour=2)],
        [*SEGMENTS, Segment(2, 6), Segment(2, 7)],
        histories={2: f"1\t{format_lsn(6 * SEGMENT_BYTES)}\tbefore\n"},
    )
    assert planned(containers).backup.id == "A"


def test_a_moment_takes_the_newest_backup_that_had_ended() -> None:
    backups = [backup("A", segment=4, hour=1), backup("B", segment=6, hour=3), backup("C", segment=8, hour=5)]
    plan = planned(FakeContainers(backups, SEGMENTS), at=datetime(2026, 1, 1, 4, tzinfo=UTC))
    assert plan.backup.id == "B"
    assert "--target=2026-01-01 04:00:00.000000+0000" in plan.options


def test_damaged_backups_are_never_taken() -> None:
    backups = [backup("A", segment=4, hour=1), backup("B", segment=6, hour=3, error=True)]
    assert planned(FakeContainers(backups, SEGMENTS)).backup.id == "A"


@pytest.mark.parametrize(
    ("backups", "segments", "said"),
    [
        ([], SEGMENTS, "no backup to restore"),
        ([backup("A", segment=4, hour=1, error=True)], SEGMENTS, "no backup to restore"),
        ([backup("A", segment=4, hour=1)], [], "holds no WAL"),
    ],
)
def test_nothing_to_restore_is_refused_before_anything_runs(
    backups: list[dict[str, Any]], segments: list[Segment], said: str
) -> None:
    containers = FakeContainers(backups, segments)
    with pytest.raises(StateRefusedError, match=said):
        planned(containers)
    assert not any("restore" in command[-1] for command in containers.commands)


def test_a_repository_that_cannot_be_read_is_not_called_empty() -> None:
    containers = FakeContainers([], [], status={"code": 99, "message": "other"})
    with pytest.raises(ExternalToolError, match="cannot be read: other"):
        planned(containers)


def test_an_unknown_backup_names_the_next_command() -> None:
    engine = BackupEngine(FakeContainers([backup("A", segment=4, hour=1)], SEGMENTS), "db", "main")  # type: ignore[arg-type]
    with pytest.raises(StateRefusedError) as caught:
        engine.get_backup("B")
    assert caught.value.hints == ("run `memharbor backup list`",)


@pytest.mark.parametrize("text", ["yesterday", "2026-01-01T00:00:00", "2026-01-03T00:00:00Z", ""])
def test_a_time_that_says_too_little_or_lies_ahead_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_instant(text, now=NOW)


@given(st.integers(1, 0xFFFFFFFF), st.integers(0, 2**40 - 1))
def test_segment_names_round_trip(timeline: int, number: int) -> None:
    segment = Segment(timeline, number)
    assert parse_segment(segment.name) == segment


@given(st.integers(0, 2**64 - 1))
def test_lsns_round_trip(lsn: int) -> None:
    assert parse_lsn(format_lsn(lsn)) == lsn


@given(st.sets(st.integers(1, 60), min_size=1))
def test_a_gap_is_found_exactly_where_a_segment_is_missing(numbers: set[int]) -> None:
    missing = set(range(min(numbers), max(numbers))) - numbers
    found = find_gaps([Segment(1, number) for number in numbers])
    covered = {number for before, after in found for number in range(before.number + 1, after.number)}
    assert covered == missing


@pytest.mark.parametrize("name", ["00000002.history", "000000010000000000000003.partial", "x", "archive.info"])
def test_other_files_are_no_segments(name: str) -> None:
    assert parse_segment(name) is None


def test_a_backup_leads_only_down_its_own_branch() -> None:
    assert leads_to(1, 100, target_timeline=2, history={1: 100})
    assert not leads_to(1, 101, target_timeline=2, history={1: 100})
    assert not leads_to(3, 1, target_timeline=2, history={1: 100})
