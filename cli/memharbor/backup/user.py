"""
One user: what there is of them, and their way back from a logical backup or from any moment of the archive.

A moment is restored into a throw-away container, where the user is taken out as a logical backup; from there on both ways
are one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memharbor.backup.chain import Link, Request, open_chain
from memharbor.backup.destinations import Destination, Folder, find_backup
from memharbor.backup.erasure import FOLDER, user_digest
from memharbor.backup.logical import create
from memharbor.backup.logical_files import Keys
from memharbor.backup.logical_format import Manifest
from memharbor.backup.plan import plan_restore
from memharbor.backup.records import Records
from memharbor.backup.rows import DatabaseRows, RowSource
from memharbor.backup.sandbox import Opened, restored
from memharbor.backup.selection import DIGEST_SETTINGS, Choice, read_tables
from memharbor.backup.tables import SCHEMA
from memharbor.errors import StateRefusedError, UsageError
from memharbor.output import Output
from memharbor.templates import literal

_INDEX_PREFIX = "memories_hnsw_"


@dataclass(frozen=True)
class UserSummary:
    """
    What there is of a user. Sizes in bytes, instants aware UTC or `None`.

    Args:
        user_id: Who.
        rows: By table; of tables that are there.
        size_bytes: Of the rows as they are stored, without indexes.
        states: Memories by state.
        first_memory_at: When the oldest memory was made.
        last_memory_at: When the newest one was made.
        last_change_at: When the audit trail last recorded a change.
        vector_index: Name of the vector index of their own, where they have one.
        vector_index_bytes: Its size.
        erased_at: When the newest erasure was requested.
    """

    user_id: str
    rows: dict[str, int]
    size_bytes: int
    states: dict[str, int]
    first_memory_at: str | None
    last_memory_at: str | None
    last_change_at: str | None
    vector_index: str | None
    vector_index_bytes: int | None
    erased_at: str | None

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        return dict(vars(self))


def show_user(source: DatabaseRows, user_id: str) -> UserSummary:
    """
    Collect what a database has of a user.

    Raises:
        StateRefusedError: The schema is not there.
    """
    choice, user = Choice(user_id=user_id), literal(user_id)
    rows, size_bytes = {}, 0
    tables = read_tables(source)
    for table in tables:
        if table.is_shared:
            continue
        query = f"select count(*), coalesce(sum(pg_column_size(r.*)), 0) from ({choice.query(table)}) r"
        count, size = source.query(query)[0]
        rows[table.name] = int(count or 0)
        size_bytes += int(size or 0)
    first, last = source.query(
        f"select {_iso('min(created_at)')}, {_iso('max(created_at)')} from {SCHEMA}.memories where user_id = {user}"
    )[0]
    states = source.query(f"select state, count(*) from {SCHEMA}.memories where user_id = {user} group by 1 order by 1")
    changed = None
    if "memory_history" in rows:
        changed = source.query(f"select {_iso('max(changed_at)')} from {SCHEMA}.memory_history where user_id = {user}")[
            0
        ][0]
    index = source.query(
        "select c.relname, pg_relation_size(c.oid) from pg_catalog.pg_index i"
        " join pg_catalog.pg_class c on c.oid = i.indexrelid"
        f" where i.indrelid = to_regclass('{SCHEMA}.memories') and c.relname like '{_INDEX_PREFIX}%'"
        f" and i.indisvalid and obj_description(c.oid, 'pg_class') = {user}"
    )
    erased = source.query(
        f"select {_iso('max(requested_at)')} from {SCHEMA}.erase_ledger where user_id_sha256 = {literal(user_digest(user_id))}"
    )
    return UserSummary(
        user_id,
        rows,
        size_bytes,
        {str(state): int(count or 0) for state, count in states},
        first,
        last,
        changed,
        index[0][0] if index else None,
        int(index[0][1] or 0) if index else None,
        erased[0][0],
    )


def _iso(expression: str) -> str:
    return f"""to_char({expression} at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""


def erasures_of(records: Records) -> dict[str, datetime]:
    """
    Read when the erasure of each user was last requested, by SHA-256 of the id.

    Raises:
        ExternalToolError: The store cannot be read.
    """
    newest: dict[str, datetime] = {}
    for record in records.get_all(FOLDER).values():
        user, at = str(record["user_sha256"]), datetime.fromisoformat(str(record["requested_at"]))
        newest[user] = max(at, newest.get(user, at))
    return newest


def refuse_erased(user_id: str, at: datetime, erased: Mapping[str, datetime]) -> None:
    """
    Refuse to bring somebody back who was erased.

    Args:
        user_id: Whom.
        at: The instant whose state is wanted.
        erased: See `erasures_of`.

    Raises:
        StateRefusedError: The erasure was requested at `at` or later.
    """
    requested_at = erased.get(user_digest(user_id))
    if requested_at is not None and requested_at >= at:
        raise StateRefusedError(
            f"this user was erased on {requested_at:%Y-%m-%d %H:%M:%S} UTC, and does not come back from before that",
            hint=f"choose a moment after it: `--at` later than {requested_at.isoformat()}",
        )


def digest_prelude() -> str:
    """Spell the settings that digests need, for a source whose statements are sessions of their own."""
    return "".join(f"set {name} = {literal(value)};\n" for name, value in DIGEST_SETTINGS.items())


def extract_user(
    opened: Opened, user_id: str, at: datetime, destination: Destination, output: Output, *, keys: Keys | None = None
) -> Manifest:
    """
    Restore a moment into a throw-away container and take one user out of it, as a logical backup.

    Args:
        opened: The stack.
        user_id: Whom.
        at: The moment, aware UTC.
        destination: Where the backup goes.
        output: Where progress is said.
        keys: Encrypts for its recipients.

    Raises:
        StateRefusedError: Nothing leads to the moment, or the user had no rows then.
        ExternalToolError: pgBackRest or PostgreSQL failed.
        VerificationError: The moment was not reached.
    """
    with output.step("Look at the backups and the archive"):
        plan = plan_restore(opened.engine, at=at)
    database = str(opened.outputs.database)
    request = Request(database, Choice(user_id=user_id), keys or Keys())
    with restored(opened, plan, output) as sandbox:
        source: RowSource = sandbox.rows(database, prelude=digest_prelude())
        with output.step("Take the user out of it"):
            return create(source, request, destination, output, taken_at=at)


@contextmanager
def opened_backup(place: str) -> Iterator[list[Link]]:
    """
    Lend a backup that a command line names, with all that it builds on, oldest first and checked.

    Raises:
        StateRefusedError: It is not there, or a link of its chain is not.
        SourceDataError: It is damaged.
    """
    destination, name = find_backup(place)
    with ExitStack() as stack:
        yield open_chain(destination, name, stack)


@contextmanager
def extracted_user(opened: Opened, user_id: str, at: datetime, output: Output) -> Iterator[list[Link]]:
    """Lend what `extract_user` takes out, in a folder that only this process reads and that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="memharbor-") as folder, ExitStack() as stack:
        place = Folder(Path(folder))
        manifest = extract_user(opened, user_id, at, place, output)
        yield open_chain(place, manifest.id, stack)


def undo_point(what: str) -> str:
    """Name the restore point before a merge."""
    return f"memharbor-before-{what}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def check_new_owner(user_id: str) -> str:
    """
    Check the id that rows are to be brought in under.

    Raises:
        UsageError: It is empty, or Mem0 would change it.
    """
    if not user_id or user_id != user_id.strip() or "\0" in user_id:
        raise UsageError(f"`{user_id}` cannot be a user's id: it is empty, or begins or ends with white space")
    return user_id
