"""
Compare what Zep has with the memories that were to be written.

Zep reads facts out of episodes in its own words, so facts cannot be compared. Compared are the episodes and messages
themselves: that each piece is there once, with its contents' digest and its instant.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from datetime import datetime
from typing import Any

from memharbor.migrate.record import Record
from memharbor.migrate.targets.zep import ZepTarget
from memharbor.migrate.targets.zep_mapping import Piece, found_in, impossible
from memharbor.migrate.targets.zep_state import ZepState

COUNTS = ("memories", "pieces", "there", "missing", "doubled", "other_contents", "other_times", "pending")
# Users with differences are named, so many at most.
_NAMED_MAX = 1000
_TABLES = """
create table wanted (
  user_id text, record_id text, part integer, digest text, at text, seen integer default 0, primary key (record_id, part)
) without rowid;
create index wanted_user on wanted (user_id);
"""
_WRONG = ("missing", "doubled", "other_contents", "other_times")


def validate(target: ZepTarget, records: Iterable[Record]) -> dict[str, Any]:
    """
    Count what is there of memories, user by user.

    Args:
        target: That they were written with, so that they are cut alike.
        records: The memories, streamed.

    Returns:
        The sum of `COUNTS`, `users`, `refused`: memories that Zep does not take; `is_complete`; `named`: the counts of
        users with differences. `pending` are episodes that are there, and that Zep has not read yet.

    Raises:
        ConnectError: The service cannot be reached.
        ConfigError: It refuses the key.
        StateRefusedError: A migration is running.
    """
    with closing(sqlite3.connect("", isolation_level=None)) as wanted, target.open_state() as state:
        wanted.executescript(_TABLES)
        refused = _note(wanted, target, records)
        report: dict[str, Any] = {"users": 0, "refused": refused, **dict.fromkeys(COUNTS, 0)}
        named: list[dict[str, Any]] = []
        users = wanted.execute("select distinct user_id from wanted order by user_id").fetchall()
        for (user_id,) in users:
            counts = _count_user(wanted, target, state, user_id)
            report["users"] += 1
            for name in COUNTS:
                report[name] += counts[name]
            if any(counts[name] for name in (*_WRONG, "pending")) and len(named) < _NAMED_MAX:
                named.append({"user_id": user_id, **counts})
    return report | {"is_complete": not any(report[name] for name in _WRONG), "named": named}


def report_text(report: Mapping[str, Any]) -> str:
    """
    Spell a validation for a person.

    >>> print(report_text({"users": 1, "refused": 0, "memories": 2, "pieces": 2, "there": 2, "missing": 0, "doubled": 0,
    ...     "other_contents": 0, "other_times": 0, "pending": 1, "is_complete": True, "named": []}))
    2 memories of 1 users, in 2 pieces: all are in Zep
    1 are there and not read by Zep yet
    """
    ends = "all are in Zep" if report["is_complete"] else "not all are in Zep as they should be"
    lines = [f"{report['memories']:,} memories of {report['users']:,} users, in {report['pieces']:,} pieces: {ends}"]
    said = {
        "missing": "are missing",
        "doubled": "are there more than once",
        "other_contents": "are there with other contents",
        "other_times": "are there with another instant",
        "pending": "are there and not read by Zep yet",
        "refused": "memories are none that Zep takes",
    }
    lines += [f"{report[name]:,} {words}" for name, words in said.items() if report[name]]
    for each in report["named"]:
        found = ", ".join(f"{name} {each[name]:,}" for name in (*_WRONG, "pending") if each[name])
        lines.append(f"  `{each['user_id']}`: {each['there']:,} of {each['pieces']:,}; {found}")
    return "\n".join(lines)


def _note(wanted: sqlite3.Connection, target: ZepTarget, records: Iterable[Record]) -> int:
    refused = 0

    def rows() -> Iterator[tuple[Any, ...]]:
        nonlocal refused
        for record in records:
            if impossible(record):
                refused += 1
                continue
            yield from map(_row, target.speller.pieces(record))

    wanted.execute("begin")
    wanted.executemany("insert or ignore into wanted (user_id, record_id, part, digest, at) values (?,?,?,?,?)", rows())
    wanted.execute("commit")
    return refused


def _row(piece: Piece) -> tuple[Any, ...]:
    return piece.user_id, *piece.key, piece.digest, piece.body.get("reference_time")


def _count_user(wanted: sqlite3.Connection, target: ZepTarget, state: ZepState, user_id: str) -> dict[str, int]:
    counts = dict.fromkeys(COUNTS, 0)
    (counts["memories"], counts["pieces"]) = wanted.execute(
        "select count(distinct record_id), count(*) from wanted where user_id = ?", (user_id,)
    ).fetchone()
    user = state.find_user(user_id)
    uuid = user.graph_uuid if user else (target.http.find_user(user_id) or ("", ""))[1]
    if uuid:
        for episode in target.http.episodes(uuid):
            _see(wanted, episode, counts)
    # A message is an episode too; where the service does not list it as one, it is in its thread.
    for thread in state.threads(user_id).values() if target.speller.threads else ():
        for message in target.http.messages(thread):
            if any(not _is_seen(wanted, key) for key in found_in(message)):
                _see(wanted, message, counts)
    counts["missing"] = counts["pieces"] - counts["there"]
    return counts


def _is_seen(wanted: sqlite3.Connection, key: tuple[str, int]) -> bool:
    row = wanted.execute("select seen from wanted where record_id = ? and part = ?", key).fetchone()
    return row is None or bool(row[0])


def _see(wanted: sqlite3.Connection, item: Mapping[str, Any], counts: dict[str, int]) -> None:
    for key, found in found_in(item).items():
        row = wanted.execute("select digest, at, seen from wanted where record_id = ? and part = ?", key).fetchone()
        if row is None:
            continue
        digest, at, seen = row
        wanted.execute("update wanted set seen = seen + 1 where record_id = ? and part = ?", key)
        if seen:
            counts["doubled"] += 1
            continue
        counts["there"] += 1
        counts["other_contents"] += found.digest != digest
        counts["other_times"] += at is not None and not _is_same_instant(at, item.get("reference_time"))
        counts["pending"] += item.get("processed") is False


def _is_same_instant(ours: str, theirs: Any) -> bool:
    """Whether two instants are the same but for fractions of a second, of which services keep fewer."""
    try:
        moment = datetime.fromisoformat(str(theirs))
        return abs((moment - datetime.fromisoformat(ours)).total_seconds()) < 1
    except (ValueError, TypeError):
        return False
