"""`memharbor checkpoint`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from memharbor.commands import common_options, confirm, dry_run_option, dsn_option, stack_option, yes_option
from memharbor.output import Output

if TYPE_CHECKING:
    from memharbor.backup.checkpoint import Checkpoint
    from memharbor.operations import CheckpointPlace

_COLUMNS = ["name", "created_at", "scope", "rows", "size", "ways"]


@click.group()
def checkpoint() -> None:
    """Name a state of the memories, to roll back to."""


@checkpoint.command()
@click.argument("name")
@click.option("--tables", metavar="TABLE,…", default="", help="Only these tables.  [default: all]")
@click.option("--user", "user_id", metavar="ID", help="Only this user's rows.")
@click.option("--copy/--no-copy", default=None, help="Copy the rows, or only name the state.  [default: up to 1 GiB]")
@dry_run_option
@dsn_option
@stack_option
@common_options
def create(
    output: Output,
    name: str,
    tables: str,
    user_id: str | None,
    copy: bool | None,
    dry_run: bool,
    dsn: str | None,
    stack: str,
) -> None:
    """
    Create a checkpoint: a restore point in the log, and a copy of the rows of that very state.

    Writers wait for milliseconds; the copying holds nobody up.

    \b
    Examples:
      memharbor checkpoint create before-upgrade
      memharbor checkpoint create alice-before --user alice
    """
    from memharbor.backup.checkpoint import Scope, check_name
    from memharbor.backup.checkpoint_creation import create_checkpoint
    from memharbor.operations import open_checkpoints

    scope = Scope(tuple(filter(None, (table.strip() for table in tables.split(",")))), user_id)
    place = open_checkpoints(stack, dsn)
    if dry_run:
        resolved = place.resolve(scope)
        data = {"dry_run": True, "name": check_name(name), "tables": list(resolved)}
        output.result(data, f"would create checkpoint {name} of {', '.join(resolved)}")
        return
    with output.step(f"Create checkpoint {name}"):
        created = create_checkpoint(place.checkpoints, name, scope, copy=copy)
    output.table(_rows(output, place, [created]), _COLUMNS)


@checkpoint.command("list")
@dsn_option
@stack_option
@common_options
def list_checkpoints(output: Output, dsn: str | None, stack: str) -> None:
    """
    List the checkpoints, oldest first, with the ways that lead back to each.

    \b
    Example:
      memharbor checkpoint list
    """
    from memharbor.operations import open_checkpoints

    place = open_checkpoints(stack, dsn)
    rows = _rows(output, place, place.checkpoints.list())
    output.table(rows, _COLUMNS, empty="no checkpoint yet; run `memharbor checkpoint create NAME`")


@checkpoint.command()
@click.argument("name")
@dsn_option
@stack_option
@common_options
def diff(output: Output, name: str, dsn: str | None, stack: str) -> None:
    """
    Count the rows that were added, changed and removed since a checkpoint; `--verbose` names them.

    \b
    Example:
      memharbor checkpoint diff last
    """
    from contextlib import closing

    from memharbor.backup.changes import find_changed_keys, find_changes
    from memharbor.operations import open_checkpoints

    place = open_checkpoints(stack, dsn)
    found = place.checkpoints.get(name)
    with closing(place.connect()) as connection:
        rows = [{"table": table, **vars(each)} for table, each in find_changes(connection, found).items()]
        keys = find_changed_keys(connection, found) if output.verbose else []
    if output.format == "json":
        output.result({"checkpoint": found.name, "tables": rows, **({"rows": keys} if output.verbose else {})})
        return
    output.table(rows, ["table", "added", "changed", "removed"])
    if keys:
        output.table(keys, ["table", "change", "key"])


@checkpoint.command()
@click.argument("name")
@dry_run_option
@yes_option
@dsn_option
@stack_option
@common_options
def delete(output: Output, name: str, dry_run: bool, yes: bool, dsn: str | None, stack: str) -> None:
    """
    Delete a checkpoint and the copies of its rows.

    \b
    Example:
      memharbor checkpoint delete before-upgrade
    """
    from memharbor.operations import open_checkpoints

    place = open_checkpoints(stack, dsn)
    found = place.checkpoints.get(name)
    if not dry_run:
        confirm(f"Delete checkpoint `{found.name}` of {found.created_at:%Y-%m-%d %H:%M:%S %Z}?", yes=yes)
        place.checkpoints.delete(found)
    done = "would delete" if dry_run else "deleted"
    output.result({"dry_run": dry_run, "deleted": found.name}, f"{done} checkpoint {found.name}")


def _rows(output: Output, place: CheckpointPlace, checkpoints: list[Checkpoint]) -> list[dict[str, Any]]:
    ways = place.ways(checkpoints)
    return [_row(output, each, ways[each.name]) for each in checkpoints]


def _row(output: Output, each: Checkpoint, ways: list[str]) -> dict[str, Any]:
    from memharbor.output import size_text

    row = {"name": each.name, "created_at": each.created_at, "scope": each.scope, "rows": each.rows, "ways": ways}
    if output.format == "text":
        return {**row, "size": size_text(each.size_bytes) if each.copies else "not copied"}
    return {**row, "copied": bool(each.copies), "size_bytes": each.size_bytes, "point": each.point}
