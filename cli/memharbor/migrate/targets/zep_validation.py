"""
Compare what Zep has with the memories that were to be written. Nothing is written, neither there nor here.

Zep reads facts out of episodes in its own words, so facts cannot be compared. Compared are the episodes and messages
themselves: that each piece is there once, with the text, the instant, every key of the metadata, and the role, name or
description that it is sent with. What the service adds to the metadata is its own affair, and a field that its lists do
not show is not compared. The service alone is asked, and not the state of the migration, which may be wrong.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from datetime import datetime
from typing import Any

from memharbor.migrate.record import Record
from memharbor.migrate.targets.zep import ZepTarget
from memharbor.migrate.targets.zep_mapping import HASH, Piece, found_in, impossible

_OTHER = ("other_contents", "other_metadata", "other_times", "other_labels")
_WRONG = ("missing", "doubled", *_OTHER)
COUNTS = ("memories", "pieces", "there", *_WRONG, "pending")
# Users and pieces with differences are named, so many at most.
_NAMED_MAX = 1000
_TABLES = """
create table wanted (
  user_id text, record_id text, part integer, is_message integer, digest text, metadata text, at text, labels text,
  seen integer default 0, pending integer default 0, other_contents integer default 0, other_metadata integer default 0,
  other_times integer default 0, other_labels integer default 0, primary key (record_id, part)
) without rowid;
create index wanted_user on wanted (user_id);
"""
_SUMS = f"""
select count(distinct record_id), count(*), count(*) filter (where seen > 0), count(*) filter (where seen = 0),
  total(max(seen - 1, 0)), {", ".join(f"total({name})" for name in _OTHER)}, total(pending)
from wanted where user_id = ?
"""  # noqa: S608 - names of this module


def validate(target: ZepTarget, records: Iterable[Record]) -> dict[str, Any]:
    """
    Compare memories with what is there of them, user by user.

    Args:
        target: That they were written with, so that they are cut and spelled alike.
        records: The memories, streamed.

    Returns:
        The sum of `COUNTS`, `users`, `refused`: memories that Zep does not take; `is_complete`; `named`: the counts of
        users with differences; `differing`: pieces that are there otherwise, with the `fields` in which they are.
        `pending` are those that are there, and that Zep has not read yet.

    Raises:
        ConnectError: The service cannot be reached.
        ConfigError: It refuses the key.
    """
    with closing(sqlite3.connect("", isolation_level=None)) as wanted:
        wanted.executescript(_TABLES)
        refused = _note(wanted, target, records)
        comparison = _Comparison(wanted, target)
        report: dict[str, Any] = {"users": 0, "refused": refused, **dict.fromkeys(COUNTS, 0)}
        named: list[dict[str, Any]] = []
        users = wanted.execute("select distinct user_id from wanted order by user_id").fetchall()
        for (user_id,) in users:
            counts = comparison.count(user_id)
            report["users"] += 1
            for name in COUNTS:
                report[name] += counts[name]
            if any(counts[name] for name in (*_WRONG, "pending")) and len(named) < _NAMED_MAX:
                named.append({"user_id": user_id, **counts})
    is_complete = not any(report[name] for name in _WRONG)
    return report | {"is_complete": is_complete, "named": named, "differing": comparison.differing}


def report_text(report: Mapping[str, Any]) -> str:
    """
    Spell a validation for a person.

    >>> print(report_text({"users": 1, "refused": 0, "memories": 2, "pieces": 2, "there": 2, "missing": 0, "doubled": 0,
    ...     "other_contents": 0, "other_metadata": 0, "other_times": 0, "other_labels": 0, "pending": 1, "is_complete": True,
    ...     "named": [], "differing": []}))
    2 memories of 1 users, in 2 pieces: all are in Zep
    1 are there and not read by Zep yet
    """
    ends = "all are in Zep" if report["is_complete"] else "not all are in Zep as they should be"
    lines = [f"{report['memories']:,} memories of {report['users']:,} users, in {report['pieces']:,} pieces: {ends}"]
    said = {
        "missing": "are missing",
        "doubled": "are there more than once",
        "other_contents": "are there with other contents",
        "other_metadata": "are there with other metadata",
        "other_times": "are there with another instant",
        "other_labels": "are there with another role, name or description",
        "pending": "are there and not read by Zep yet",
        "refused": "memories are none that Zep takes",
    }
    lines += [f"{report[name]:,} {words}" for name, words in said.items() if report[name]]
    for each in report["named"]:
        found = ", ".join(f"{name} {each[name]:,}" for name in (*_WRONG, "pending") if each[name])
        lines.append(f"  `{each['user_id']}`: {each['there']:,} of {each['pieces']:,}; {found}")
    for each in report["differing"]:
        lines.append(f"  {each['id']}, part {each['part']}: {', '.join(each['fields'])}")
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
    wanted.executemany(
        "insert or ignore into wanted (user_id, record_id, part, is_message, digest, metadata, at, labels)"
        " values (?, ?, ?, ?, ?, ?, ?, ?)",
        rows(),
    )
    wanted.execute("commit")
    return refused


def _row(piece: Piece) -> tuple[Any, ...]:
    body = piece.body
    labels = {name: body[name] for name in ("role", "name", "source_description") if name in body}
    texts = (json.dumps(body["metadata"]), body.get("reference_time"), json.dumps(labels))
    return piece.user_id, *piece.key, piece.is_message, _digest(body.get("content", body.get("data"))), *texts


def _digest(text: Any) -> str:
    return hashlib.sha256(str(text).encode("utf-8", "surrogatepass")).hexdigest()


class _Comparison:
    """What was found so far."""

    def __init__(self, wanted: sqlite3.Connection, target: ZepTarget) -> None:
        self._wanted, self._target, self._http = wanted, target, target.http
        self.differing: list[dict[str, Any]] = []

    def count(self, user_id: str) -> dict[str, int]:
        """Look at all that there is of a user, and count."""
        found = self._http.find_user(user_id)
        if found is not None:
            self._look(user_id, *found)
        sums = self._wanted.execute(_SUMS, (user_id,)).fetchone()
        return dict(zip(COUNTS, map(int, sums), strict=True))

    def _look(self, user_id: str, user_uuid: str, graph_uuid: str) -> None:
        threads = dict[str, None]()
        for episode in self._http.episodes(graph_uuid):
            for key in found_in(episode):
                # A message is an episode too, which may show it in other words: its thread is what counts.
                if episode.get("thread_uuid") and self._is_message(key):
                    threads[str(episode["thread_uuid"])] = None
                    self._note_pending(key, episode)
                else:
                    self._see(key, episode)
        for thread in threads:
            self._look_in(thread)
        missing = self._wanted.execute(
            "select 1 from wanted where user_id = ? and is_message and seen = 0 limit 1", (user_id,)
        ).fetchone()
        if missing:
            for each in self._http.threads(user_uuid):
                if str(each.get("uuid")) not in threads:
                    self._look_in(str(each.get("uuid")))

    def _look_in(self, thread: str) -> None:
        # One that was deleted has no messages, whatever the list of episodes says.
        for message in self._http.messages(thread, allow=(404,)):
            for key in found_in(message):
                if self._is_message(key):
                    self._see(key, message)

    def _is_message(self, key: tuple[str, int]) -> bool:
        row = self._wanted.execute("select is_message from wanted where record_id = ? and part = ?", key).fetchone()
        return row is not None and bool(row[0])

    def _note_pending(self, key: tuple[str, int], item: Mapping[str, Any]) -> None:
        if item.get("processed") is False:
            self._wanted.execute("update wanted set pending = 1 where record_id = ? and part = ?", key)

    def _see(self, key: tuple[str, int], item: Mapping[str, Any]) -> None:
        row = self._wanted.execute(
            "select user_id, digest, metadata, at, labels, seen from wanted where record_id = ? and part = ?", key
        ).fetchone()
        if row is None:
            return
        user_id, digest, metadata, at, labels, seen = row
        fields: dict[str, list[str]] = {name: [] for name in _OTHER}
        if not seen:
            self._note_pending(key, item)
            fields = _differences(item, digest, json.loads(metadata), at, json.loads(labels))
        flags = [bool(fields[name]) for name in _OTHER]
        self._wanted.execute(
            "update wanted set seen = seen + 1, other_contents = other_contents or ?, other_metadata = other_metadata or ?,"
            " other_times = other_times or ?, other_labels = other_labels or ? where record_id = ? and part = ?",
            (*flags, *key),
        )
        if any(flags) and len(self.differing) < _NAMED_MAX:
            names = [name for each in _OTHER for name in fields[each]]
            self.differing.append({"user_id": user_id, "id": key[0], "part": key[1], "fields": names})


def _differences(
    item: Mapping[str, Any], digest: str, metadata: Mapping[str, Any], at: str | None, labels: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Name the fields in which a piece is there otherwise than it is sent."""
    there: Mapping[str, Any] = item["metadata"]
    # The list of episodes calls the name of a sender otherwise than the list of messages.
    shown = {**item, "name": item.get("name", item.get("role_name"))}
    differing = [name for name, value in metadata.items() if not _is_same(value, there.get(name))]
    return {
        "other_contents": ["content"] * (_digest(item.get("content")) != digest)
        + [f"metadata.{name}" for name in differing if name == HASH],
        "other_metadata": [f"metadata.{name}" for name in differing if name != HASH],
        "other_times": ["reference_time"] * (at is not None and not _is_same_instant(at, item.get("reference_time"))),
        "other_labels": [name for name, value in labels.items() if shown.get(name) not in (None, value)],
    }


def _is_same(ours: Any, theirs: Any) -> bool:
    """
    Tell whether two values of metadata are the same; a service may write 1.0 as 1, and not as true.

    >>> _is_same(1.0, 1), _is_same(1, True), _is_same(["a"], ["a"]), _is_same(["a", "b"], ["b", "a"])
    (True, False, True, False)
    """
    return bool(ours == theirs) and isinstance(ours, bool) == isinstance(theirs, bool)


def _is_same_instant(ours: str, theirs: Any) -> bool:
    """Whether two instants are the same but for fractions of a second, of which services keep fewer."""
    try:
        moment = datetime.fromisoformat(str(theirs))
        return abs((moment - datetime.fromisoformat(ours)).total_seconds()) < 1
    except (ValueError, TypeError):
        return False
