"""`memharbor backup`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memharbor.commands import common_options, dry_run_option, stack_option
from memharbor.commands.backup_custodian import offsite, purge, undelete
from memharbor.commands.backup_logical import (
    FILE,
    create_logical,
    logical_options,
    refuse_logical_options,
    restore_logical,
)
from memharbor.commands.backup_schedule import prune, schedule
from memharbor.commands.backup_verify import verify
from memharbor.output import Output

if TYPE_CHECKING:
    from memharbor.backup.engine import Backup

_COLUMNS = ["id", "type", "ended_at", "seconds", "database", "stored", "verified"]


@click.group()
def backup() -> None:
    """Create and list backups."""


@backup.command()
@click.option(
    "--type",
    "backup_type",
    type=click.Choice(["full", "diff", "incr", "logical"]),
    default="incr",
    show_default=True,
    help="full: everything; diff: since the last full; incr: since the last backup. Without a full one before it, any is "
    "full. logical: rows, readable with psql alone.",
)
@click.option("--mem0-history", type=FILE, help="Take Mem0's own SQLite history along.")
@logical_options
@dry_run_option
@stack_option
@common_options
def create(
    output: Output,
    backup_type: Any,
    mem0_history: Path | None,
    dry_run: bool,
    stack: str,
    dsn: str | None,
    **options: Any,
) -> None:
    """
    Create a backup: of the whole database with pgBackRest, or a logical one of its rows.

    Other connections go on. What was backed up before stays good if this one fails.

    \b
    Examples:
      memharbor backup create --type full
      memharbor backup create --type logical --user customer-123 --destination s3://my-bucket/mem0-backups/
    """
    if backup_type == "logical":
        create_logical(output, stack, dry_run=dry_run, dsn=dsn, mem0_history=mem0_history, **options)
        return
    refuse_logical_options({**options, "dsn": dsn if dsn != os.environ.get("MEMHARBOR_DSN") else None})
    if dry_run:
        _plan_physical(output, stack, backup_type, mem0_history)
    else:
        _create_physical(output, stack, backup_type, mem0_history)


def _plan_physical(output: Output, stack: str, backup_type: Any, mem0_history: Path | None) -> None:
    from contextlib import nullcontext

    from memharbor.backup.mem0_history import copied_history
    from memharbor.operations import backup_engine

    known = backup_engine(stack).list_backups()
    with copied_history(mem0_history) if mem0_history else nullcontext((None, None)) as (_, history_rows):
        kind = backup_type if known or backup_type == "full" else "full (there is no full backup yet)"
    carried = "" if history_rows is None else f", with {history_rows:,} rows of Mem0's own history"
    output.result(
        {"dry_run": True, "type": backup_type, "backups": len(known), "mem0_history_rows": history_rows},
        f"would create a backup of type {kind} of stack {stack}{carried}, beside {len(known)} others",
    )


def _create_physical(output: Output, stack: str, backup_type: Any, mem0_history: Path | None) -> None:
    from memharbor.backup.carried_history import hand_in
    from memharbor.operations import open_stack

    opened = open_stack(stack)
    history_rows = hand_in(opened.containers, opened.engine.container, mem0_history) if mem0_history else None
    with output.step(f"Create a {backup_type} backup of stack {stack}"), output.percent() as on_percent:
        created = opened.engine.create_backup(backup_type, history_rows=history_rows, on_percent=on_percent)
    output.table([_row(created)] if output.format == "text" else [_data(created)], _COLUMNS)


@backup.command("list")
@stack_option
@common_options
def list_backups(output: Output, stack: str) -> None:
    """
    List the backups of a stack, oldest first.

    \b
    Example:
      memharbor backup list
    """
    from memharbor.operations import backup_engine

    backups = backup_engine(stack).list_backups()
    rows = [_row(each) if output.format == "text" else _data(each) for each in backups]
    output.table(rows, _COLUMNS, empty="no backup yet; run `memharbor backup create`")


@backup.command()
@click.argument("backup_id", metavar="ID")
@stack_option
@common_options
def show(output: Output, backup_id: str, stack: str) -> None:
    """
    Show one backup: its size, its WAL and what it depends on.

    \b
    Example:
      memharbor backup show 20261121-101914F
    """
    from memharbor.operations import backup_engine

    data = _data(backup_engine(stack).get_backup(backup_id))
    output.result(data, "\n".join(f"{key.replace('_', ' ')}: {value}" for key, value in data.items()))


def _row(each: Backup) -> dict[str, Any]:
    from memharbor.backup.drill import verified_at
    from memharbor.output import size_text

    return {
        "id": each.id,
        "type": each.type,
        "ended_at": each.ended_at,
        "seconds": int((each.ended_at - each.begun_at).total_seconds()),
        "database": size_text(each.database_bytes),
        "stored": size_text(each.stored_bytes),
        # Only a drill that restored it makes a backup verified.
        "verified": "damaged" if each.has_error else (verified_at(each) or "unverified"),
    }


def _data(each: Backup) -> dict[str, Any]:
    from memharbor.backup.carried_history import ANNOTATION
    from memharbor.backup.drill import verified_at
    from memharbor.backup.wal import format_lsn

    return {
        "id": each.id,
        "type": each.type,
        "begun_at": each.begun_at.isoformat(),
        "ended_at": each.ended_at.isoformat(),
        "database_bytes": each.database_bytes,
        "stored_bytes": each.stored_bytes,
        "timeline": each.timeline,
        "start_lsn": format_lsn(each.start_lsn),
        "stop_lsn": format_lsn(each.stop_lsn),
        "start_segment": each.start_segment,
        "stop_segment": each.stop_segment,
        "references": list(each.references),
        "has_error": each.has_error,
        "mem0_history_rows": int(each.annotations[ANNOTATION]) if ANNOTATION in each.annotations else None,
        "verified": not each.has_error and verified_at(each) is not None,
        "verified_at": instant.isoformat() if (instant := verified_at(each)) else None,
    }


backup.add_command(schedule)
backup.add_command(prune)
backup.add_command(undelete)
backup.add_command(purge)
backup.add_command(offsite)
backup.add_command(restore_logical)
backup.add_command(verify)
