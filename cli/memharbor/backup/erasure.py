"""
Erase a user, so that no restore brings them back: their rows, the copies of them, their index; and a record that lasts.

The record goes into the backup store before a row is touched: whoever restores from then on replays it
(`replay_erasures`), also where this process is killed in the middle. Records, the ledger and the log name users by a
digest only. Must not be used to tidy up: what is erased is gone, and stays gone.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from memharbor.backup.access import all_rows, in_locked_transaction, present_tables, qualified
from memharbor.backup.rows import DatabaseRows, RowSource
from memharbor.backup.tables import USER_TABLES
from memharbor.database import Connection, transaction, translated_errors
from memharbor.errors import StateRefusedError, UsageError, VerificationError
from memharbor.templates import literal, render

FOLDER = "erasures"
REASON_LENGTH_MAX = 400
# One statement is one argument of psql, and an argument may have 128 KiB.
_ERASURES_PER_STATEMENT = 50


class ReadsRecords(Protocol):
    """Where erasures are kept; `memharbor.backup.records.Records` is one."""

    def get_all(self, folder: str) -> dict[str, dict[str, Any]]:
        """Read every record below a folder, by path."""


@dataclass(frozen=True)
class Erasure:
    """
    One erasure, as it is kept beside the backups.

    Args:
        id: Of the record and of the row in `memharbor.erase_ledger`.
        user_sha256: SHA-256 of the user's id, hexadecimal.
        reason: What the requester says; holds no id.
        requested_by: Who asked for it.
        requested_at: When, aware UTC; from then on no restore brings back what there was.
        erased_at: When the rows were gone, aware UTC; `None` where nobody got that far yet.
        counts: Rows by table; `checkpoints` for copies.
    """

    id: str
    user_sha256: str
    reason: str
    requested_by: str
    requested_at: datetime
    erased_at: datetime | None = None
    counts: Mapping[str, int] = field(default_factory=dict)

    def as_record(self) -> dict[str, Any]:
        """Spell it for the store; `from_record` reads it."""
        record = asdict(self)
        record["requested_at"] = self.requested_at.isoformat()
        record["erased_at"] = self.erased_at.isoformat() if self.erased_at else None
        record["counts"] = dict(self.counts)
        return {"format": 1, "state": "erased" if self.erased_at else "requested", **record}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Erasure:
        """Read what `as_record` spelled."""
        erased_at = record.get("erased_at")
        return cls(
            id=str(record["id"]),
            user_sha256=str(record["user_sha256"]),
            reason=str(record["reason"]),
            requested_by=str(record["requested_by"]),
            requested_at=datetime.fromisoformat(record["requested_at"]),
            erased_at=datetime.fromisoformat(erased_at) if erased_at else None,
            counts=dict(record.get("counts") or {}),
        )


def user_digest(user_id: str) -> str:
    """
    Name a user without saying who it is.

    >>> user_digest("alice")[:6]
    '2bd806'
    """
    return hashlib.sha256(user_id.encode()).hexdigest()


def find_erasure(records: ReadsRecords, user_id: str) -> dict[str, Any] | None:
    """
    Find the newest erasure of a user beside the backups; `None` where they were never erased.

    Rows from before its `requested_at` must not come back. `erased_at` is null where the erasure was requested and
    interrupted; it will be carried out.

    Raises:
        ExternalToolError: The store cannot be read.
    """
    digest = user_digest(user_id)
    found = [record for record in records.get_all(FOLDER).values() if record.get("user_sha256") == digest]
    return max(found, key=lambda record: str(record["requested_at"]), default=None)


def new_erasure(user_id: str, *, reason: str, requested_by: str | None = None, now: datetime | None = None) -> Erasure:
    """
    Describe an erasure that is asked for.

    Raises:
        UsageError: The reason or the requester holds the user's id, which must not be kept, or the reason is too long.
    """
    requested_by = requested_by or _login()
    if not user_id:
        raise UsageError("the user's id is empty")
    if not reason.strip() or len(reason) > REASON_LENGTH_MAX:
        raise UsageError(f"`--reason` takes 1 to {REASON_LENGTH_MAX} characters")
    for option, text in (("--reason", reason), ("--requested-by", requested_by)):
        if user_id.casefold() in text.casefold():
            raise UsageError(
                f"`{option}` holds the user's id, and the record of an erasure must not say who was erased",
                hint="name a ticket instead, for instance `--reason 'request 4711'`",
            )
    return Erasure(str(uuid.uuid4()), user_digest(user_id), reason, requested_by, now or datetime.now(UTC))


def _login() -> str:
    with suppress(KeyError, OSError):
        return getpass.getuser()
    return "unknown"


def count_rows(connection: Connection, user_id: str) -> dict[str, int]:
    """Count a user's rows by table, those of tables that are empty of them left out."""
    names = present_tables(connection, [table.name for table in USER_TABLES])
    counts: dict[str, int] = {}
    with translated_errors("count the user's rows"), transaction(connection), all_rows(connection, names):
        for table in USER_TABLES:
            if table.name in names:
                # Names and expressions are those of USER_TABLES.
                statement = f"select count(*) from {qualified(table.name)} where {table.owner} = %s"  # noqa: S608
                row = connection.execute(statement.encode(), (user_id,)).fetchone()
                counts[table.name] = row[0] if row else 0
    return {name: count for name, count in counts.items() if count}


def erase_user(connection: Connection, user_id: str, erasure: Erasure) -> Erasure:
    """
    Delete a user's rows and what checkpoints copied of them, and record it in the database, in one transaction.

    Writers wait meanwhile, so that nothing of before `erased_at` is left. The vector index and what is left in the
    files is `memharbor.backup.traces`' matter.

    Args:
        connection: Straight to the database, as its administrator; commits by statement.
        user_id: Whose rows.
        erasure: What was asked for.

    Returns:
        The erasure with its time and its counts.

    Raises:
        StateRefusedError: The schema is not there, or other transactions do not let it have its locks.
        DatabaseError: A statement was refused; nothing was deleted.
    """
    erased: list[Erasure] = []
    names = present_tables(connection, [*(table.name for table in USER_TABLES), "erase_ledger"])
    if "erase_ledger" not in names:
        raise StateRefusedError("the schema is not rolled out to this database", hint="memharbor schema apply")

    def work(rows: DatabaseRows) -> None:
        connection.execute("select pg_catalog.set_config('memharbor.erase_owner', %s, true)", (user_id,))
        rows.query(erase_statement([erasure], drop_indexes=False))
        row = connection.execute(
            """
            select erased_at, coalesce(nullif(current_setting('memharbor.erased', true), ''), '{}')::jsonb
            from memharbor.erase_ledger where id = %s
            """,
            (erasure.id,),
        ).fetchone()
        if row is None:
            raise VerificationError("the erasure was not recorded", hint="run the command again")
        erased.append(replace(erasure, erased_at=row[0].astimezone(UTC), counts=row[1].get(erasure.user_sha256, {})))

    in_locked_transaction(connection, names, "share row exclusive", work, what="the erasure")
    return erased[-1]


def is_in_ledger(connection: Connection, erasure: Erasure) -> bool:
    """Tell whether the database itself knows that an erasure was carried out."""
    if not present_tables(connection, ["erase_ledger"]):
        return False
    with translated_errors("read the erase ledger"), transaction(connection), all_rows(connection, ["erase_ledger"]):
        found = connection.execute(
            "select from memharbor.erase_ledger where id = %s and erased_at is not null", (erasure.id,)
        )
        return found.rowcount > 0


def erase_statement(erasures: Sequence[Erasure], *, drop_indexes: bool) -> str:
    """
    Spell the one statement that erases users and records it in `memharbor.erase_ledger`.

    Args:
        erasures: Whom; those that the ledger has already are passed over.
        drop_indexes: Whether to drop their vector indexes too, for which every reader waits.
    """
    rows = [
        {
            "id": each.id,
            "user_sha256": each.user_sha256,
            "reason": each.reason,
            "requested_by": each.requested_by,
            "requested_at": each.requested_at.isoformat(),
            "erased_at": each.erased_at.isoformat() if each.erased_at else None,
            "memory_count": each.counts.get("memories"),
        }
        for each in erasures
    ]
    tables = [{"name": table.name, "owner": table.owner} for table in USER_TABLES]
    # A dollar sign could end the quotes that the statement's body stands in; within JSON it has another spelling.
    erasures_json = json.dumps(rows, ensure_ascii=False).replace("$", "\\u0024")
    variables = {"drop_indexes": drop_indexes, "erasures": erasures_json, "tables": tables}
    return render("erasure/erase.sql", variables)


def replay_erasures(records: ReadsRecords | Iterable[Mapping[str, Any]], rows: RowSource) -> list[dict[str, Any]]:
    """
    Erase again whom a restored database has brought back; to be called before applications are let in.

    A record is replayed where the database's own ledger does not have it: a user who came back after an erasure keeps
    what they have written since, unless the restore went to before it.

    Args:
        records: The store's records, or what `Records.get_all("erasures")` read.
        rows: The restored database, as superuser; each of its statements is committed at once.

    Returns:
        The records that were replayed.

    Raises:
        VerificationError: A user who was erased still has rows.
        ExternalToolError: The store cannot be read.
    """
    pending = pending_erasures(records, rows)
    for begin in range(0, len(pending), _ERASURES_PER_STATEMENT):
        rows.query(erase_statement(pending[begin : begin + _ERASURES_PER_STATEMENT], drop_indexes=True))
    if pending:
        missing = {each.id for each in pending} - _erased_ids(rows)
        left = _rows_of(rows, [each.user_sha256 for each in pending])
        if missing or left:
            raise VerificationError(
                f"{len(missing)} of {len(pending)} erasures could not be replayed; {left:,} rows of erased users are there",
                hint="run the restore again",
            )
    return [each.as_record() for each in pending]


def pending_erasures(records: ReadsRecords | Iterable[Mapping[str, Any]], rows: RowSource) -> list[Erasure]:
    """List the erasures that a database's own ledger does not have, none where there is no schema."""
    known = records if isinstance(records, Iterable) else records.get_all(FOLDER).values()
    erasures = [Erasure.from_record(record) for record in known]
    if not erasures or not _has_ledger(rows):
        return []
    done = _erased_ids(rows)
    return [each for each in erasures if each.id not in done]


def _has_ledger(rows: RowSource) -> bool:
    return rows.query("select to_regclass('memharbor.erase_ledger') is not null")[0][0] == "t"


def _erased_ids(rows: RowSource) -> set[str]:
    found = rows.query("select id from memharbor.erase_ledger where erased_at is not null")
    return {str(row[0]) for row in found}


def _rows_of(rows: RowSource, digests: Sequence[str]) -> int:
    """Count the rows that users still have, by their digests."""
    total = 0
    for begin in range(0, len(digests), 1000):
        wanted = ", ".join(literal(digest) for digest in digests[begin : begin + 1000])
        for table in USER_TABLES:
            if rows.query(f"select to_regclass('memharbor.{table.name}') is not null")[0][0] != "t":
                continue
            # Names and expressions are those of USER_TABLES.
            statement = f"""
                select coalesce(sum(row_count), 0) from (
                  select {table.owner} as owner, count(*) as row_count from memharbor.{table.name} group by 1
                ) o
                where encode(sha256(convert_to(owner, 'UTF8')), 'hex') in ({wanted})
            """  # noqa: S608
            total += int(rows.query(statement)[0][0] or 0)
    return total
