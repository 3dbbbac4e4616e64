"""
Carry an erasure out from its request to its certificate, so that a kill at any moment leaves a state that goes on.

Order: the record beside the backups (from then on every restore replays it), the rows in one transaction, the traces,
the record again, the certificate. The same command continues wherever it stopped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from memharbor.backup import certificate
from memharbor.backup.access import all_rows, in_locked_transaction, present_tables
from memharbor.backup.certificate import Signer, Written
from memharbor.backup.erasure import (
    FOLDER,
    Erasure,
    count_rows,
    erase_user,
    find_erasure,
    is_in_ledger,
    new_erasure,
    pending_erasures,
    replay_erasures,
)
from memharbor.backup.rows import DatabaseRows
from memharbor.backup.tables import USER_TABLES
from memharbor.backup.traces import find_traces, remove_traces
from memharbor.database import Connection, transaction, translated_errors
from memharbor.errors import SourceDataError
from memharbor.output import Output


class ErasureRecords(Protocol):
    """Where erasures are kept so that a restore cannot take them back."""

    def put(self, path: str, record: dict[str, Any]) -> None:
        """Write a record."""

    def get_all(self, folder: str) -> dict[str, dict[str, Any]]:
        """Read every record below a folder, by path."""


@dataclass(frozen=True)
class FolderRecords:
    """
    Records in a folder of this machine, for a database that has no backup store of ours.

    Args:
        folder: Made where it is missing.
    """

    folder: Path

    def put(self, path: str, record: dict[str, Any]) -> None:
        """Write a record."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = self.folder / Path(path).name
        incoming = target.with_name(f".{target.name}.new")
        incoming.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        incoming.replace(target)

    def get_all(self, folder: str) -> dict[str, dict[str, Any]]:
        """
        Read every record, by path below `folder`.

        Raises:
            SourceDataError: A file is no record.
        """
        found = {}
        for file in sorted(self.folder.glob("*.json")):
            if file.name.endswith(".certificate.json"):
                continue
            try:
                record = json.loads(file.read_text(encoding="utf-8"))
                Erasure.from_record(record)
            except (ValueError, KeyError, TypeError) as exc:
                raise SourceDataError(f"`{file}` is no record of an erasure: {exc!r}") from exc
            found[f"{folder}/{file.name}"] = record
        return found


@dataclass(frozen=True)
class Place:
    """
    Where a user is erased.

    Args:
        connection: Straight to the database, as its administrator; commits by statement.
        records: Where erasures are kept.
        folder: Where certificates are written.
        signer: Who signs them; `None` for nobody.
        database: The database's name.
        stack: The stack's name; `None` for a database that no stack of ours made.
    """

    connection: Connection
    records: ErasureRecords
    folder: Path
    signer: Signer | None
    database: str
    stack: str | None


@dataclass(frozen=True)
class EraseReport:
    """What was erased, now or before."""

    erasure: Erasure
    is_new: bool
    rewritten: bool
    files: Written

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        return {
            **self.erasure.as_record(),
            "already_erased": not self.is_new,
            "erased_now": dict(self.erasure.counts) if self.is_new else {},
            "files_rewritten": self.rewritten,
            "certificate": str(self.files.certificate),
            "signature": str(self.files.signature) if self.files.signature else None,
        }

    @property
    def text(self) -> str:
        """Describe it for people."""
        erasure = self.erasure
        who = f"user {erasure.user_sha256[:12]}"
        if self.is_new:
            said = ", ".join(f"{count:,} {table}" for table, count in erasure.counts.items()) or "no rows"
            lines = [f"erased {who}: {said}"]
        else:
            lines = [
                f"{who} was already erased on {erasure.erased_at:%Y-%m-%d %H:%M:%S %Z}; there was nothing to erase"
            ]
        signed = (
            f", signature {self.files.signature}" if self.files.signature else ", not signed: there is no stack's CA"
        )
        return "\n".join([*lines, f"certificate {self.files.certificate}{signed}"])


def erase(
    place: Place, user_id: str, output: Output, *, reason: str, requested_by: str | None = None, rewrite: bool = False
) -> EraseReport:
    """
    Erase a user; where they are erased already, only what is left is done.

    Args:
        place: Where.
        user_id: Whom.
        output: Where the steps are told.
        reason: What the requester says; holds no id.
        requested_by: Who asked; the login of this machine by default.
        rewrite: Write the tables anew, so that the bytes are gone from the files: everybody waits for each table.

    Raises:
        UsageError: The reason or the requester cannot be kept.
        StateRefusedError: The schema is not there, or other transactions do not let the erasure have its locks.
        ExternalToolError: The store did not take the record; nothing was deleted.
        DatabaseError: A statement was refused.
        VerificationError: Something of the user is left.
    """
    request = new_erasure(user_id, reason=reason, requested_by=requested_by)
    known = find_erasure(place.records, user_id)
    before = Erasure.from_record(known) if known is not None else None
    is_complete = before is not None and before.erased_at is not None and is_in_ledger(place.connection, before)
    is_new = not is_complete or bool(count_rows(place.connection, user_id))
    erasure = request if before is None or (is_new and is_complete) else before
    if is_new:
        with output.step("Record the request beside the backups"):
            place.records.put(_path(erasure), erasure.as_record())
        with output.step("Delete the user's rows"):
            # Erased before, brought back by a restore that was not ours: counted and dated anew.
            erasure = erase_user(place.connection, user_id, replace(erasure, erased_at=None, counts={}))
    if is_new or rewrite or find_traces(place.connection, user_id):
        remove_traces(place.connection, user_id, output, rewrite=rewrite)
    if is_new:
        with output.step("Record the erasure beside the backups"):
            place.records.put(_path(erasure), erasure.as_record())
    described = certificate.describe(
        erasure,
        database=place.database,
        stack=place.stack,
        system_identifier=_system_identifier(place.connection),
        rewritten=rewrite,
        remains=describe_remains(rewritten=rewrite, has_store=place.stack is not None),
    )
    return EraseReport(erasure, is_new, rewrite, certificate.write(place.folder, described, place.signer))


def replay(place: Place) -> list[dict[str, Any]]:
    """
    Erase again whom a restore that was not ours has brought back.

    Raises:
        VerificationError: A user who was erased still has rows.
    """
    replayed: list[dict[str, Any]] = []
    names = present_tables(place.connection, [*(table.name for table in USER_TABLES), "erase_ledger"])

    def work(rows: DatabaseRows) -> None:
        replayed[:] = replay_erasures(place.records.get_all(FOLDER).values(), rows)

    in_locked_transaction(place.connection, names, "share row exclusive", work, what="the replay of erasures")
    return replayed


def pending(place: Place) -> list[dict[str, Any]]:
    """List the erasures that `replay` would carry out."""
    names = present_tables(place.connection, ["erase_ledger"])
    with translated_errors("read the erase ledger"), transaction(place.connection), all_rows(place.connection, names):
        found = pending_erasures(place.records.get_all(FOLDER).values(), DatabaseRows(place.connection))
    return [each.as_record() for each in found]


def describe_remains(*, rewritten: bool, has_store: bool) -> str:
    """Say where an erased user's rows live on, and until when."""
    places = []
    if not rewritten:
        places.append("bytes of deleted rows in the data files, until they are written over")
    places.append("the server's own WAL, until its segments are written over")
    if has_store:
        places.append("archived WAL and backups made before, until retention and the purge of old versions remove them")
    else:
        places.append("the provider's backups made before, as long as it keeps them")
    places.append("files that were exported before")
    return "; ".join(places)


def _path(erasure: Erasure) -> str:
    return f"{FOLDER}/{erasure.id}.json"


def _system_identifier(connection: Connection) -> str:
    row = connection.execute(
        """
        select case when pg_catalog.has_function_privilege('pg_catalog.pg_control_system()', 'execute')
          then (select system_identifier::text from pg_catalog.pg_control_system()) end
        """
    ).fetchone()
    return str(row[0] or "") if row else ""
