"""
Judge the WAL of a repository: what should be there, what is there, what hangs in the air. Pure.

pgBackRest's own verification does not see that a segment is missing: recovery takes the gap for the end of WAL and
promotes, without an error. Source: docs/concepts/backup.md; PostgreSQL manual, Backup, Timelines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from memharbor.backup.engine import Backup
from memharbor.backup.wal import (
    SEGMENT_BYTES,
    Segment,
    ended_at_end_of_wal,
    find_gaps,
    leads_to,
    missing_segments,
    parse_history,
    parse_history_name,
    parse_segment,
)


@dataclass(frozen=True)
class ServerWal:
    """
    What the server itself knows about its WAL.

    Args:
        archived: The segments that it believes are archived, by `pg_stat_archiver` and by its files.
        histories: The timelines whose history file it believes is archived.
        waiting: The segments that are still to be archived.
        history_sums: SHA-256 of its own history files, by timeline.
        answered: Whether `pg_stat_archiver` could be asked.
    """

    archived: frozenset[Segment] = frozenset()
    histories: frozenset[int] = frozenset()
    waiting: frozenset[Segment] = frozenset()
    history_sums: Mapping[int, str] = field(default_factory=dict)
    answered: bool = False

    @property
    def has_archived(self) -> bool:
        """Whether anything was ever archived."""
        return bool(self.archived or self.histories)


def parse_server(text: str) -> ServerWal:
    r"""
    Read what the script in the container says of the server: a word and a name in each line.

    >>> server = parse_server("stat 000000010000000000000004\nstatus 000000010000000000000005.ready\n")
    >>> [segment.number for segment in (*server.archived, *server.waiting)], server.answered
    ([4, 5], True)
    """
    archived, waiting = set(), set()
    histories: set[int] = set()
    sums: dict[int, str] = {}
    answered = False
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "sum":
            digest, _, name = rest.partition("  ")
            timeline = parse_history_name(name)
            sums |= {} if timeline is None else {timeline: digest}
            continue
        answered = answered or word == "stat"
        name = rest.removesuffix(".done")
        if word == "status" and rest.endswith(".ready"):
            segment = parse_segment(rest.removesuffix(".ready"))
            waiting |= {segment} if segment else set()
        elif word in ("stat", "status") and (timeline := parse_history_name(name)) is not None:
            histories.add(timeline)
        elif word in ("stat", "status"):
            # A backup's label file follows its segment into the archive.
            segment = parse_segment(name[:24] if name.endswith(".backup") else name)
            archived |= {segment} if segment else set()
    return ServerWal(frozenset(archived), frozenset(histories), frozenset(waiting), sums, answered)


@dataclass(frozen=True)
class ArchivedWal:
    """
    The archive of one cluster.

    Args:
        paths: The files of each segment, below `archive/<stanza>`; more than one is wrong.
        history_paths: The history file of each timeline.
        histories: Their texts, as far as they could be read.
    """

    paths: Mapping[Segment, Sequence[str]]
    history_paths: Mapping[int, str]
    histories: Mapping[int, str] = field(default_factory=dict)

    @property
    def ancestors(self) -> dict[int, dict[int, int]]:
        """Each timeline's ancestors with the position at which each was left; none where they cannot be read."""
        known: dict[int, dict[int, int]] = {1: {}}
        for timeline, text in self.histories.items():
            try:
                known[timeline] = parse_history(text)
            except (ValueError, IndexError):
                known[timeline] = {}
        return known


def parse_archive(paths: Iterable[str]) -> ArchivedWal:
    """
    Sort the files of one cluster's archive.

    >>> archive = parse_archive(["18-1/x/000000010000000000000004-ab.zst", "18-1/00000002.history"])
    >>> list(archive.paths), archive.history_paths
    ([Segment(timeline=1, number=4)], {2: '18-1/00000002.history'})
    """
    segments: dict[Segment, list[str]] = {}
    histories: dict[int, str] = {}
    for path in sorted(paths):
        name = path.rsplit("/", 1)[-1]
        segment, timeline = parse_segment(name), parse_history_name(name)
        if segment is not None:
            segments.setdefault(segment, []).append(path)
        elif timeline is not None:
            histories[timeline] = path
    return ArchivedWal(segments, histories)


@dataclass(frozen=True)
class Gap:
    """
    Segments of one timeline that should be there and are not, as far as they follow each other.

    Args:
        first: The first one.
        last: The last one.
        is_explained: Whether the cluster lived on from exactly there, so that nobody can restore it anyway.
    """

    first: Segment
    last: Segment
    is_explained: bool = False

    @property
    def name(self) -> str:
        """The segments in words."""
        count = self.last.number - self.first.number + 1
        if count == 1:
            return f"WAL segment {self.first.name} is"
        return f"{count} WAL segments from {self.first.name} to {self.last.name} are"


def timelines_in_use(archive: ArchivedWal, backups: Sequence[Backup], server: ServerWal) -> set[int]:
    """List the timelines on which there is a backup or WAL, or which the server archived."""
    listed = {segment.timeline for segment in (*archive.paths, *server.archived)}
    return listed | {*archive.history_paths, *server.histories} | {backup.timeline for backup in backups}


def find_missing(
    archive: ArchivedWal, good: Iterable[Segment], backups: Sequence[Backup], server: ServerWal
) -> set[Segment]:
    """
    Find what is missing from the oldest backup to what was archived last, on every timeline that a backup leads to.

    Args:
        archive: What is listed.
        good: The listed segments that are not damaged.
        backups: The backups of the present cluster.
        server: What the server knows. A segment that it has not archived yet is not missing.
    """
    there = sorted(set(good))
    missing: set[Segment] = set()
    for backup in backups:
        missing |= set(_own_missing(there, backup))
    for timeline in timelines_in_use(archive, backups, server):
        known = [*archive.paths, *server.archived, *(_stop(backup) for backup in backups)]
        ends = [segment.number for segment in known if segment.timeline == timeline]
        history = archive.ancestors.get(timeline, {})
        starts = [_start(each) for each in backups if _leads(each, timeline, history)]
        if ends and starts:
            first = min(starts, key=lambda start: start.number)
            missing |= set(missing_segments(there, first, timeline=timeline, end=max(ends), history=history))
    return missing - (server.waiting - server.archived)


def gaps_of(archive: ArchivedWal, missing: Iterable[Segment]) -> list[Gap]:
    """Join missing segments that follow each other."""
    return [Gap(first, last, _is_explained(archive, first)) for first, last in _runs(missing)]


def _runs(missing: Iterable[Segment]) -> list[tuple[Segment, Segment]]:
    ordered = sorted(missing)
    if not ordered:
        return []
    breaks = [
        index
        for index in range(1, len(ordered))
        if ordered[index] != Segment(ordered[index - 1].timeline, ordered[index - 1].number + 1)
    ]
    begins, ends = [0, *breaks], [*breaks, len(ordered)]
    return [(ordered[begin], ordered[end - 1]) for begin, end in zip(begins, ends, strict=True)]


def _is_explained(archive: ArchivedWal, first: Segment) -> bool:
    # Segments are archived side by side. Where the machine is lost between two of them, the later one alone arrives;
    # a restore then ends before the gap, says that there is no more WAL, and begins its timeline there.
    for timeline, text in archive.histories.items():
        left_at = ended_at_end_of_wal(text)
        if left_at is None or archive.ancestors[timeline].get(first.timeline) != left_at:
            continue
        if (first.number - 1) * SEGMENT_BYTES <= left_at <= first.number * SEGMENT_BYTES:
            return True
    return False


def reach_of(
    archive: ArchivedWal, good: Iterable[Segment], backup: Backup, current: int
) -> tuple[Segment | None, bool]:
    """
    Find how far a backup can be replayed without a gap, and whether that is the end of the archive.

    Returns:
        The last segment, `None` where the backup does not even become consistent; whether nothing lies behind it.
    """
    there = set(good)
    if _own_missing(there, backup):
        return None, False
    history = archive.ancestors.get(current, {})
    timeline = current if _leads(backup, current, history) else backup.timeline
    ends = [segment.number for segment in archive.paths if segment.timeline == timeline]
    end = max(ends, default=_stop(backup).number)
    start = _start(backup)
    missing = missing_segments(
        sorted(there), start, timeline=timeline, end=end, history=archive.ancestors.get(timeline, {})
    )
    if not missing:
        return Segment(timeline, end), True
    gap = missing[0]
    before = [segment for segment in there if segment.number == gap.number - 1 and segment.timeline <= timeline]
    return (max(before, default=_stop(backup)), False)


def needs(backup: Backup, segment: Segment) -> bool:
    """Tell whether a backup does not become consistent without a segment."""
    return segment.timeline == backup.timeline and _start(backup).number <= segment.number <= _stop(backup).number


def needs_any(backup: Backup, gap: Gap) -> bool:
    """Tell whether a backup does not become consistent without a segment of a gap."""
    within = range(gap.first.number, gap.last.number + 1)
    return gap.first.timeline == backup.timeline and not (
        _stop(backup).number < within.start or _start(backup).number >= within.stop
    )


def end_of(gap: Gap) -> int:
    """Name the position at which a gap ends."""
    return (gap.last.number + 1) * SEGMENT_BYTES - 1


def own_gaps(good: Iterable[Segment], backup: Backup) -> list[Gap]:
    """List what of a backup's own WAL is missing, without which it does not become consistent."""
    return [Gap(first, last) for first, last in _runs(_own_missing(good, backup))]


def misplaced(archive: ArchivedWal) -> list[tuple[Segment, Segment]]:
    """
    Find segments that hold another one's content: their checksums are the same, which those of two segments never are.

    >>> misplaced(parse_archive([f"x/00000001000000000000000{n}-{'ab' * 20}.zst" for n in (4, 5)]))
    [(Segment(timeline=1, number=4), Segment(timeline=1, number=5))]
    """
    by_sum: dict[str, Segment] = {}
    found = []
    for segment, paths in sorted(archive.paths.items()):
        for path in paths:
            digest = path.rsplit("/", 1)[-1][25:65]
            other = by_sum.setdefault(digest, segment)
            if other != segment:
                found.append((other, segment))
    return found


def oldest_start(backups: Sequence[Backup]) -> int:
    """Number of the first segment that any backup needs; what is older is not looked at."""
    return min((_start(backup).number for backup in backups), default=0)


def in_flight(archive: ArchivedWal, server: ServerWal) -> list[Segment]:
    """List the segments that the server has still to archive although a later one is in the archive."""
    behind = {
        Segment(before.timeline, n) for before, after in find_gaps(archive.paths) for n in _between(before, after)
    }
    return sorted(behind & server.waiting)


def _between(before: Segment, after: Segment) -> range:
    return range(before.number + 1, after.number)


def _own_missing(there: Iterable[Segment], backup: Backup) -> list[Segment]:
    present = set(there)
    numbers = range(_start(backup).number, _stop(backup).number + 1)
    return [each for each in (Segment(backup.timeline, number) for number in numbers) if each not in present]


def _leads(backup: Backup, timeline: int, history: dict[int, int]) -> bool:
    return leads_to(backup.timeline, backup.stop_lsn, target_timeline=timeline, history=history)


def _start(backup: Backup) -> Segment:
    return Segment(backup.timeline, backup.start_lsn // SEGMENT_BYTES)


def _stop(backup: Backup) -> Segment:
    # A backup that ends at the very end of a segment names that segment, not the next.
    named = parse_segment(backup.stop_segment)
    return named or Segment(backup.timeline, (backup.stop_lsn - 1) // SEGMENT_BYTES)
