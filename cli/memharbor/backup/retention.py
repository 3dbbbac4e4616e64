"""
What pgBackRest's `expire` says that it removes, or would remove. Pure.

How many full backups stay is decided inside the container (`docker/postgres/retention`), for scheduled backups and
`memharbor backup prune` alike. Source: pgBackRest 2.60, command/expire.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_BACKUPS = re.compile(r"repo\d+: expire \w+ backup (?:set:? )?(.+)$", re.MULTILINE)
_SEGMENTS = re.compile(r"repo\d+: \S+ remove archive, start = (\w+), stop = (\w+)")


@dataclass(frozen=True)
class Expired:
    """
    What went, or would go.

    Args:
        backups: Labels, in pgBackRest's order.
        wal: First and last segment of each range of archived WAL.
    """

    backups: tuple[str, ...]
    wal: tuple[tuple[str, str], ...]

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        return {
            "backups": list(self.backups),
            "wal": [{"first_segment": first, "last_segment": last} for first, last in self.wal],
        }


def parse_expire(said: str, segments: Sequence[str]) -> Expired:
    r"""
    Read what `pgbackrest expire` said, with or without `--dry-run`.

    Folders that are long empty are named again by each run where the store keeps versions: of backups, only what is taken
    out of the list of backups counts, and of a whole folder of WAL only the segments that it had.

    Args:
        said: Its output.
        segments: The archived WAL before it, in order.

    >>> said = "INFO: repo1: expire full backup set 20F, 20F_21I\nINFO: repo1: 18-1 remove archive, start = 09, stop = 0B"
    >>> parse_expire(said, ["09", "0A", "0B", "0C"])
    Expired(backups=('20F', '20F_21I'), wal=(('09', '0B'),))
    """
    backups = (label.strip() for found in _BACKUPS.findall(said) for label in found.split(","))
    ranges = []
    for first, last in _SEGMENTS.findall(said):
        # A folder's name begins the names of its segments.
        gone = [name for name in segments if name[: len(first)] >= first and name[: len(last)] <= last]
        ranges += [(gone[0], gone[-1])] if gone else []
    return Expired(tuple(dict.fromkeys(backups)), tuple(ranges))
