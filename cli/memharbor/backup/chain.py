"""
Chains of logical backups: what an incremental one builds on, and what a restore needs.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from memharbor.backup.destinations import Destination
from memharbor.backup.erasure import user_digest
from memharbor.backup.logical_files import Keys, check_files, load
from memharbor.backup.logical_format import Manifest, Selection
from memharbor.backup.selection import Choice
from memharbor.errors import ConfigError, StateRefusedError, UsageError


@dataclass(frozen=True)
class Link:
    """One backup of a chain: where its files are, what they are, and the SHA-256 of its manifest."""

    folder: Path
    manifest: Manifest
    manifest_sha256: str


@dataclass(frozen=True)
class Request:
    """
    What is to be backed up.

    Args:
        database: Name of the database.
        choice: Which rows.
        keys: Encrypts for its recipients, decrypts the parent by its identities.
        parent: The backup to build on, for an incremental one.
        mem0_history: Mem0's SQLite history to take along.
    """

    database: str
    choice: Choice
    keys: Keys
    parent: Link | None = None
    mem0_history: Path | None = None


def selection_of(choice: Choice) -> Selection:
    """Say of a choice what a manifest says of it."""
    user = None if choice.user_id is None else user_digest(choice.user_id)
    return Selection(user, choice.from_at, choice.to_at)


def find_parent(destination: Destination, request: Request, since: datetime | None, stack: ExitStack) -> Link:
    """
    Find the backup that an incremental one builds on: the newest of the same rows, taken at `since` or before.

    Args:
        destination: Where it is looked for.
        request: What is to be backed up.
        since: Aware; `None` is the newest of all.
        stack: Keeps the parent's files at hand until it is closed.

    Raises:
        StateRefusedError: There is none.
    """
    wanted = selection_of(request.choice)
    for name in reversed(destination.list_backups()):
        with destination.fetch(name, only_manifest=True) as folder:
            manifest, _ = load(folder, only_manifest=True)
        fits = manifest.database == request.database and manifest.selection == wanted
        if fits and (since is None or manifest.taken_at <= since):
            if manifest.encrypted and not request.keys.identities:
                raise ConfigError(
                    f"backup `{name}` is encrypted, and what changed since cannot be told without it",
                    hint="name the file of your age identity with `--identity-file`",
                )
            folder = stack.enter_context(destination.fetch(name))
            manifest, digest = load(folder)
            check_files(folder, manifest)
            return Link(folder, manifest, digest)
    before = f" taken at {since.isoformat()} or before" if since else ""
    raise StateRefusedError(
        f"there is no logical backup of the same rows{before} to build on",
        hint=["take a whole one first: the same command without `--since`", "or choose rows by time with `--from`"],
    )


def open_chain(destination: Destination, name: str, stack: ExitStack) -> list[Link]:
    """
    Fetch a backup and everything it builds on, oldest first, and check every file.

    Raises:
        StateRefusedError: A link is missing or is another one than was built on.
        SourceDataError: A file is damaged.
    """
    chain: list[Link] = []
    wanted: str | None = name
    expected: str | None = None
    while wanted is not None:
        below = chain[0].manifest.id if chain else None
        try:
            folder = stack.enter_context(destination.fetch(wanted))
        except StateRefusedError as exc:
            if below is None:
                raise
            raise StateRefusedError(
                f"backup `{below}` builds on `{wanted}`, which is not beside it", hint="bring the missing one back"
            ) from exc
        manifest, digest = load(folder)
        if expected not in (None, digest):
            raise StateRefusedError(f"backup `{below}` builds on another `{wanted}` than the one that is there")
        check_files(folder, manifest)
        chain.insert(0, Link(folder, manifest, digest))
        wanted = manifest.parent.id if manifest.parent else None
        expected = manifest.parent.manifest_sha256 if manifest.parent else None
    return chain


def describe(manifest: Manifest, destination: Destination) -> dict[str, Any]:
    """Describe a backup for the command line."""
    return {
        "backup": manifest.id,
        "place": destination.spell(manifest.id),
        "taken_at": manifest.taken_at.isoformat(),
        "parent": manifest.parent.id if manifest.parent else None,
        "users": manifest.user_count,
        "rows": {table.name: table.rows.rows for table in manifest.tables},
        "gone": sum(table.gone.rows for table in manifest.tables if table.gone),
        "stored_bytes": sum(file.size_bytes for file in manifest.files),
        "encrypted": manifest.encrypted,
        "mem0_history_rows": manifest.mem0_history.rows if manifest.mem0_history else None,
    }


def parse_time(option: str, text: str, *, end_of_day: bool = False) -> datetime:
    """
    Read an instant, or a day of UTC, of which the beginning is meant.

    Args:
        option: Which one it was given for.
        text: ISO 8601 with an offset, or a day.
        end_of_day: A day means its end.

    Raises:
        UsageError: It is neither.

    >>> parse_time("--from", "2025-01-01").isoformat()
    '2025-01-01T00:00:00+00:00'
    >>> parse_time("--to", "2025-10-27", end_of_day=True).isoformat()
    '2025-10-28T00:00:00+00:00'
    """
    try:
        at = datetime.fromisoformat(text)
    except ValueError as exc:
        raise UsageError(f"`{option} {text}` is not a time", hint="write it as 2026-01-31T12:00:00Z") from exc
    if len(text) == len("2025-01-01"):
        return at.replace(tzinfo=UTC) + timedelta(days=1 if end_of_day else 0)
    if at.tzinfo is None:
        raise UsageError(f"`{option} {text}` has no time zone", hint=f"write `{text}Z` for UTC")
    return at.astimezone(UTC)
