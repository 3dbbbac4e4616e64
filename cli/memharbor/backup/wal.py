"""
Positions in the write-ahead log: segments, LSNs, timelines. Pure.

Source: PostgreSQL manual, WAL Internals (segment names of three times eight hexadecimal digits; 16 MiB each, as initdb
makes them) and Backup, Timelines (history files).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SEGMENT_BYTES = 16 * 1024 * 1024
_SEGMENTS_PER_ID = 0x1_0000_0000 // SEGMENT_BYTES
_SEGMENT_NAME = re.compile(r"^([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})(?:$|-)")
_HISTORY_NAME = re.compile(r"^([0-9A-F]{8})\.history$")
_HISTORY_LINE = re.compile(r"^([0-9]+)\t([0-9A-F]{1,8}/[0-9A-F]{1,8})\t([^\x00-\x08\x0b-\x1f\x7f\ufffd]*)$")
# What PostgreSQL writes into a history file when recovery ended because there was no more WAL.
_END_OF_WAL = "no recovery target specified"
_RESTORE_POINT = re.compile(r"lsn: ([0-9A-F]+/[0-9A-F]+).* desc: RESTORE_POINT (.*)$")


@dataclass(frozen=True, order=True)
class Segment:
    """One WAL segment; ordered by timeline, then by position."""

    timeline: int
    number: int

    @property
    def name(self) -> str:
        """
        The file name.

        >>> Segment(1, 258).name
        '000000010000000100000002'
        """
        return f"{self.timeline:08X}{self.number // _SEGMENTS_PER_ID:08X}{self.number % _SEGMENTS_PER_ID:08X}"


def parse_segment(name: str) -> Segment | None:
    """
    Read a segment's file name, with or without pgBackRest's checksum and compression suffix; `None` for other files.

    >>> parse_segment("000000010000000100000002-0a1b.zst")
    Segment(timeline=1, number=258)
    >>> [parse_segment(name) for name in ("00000002.history", "000000010000000100000002.partial-0a1b.zst")]
    [None, None]
    """
    found = _SEGMENT_NAME.match(name)
    if found is None:
        return None
    timeline, high, low = (int(part, 16) for part in found.groups())
    return Segment(timeline, high * _SEGMENTS_PER_ID + low)


def parse_lsn(text: str) -> int:
    """
    Read an LSN as a byte position.

    >>> parse_lsn("1/16B3748")
    4318771016
    """
    high, low = text.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def format_lsn(lsn: int) -> str:
    """
    Write a byte position as an LSN.

    >>> format_lsn(4318771016)
    '1/16B3748'
    """
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def find_gaps(segments: Iterable[Segment]) -> list[tuple[Segment, Segment]]:
    """
    List the holes between segments of one timeline, as pairs of the last one before and the first one after.

    >>> find_gaps([Segment(1, 5), Segment(1, 6), Segment(1, 9), Segment(2, 9)])
    [(Segment(timeline=1, number=6), Segment(timeline=1, number=9))]
    """
    ordered = sorted(set(segments))
    return [
        (before, after)
        for before, after in zip(ordered, ordered[1:], strict=False)
        if before.timeline == after.timeline and after.number != before.number + 1
    ]


@dataclass(frozen=True)
class RestorePoint:
    """A named restore point: where its record begins, and on which timeline it was written."""

    name: str
    timeline: int
    lsn: int


def parse_restore_points(timeline: int, waldump: str) -> list[RestorePoint]:
    """
    Read the named restore points out of `pg_waldump --rmgr=XLOG`, oldest first.

    >>> line = "rmgr: XLOG len (rec/tot): 98/98, tx: 0, lsn: 0/03000110, prev 0/030000D8, desc: RESTORE_POINT before"
    >>> parse_restore_points(1, line)
    [RestorePoint(name='before', timeline=1, lsn=50331920)]
    """
    found = (_RESTORE_POINT.search(line) for line in waldump.splitlines())
    return [RestorePoint(match[2], timeline, parse_lsn(match[1])) for match in found if match]


def parse_history(text: str) -> dict[int, int]:
    r"""
    Read a timeline history file: each ancestor timeline with the LSN at which it was left.

    >>> parse_history("1\t0/5000060\tat restore point \"before\"\n")
    {1: 83886176}
    """
    rows = (line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    return {int(row[0]): parse_lsn(row[1]) for row in rows}


def parse_history_name(name: str) -> int | None:
    """
    Read the timeline out of a history file's name; `None` for other files.

    >>> parse_history_name("0000000A.history")
    10
    """
    found = _HISTORY_NAME.match(name)
    return int(found[1], 16) if found else None


def history_problem(timeline: int, text: str) -> str | None:
    r"""
    Say what is wrong with a history file, which carries no checksum; `None` where it is well formed.

    >>> history_problem(3, "1\t0/5000060\tbefore 2026\n2\t0/70000A0\tno recovery target specified\n") is None
    True
    >>> history_problem(2, "1\t0/5\x0100060\tbefore 2026\n")
    'line 1 is unreadable'
    """
    left: list[tuple[int, int]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _HISTORY_LINE.match(line)
        if found is None:
            return f"line {number} is unreadable"
        left.append((int(found[1]), parse_lsn(found[2])))
    if not left:
        return "it names no timeline"
    if left != sorted(left) or left[-1][0] >= timeline or len({ancestor for ancestor, _ in left}) < len(left):
        return "its timelines are out of order"
    return None


def ended_at_end_of_wal(text: str) -> int | None:
    r"""
    Name the position where a timeline began because recovery found no more WAL; `None` where a target ended it.

    >>> ended_at_end_of_wal("1\t0/5000060\tno recovery target specified\n")
    83886176
    """
    last = [line for line in text.splitlines() if line.strip()][-1:]
    return parse_lsn(last[0].split()[1]) if last and last[0].endswith(_END_OF_WAL) else None


def leads_to(timeline: int, stop_lsn: int, *, target_timeline: int, history: dict[int, int]) -> bool:
    """
    Tell whether a backup that ended at `stop_lsn` of `timeline` lies on the way to a target timeline.

    Args:
        timeline: The backup's timeline.
        stop_lsn: Where the backup became consistent.
        target_timeline: The timeline to recover to.
        history: The target timeline's ancestors, as `parse_history` reads them.
    """
    return timeline == target_timeline or (timeline in history and stop_lsn <= history[timeline])


def missing_segments(
    segments: Sequence[Segment], start: Segment, *, timeline: int, end: int, history: dict[int, int]
) -> list[Segment]:
    """
    List the segments that replay needs and that are not there, in order.

    Args:
        segments: What there is.
        start: Where the backup begins.
        timeline: The timeline to recover to.
        end: Number of the last segment that is needed.
        history: The timeline's ancestors with the position at which each was left, as `parse_history` reads them.

    A segment in which a timeline was left is needed of its successor only, which begins with a copy of it.

    >>> missing_segments([Segment(1, 3), Segment(2, 4)], Segment(1, 3), timeline=2, end=5, history={1: 4 << 24})
    [Segment(timeline=2, number=5)]
    """
    there = set(segments)
    path = sorted(number for number in history if start.timeline <= number < timeline)
    needed = []
    for number in range(start.number, end + 1):
        owner = next((old for old in path if number < history[old] // SEGMENT_BYTES), timeline)
        needed.append(Segment(owner, number))
    return [segment for segment in needed if segment not in there]


def newest(segments: Sequence[Segment]) -> Segment | None:
    """Pick the segment that is furthest on the newest timeline; `None` where there is none."""
    return max(segments, default=None)
