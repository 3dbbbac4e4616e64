"""`memharbor backup create --type logical` and `memharbor backup restore`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from memharbor.commands import common_options, confirm, dry_run_option, dsn_option, stack_option, yes_option
from memharbor.output import Output

if TYPE_CHECKING:
    from datetime import datetime

    from memharbor.backup.logical_files import Keys
    from memharbor.target import Target

Command = TypeVar("Command", bound=Callable[..., Any])

FILE = click.Path(dir_okay=False, path_type=Path)
# Where logical backups are kept unless said otherwise, below the working directory.
DEFAULT_DESTINATION = "backups"


def key_options(command: Command) -> Command:
    """Give a command the options about age keys."""
    options = [
        click.option(
            "--recipient", "recipients", multiple=True, metavar="AGE1…", help="Encrypt for this age recipient."
        ),
        click.option("--recipients-file", type=FILE, help="Encrypt for the age recipients in this file."),
        identity_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def identity_option(command: Command) -> Command:
    """Give a command `--identity-file`."""
    return click.option("--identity-file", type=FILE, help="age identities that open encrypted backups.")(command)


def destination_option(command: Command) -> Command:
    """Give a command `--destination`."""
    return click.option(
        "--destination",
        metavar="PATH|s3://…",
        help=f"Where logical backups are kept.  [default: {DEFAULT_DESTINATION}]",
    )(command)


def logical_options(command: Command) -> Command:
    """Give `backup create` the options of type logical."""
    options = [
        click.option("--user", "user_id", metavar="ID", help="logical: only this user."),
        click.option("--since", metavar="TIME|last", help="logical: what changed since the backup taken then."),
        click.option("--from", "from_at", metavar="TIME", help="logical: only memories made from then on."),
        click.option("--to", "to_at", metavar="TIME", help="logical: only memories made before; a day is included."),
        destination_option,
        key_options,
        dsn_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def refuse_logical_options(options: dict[str, Any]) -> None:
    """
    Refuse options that only a logical backup has.

    Raises:
        UsageError: One was given.
    """
    from memharbor.errors import UsageError

    given = [name for name, value in options.items() if value]
    if given:
        option = {"user_id": "user", "from_at": "from", "to_at": "to", "recipients": "recipient"}.get(
            given[0], given[0]
        )
        raise UsageError(f"`--{option.replace('_', '-')}` belongs to `--type logical`")


def create_logical(output: Output, stack: str, *, dry_run: bool, dsn: str | None, **options: Any) -> None:
    """
    Take a logical backup and say what it holds.

    Args:
        output: Where it is said.
        stack: Name of the stack.
        dry_run: Only count the rows.
        dsn: Another database.
        options: Those of `logical_options`.
    """
    from contextlib import ExitStack, closing

    from memharbor.backup.chain import Request, describe, find_parent
    from memharbor.backup.destinations import find_destination
    from memharbor.backup.logical import count_rows, create, snapshot
    from memharbor.backup.selection import Choice
    from memharbor.target import find_target

    from_at, to_at, since = _instants(options)
    keys = read_key_options(options)
    target = find_target(stack, dsn)
    destination = find_destination(options.get("destination") or DEFAULT_DESTINATION)
    choice = Choice(options.get("user_id"), from_at, to_at)
    request = Request(target.settings.database, choice, keys, mem0_history=options.get("mem0_history"))
    with ExitStack() as files:
        if options.get("since"):
            parent = find_parent(destination, request, since, files)
            request = Request(request.database, choice, keys, parent, request.mem0_history)
        with closing(target.connect(autocommit=True)) as connection, snapshot(connection) as rows:
            if dry_run:
                counts = count_rows(rows, request)
                said = ", ".join(f"{count:,} {table}" for table, count in counts.items())
                output.result({"dry_run": True, "rows": counts}, f"would take a logical backup: {said}")
                return
            with output.step(f"Take a logical backup of {target.name}"):
                manifest = create(rows, request, destination, output)
    data = describe(manifest, destination)
    output.result(data, _said(data))


def _instants(options: dict[str, Any]) -> tuple[datetime | None, datetime | None, datetime | None]:
    from memharbor.backup.chain import parse_time
    from memharbor.errors import UsageError

    since, from_at, to_at = options.get("since"), options.get("from_at"), options.get("to_at")
    if since and (from_at or to_at):
        raise UsageError(
            "`--since` excludes `--from` and `--to`: it builds on a backup, they choose rows by their time"
        )
    instants = (
        parse_time("--from", from_at) if from_at else None,
        parse_time("--to", to_at, end_of_day=True) if to_at else None,
        parse_time("--since", since) if since and since != "last" else None,
    )
    if instants[0] and instants[1] and instants[0] >= instants[1]:
        raise UsageError("`--from` is not before `--to`")
    return instants


def read_key_options(options: dict[str, Any]) -> Keys:
    """Read the age keys that options name."""
    from memharbor.backup.logical_files import read_keys

    return read_keys(
        options.get("recipients") or (),
        recipients_file=options.get("recipients_file"),
        identity_file=options.get("identity_file"),
    )


def _said(data: dict[str, Any]) -> str:
    from memharbor.output import size_text

    rows = ", ".join(f"{count:,} {table}" for table, count in data["rows"].items() if count) or "no new rows"
    parent = f", on top of {data['parent']}: {data['gone']:,} gone" if data["parent"] else ""
    return f"{data['place']}\n{rows}{parent}; {size_text(data['stored_bytes'])} stored, of {data['users']:,} users"


@click.command("restore")
@click.argument("place", metavar="PLACE")
@click.option(
    "--on-conflict", type=click.Choice(["skip", "overwrite", "new-id"]), help="For rows that are there and differ."
)
@click.option("--mem0-history", type=FILE, help="Put Mem0's own SQLite history back here.")
@identity_option
@dry_run_option
@yes_option
@dsn_option
@stack_option
@common_options
def restore_logical(
    output: Output,
    place: str,
    on_conflict: Any,
    mem0_history: Path | None,
    identity_file: Path | None,
    dry_run: bool,
    yes: bool,
    dsn: str | None,
    stack: str,
) -> None:
    """
    Restore a logical backup, with all that it builds on.

    PLACE is its folder, or `s3://bucket/prefix/NAME`. Everything is checked before anything is written, and it is one
    transaction. A database that has memories is refused, unless `--on-conflict` says what becomes of rows that differ.

    \b
    Example:
      memharbor backup restore backups/memharbor-memharbor-20261031T120000000000Z --dry-run
    """
    from memharbor.backup.logical_files import read_keys
    from memharbor.backup.user import opened_backup
    from memharbor.target import find_target

    target = find_target(stack, dsn)
    keys = read_keys(identity_file=identity_file)
    with opened_backup(place) as chain:
        manifest = chain[-1].manifest
        if not dry_run:
            confirm(f"Restore backup {manifest.id} into {target.name}?", yes=yes)
        report = merge_into(output, target, chain, keys, on_conflict=on_conflict, dry_run=dry_run, what="load")
        data = report.as_data()
        if mem0_history is not None and not dry_run:
            data["mem0_history_kept"] = _restore_history(chain, keys, mem0_history, on_conflict)
    say_merge(output, data)


def _restore_history(chain: Any, keys: Keys, path: Path, on_conflict: str | None) -> str | None:
    from memharbor.backup.mem0_history import restore_history
    from memharbor.errors import StateRefusedError

    link = next((each for each in reversed(chain) if each.manifest.mem0_history), None)
    if link is None:
        raise StateRefusedError("the backup has no history of Mem0's", hint="take it along with `--mem0-history`")
    file = link.manifest.mem0_history
    kept = restore_history(link.folder, file, keys, path, overwrite=on_conflict == "overwrite")
    return str(kept) if kept else None


def merge_into(
    output: Output, target: Target, chain: Any, keys: Keys, *, dry_run: bool, what: str, **options: Any
) -> Any:
    """
    Merge a backup into a target's database.

    Args:
        output: Where progress is said.
        target: The database.
        chain: The backup.
        keys: Opens it.
        dry_run: Change nothing.
        what: Part of the restore point's name.
        options: Further ones of `MergeOptions`.
    """
    from contextlib import closing

    from memharbor.backup.merge import MergeOptions, merge_backup
    from memharbor.backup.records import Records
    from memharbor.backup.user import erasures_of, undo_point
    from memharbor.operations import backup_engine

    point, erased = None, {}
    if target.outputs is not None:
        point = undo_point(what)
        erased = erasures_of(Records(backup_engine(target.outputs.stack)))
    merge_options = MergeOptions(**options, dry_run=dry_run, erased=erased, point=None if dry_run else point)
    with closing(target.connect(autocommit=True)) as connection:
        return merge_backup(connection, chain, merge_options, keys, output)


def say_merge(output: Output, data: dict[str, Any]) -> None:
    """Say what a merge did, and what undoes it."""
    words = ("inserted", "overwritten", "skipped", "same", "orphaned")
    lines = [
        f"{table}: " + ", ".join(f"{counts[word]:,} {word}" for word in words if counts[word])
        for table, counts in data["tables"].items()
        if any(counts.values())
    ] or ["the backup has no rows"]
    if data["dry_run"]:
        lines.insert(0, "would merge, and change nothing now:")
    if data["erased_users_left_out"]:
        lines.append(f"left out: {data['erased_users_left_out']:,} users who were erased since")
    if data["undo_point"]:
        lines.append(f"to undo, with all that anybody wrote since: memharbor restore --name {data['undo_point']}")
    if data.get("mem0_history_kept"):
        lines.append(f"the history that was there is kept at {data['mem0_history_kept']}")
    output.result(data, "\n".join(lines))
