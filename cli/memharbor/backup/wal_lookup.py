"""
Look things up in the write-ahead log itself: named restore points, commits, how far a segment was written.

Reads the server's own segments where it still has them, else the archive's, inside the leader's container; about a tenth
of a second a segment. Source: docs/adr/0008-restore-points-are-looked-up-in-the-wal.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from memharbor.backup.engine import BackupEngine
from memharbor.backup.wal import SEGMENT_BYTES, RestorePoint, Segment, parse_lsn, parse_restore_points

# Prints what pg_waldump says about segments: of the server's own where it still has them, else from the repository.
# Runs inside the container; its arguments are the stanza, a filter, and pairs of a segment and its path in the archive
# (`-` where it has none). repo-get and not archive-get, which reads the control file of a cluster that may be broken.
# The server may have removed or renamed its own since it was listed. pg_waldump fails at the end of the last record that
# is written, after it has said all the others.
_SCRIPT = """
set -eu
stanza=$1 filter=$2; shift 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
while [ $# -gt 0 ]; do
  segment=$1 path=$2; shift 2
  file=$PGDATA/pg_wal/$segment
  if [ ! -f "$file" ]; then
    [ "$path" != - ] || continue
    file=$scratch/$segment
    pgbackrest --stanza="$stanza" repo-get "archive/$stanza/$path" > "$file.zst"
    zstd --quiet --decompress --force -o "$file" "$file.zst"
  fi
  echo "segment $segment"
  eval "pg_waldump $filter" 2>/dev/null || true
  rm -f "$scratch"/*
done
"""
_SEGMENTS_PER_CALL = 16
_COMMIT = re.compile(r"lsn: ([0-9A-F]+/[0-9A-F]+).* desc: COMMIT ")
_LSN = re.compile(r"lsn: ([0-9A-F]+/[0-9A-F]+)")


def find_restore_point(
    engine: BackupEngine, segments: Sequence[Segment], name: str, *, oldest_lsn: int
) -> RestorePoint | None:
    """
    Look a named restore point up in the WAL, newest segment first; the newest of that name is meant.

    Reads every segment down to the point. `None` where there is none.

    Args:
        engine: The stack's backups.
        segments: What there is, in order.
        name: The point.
        oldest_lsn: Where the oldest backup begins; older segments are not read.
    """
    for segment, said in _dump(engine, segments, '--rmgr=XLOG "$file" | grep RESTORE_POINT', oldest_lsn):
        found = [point for point in parse_restore_points(segment.timeline, said) if point.name == name]
        if found:
            return found[-1]
    return None


def find_commit(
    engine: BackupEngine, segments: Sequence[Segment], xid: int, *, oldest_lsn: int
) -> tuple[Segment, int] | None:
    """
    Look the commit of a transaction up in the WAL: its segment and where its record begins; `None` where there is none.

    The arguments are those of `find_restore_point`. Numbers are used again on another timeline; the newest is meant.
    """
    for segment, said in _dump(engine, segments, f'--rmgr=Transaction --xid={xid:d} "$file"', oldest_lsn):
        found = _COMMIT.findall(said)
        if found:
            return segment, parse_lsn(found[-1])
    return None


def find_last_record(engine: BackupEngine, segment: Segment) -> int | None:
    """Tell where the last record of a segment begins; `None` where it cannot be read."""
    for _, said in _dump(engine, [segment], '"$file" | tail -n 1', 0):
        found = _LSN.search(said)
        if found:
            return parse_lsn(found[1])
    return None


def _dump(
    engine: BackupEngine, segments: Sequence[Segment], waldump: str, oldest_lsn: int
) -> Iterator[tuple[Segment, str]]:
    paths = engine.segment_paths()
    wanted = [segment for segment in reversed(segments) if (segment.number + 1) * SEGMENT_BYTES > oldest_lsn]
    for begin in range(0, len(wanted), _SEGMENTS_PER_CALL):
        chunk = {segment.name: segment for segment in wanted[begin : begin + _SEGMENTS_PER_CALL]}
        pairs = [part for name, segment in chunk.items() for part in (name, paths.get(segment, "-"))]
        said = engine.run_in_container(["sh", "-c", _SCRIPT, "waldump", engine.stanza, waldump, *pairs])
        for part in f"\n{said}".split("\nsegment ")[1:]:
            name, _, lines = part.partition("\n")
            yield chunk[name], lines
