"""`memharbor restore`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memharbor.commands import common_options, confirm, dry_run_option, stack_option, yes_option
from memharbor.output import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memharbor.backup.plan import RestorePlan
    from memharbor.backup.rows import RowSource
    from memharbor.operations import OpenStack


@click.command()
@click.option("--at", metavar="TIME", help="Restore the state of this moment: ISO 8601 with an offset.")
@click.option("--name", metavar="POINT", help="Restore the state of this named restore point.")
@click.option("--lsn", metavar="LSN", help="Restore up to this position of the log.")
@click.option("--xid", type=click.IntRange(min=3), metavar="XID", help="Restore up to the commit of this transaction.")
@click.option("--backup", "backup_id", metavar="ID", help="Begin with this backup.  [default: the newest that fits]")
@click.option(
    "--into", metavar="FOLDER|STACK", help="Restore there instead: a path with a `/`, or another stack's name."
)
@click.option("--replace", is_flag=True, help="Replace what `--into` holds already.")
@click.option(
    "--mem0-history",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Put Mem0's own SQLite history of the backup back here; one that is there is kept beside it.",
)
@dry_run_option
@yes_option
@stack_option
@common_options
def restore(output: Output, **options: Any) -> None:
    """
    Restore the stack's database from its backups.

    To the end of the archive, to a moment, a named point, a position or a transaction. Clients of the pool wait
    meanwhile. Before it begins, the present state is named and archived, so that the restore itself can be undone.

    \b
    Examples:
      memharbor restore --at 2026-01-31T12:00:00Z
      memharbor restore --name before-upgrade --dry-run
      memharbor restore --at 2026-01-31T12:00:00Z --into ./restored
    """
    from memharbor.backup.carried_history import refuse_without_history
    from memharbor.backup.plan import plan_restore
    from memharbor.operations import open_stack

    target = _read_target(options)
    opened = open_stack(options["stack"])
    with output.step("Look at the backups and the archive"):
        plan = plan_restore(opened.engine, backup_id=options["backup_id"], **target)
    into = options["into"]
    if options["mem0_history"] is not None:
        refuse_without_history(plan.backup, options["mem0_history"])
    other = _open_other(opened, plan, into, replace=options["replace"])
    if options["dry_run"]:
        where = f" into {into}" if into else ""
        output.result(
            {"dry_run": True, **plan.as_data(), "into": into},
            f"would restore backup {plan.backup.id}{where} and replay to {plan.target}",
        )
        return
    if into is None:
        _in_place(output, opened, plan, mem0_history=options["mem0_history"], yes=options["yes"])
    elif other is not None:
        _into_stack(output, opened, plan, other, replace=options["replace"], yes=options["yes"])
    else:
        _into_folder(output, opened, plan, into, replace=options["replace"], yes=options["yes"])


def _read_target(options: dict[str, Any]) -> dict[str, Any]:
    from datetime import UTC

    from memharbor.backup.plan import parse_instant, parse_position
    from memharbor.errors import UsageError

    given = [name for name in ("at", "name", "lsn", "xid") if options[name] is not None]
    if len(given) > 1:
        raise UsageError(f"`--{given[0]}` and `--{given[1]}` exclude each other")
    if options["replace"] and options["into"] is None:
        raise UsageError("`--replace` goes with `--into`")
    if options["mem0_history"] is not None and options["into"] is not None:
        raise UsageError("`--mem0-history` goes without `--into`")
    return {
        "at": parse_instant(options["at"], now=datetime.now(UTC)) if options["at"] is not None else None,
        "name": options["name"],
        "lsn": parse_position(options["lsn"]) if options["lsn"] is not None else None,
        "xid": options["xid"],
    }


def _open_other(opened: OpenStack, plan: RestorePlan, into: str | None, *, replace: bool) -> OpenStack | None:
    """Open the stack that `--into` names, and refuse what cannot be restored into; None where it names no stack."""
    from memharbor.backup.into_folder import refuse_folder
    from memharbor.backup.into_stack import refuse_stack
    from memharbor.operations import open_stack

    if into is None:
        return None
    if "/" in into:
        refuse_folder(Path(into).absolute(), plan, replace=replace)
        return None
    other = open_stack(into)
    refuse_stack(opened, other, replace=replace)
    return other


def _in_place(output: Output, opened: OpenStack, plan: RestorePlan, *, mem0_history: Path | None, yes: bool) -> None:
    from memharbor.backup import carried_history
    from memharbor.backup.erasure import replay_erasures
    from memharbor.backup.mem0_history import put_back
    from memharbor.backup.records import Records
    from memharbor.backup.restore import Restore

    outputs, records = opened.outputs, Records(opened.engine)
    confirm(f"Replace database `{outputs.database}` of stack {outputs.stack} by its state at {plan.target}?", yes=yes)
    work = Restore(
        opened.engine, opened.containers, opened.pooler, opened.pool_databases, output, database=outputs.database
    )
    kept = None
    with carried_history.scratch_file() as history:

        def on_open(rows: RowSource) -> Sequence[Any]:
            if mem0_history is not None:
                carried_history.fetch(opened.containers, opened.engine.container, history)
            return replay_erasures(records, rows)

        report = work.run(plan, on_open=on_open)
        if mem0_history is not None:
            kept = put_back(history, mem0_history, overwrite=True)
    data = {**report.as_data(), "mem0_history_kept": str(kept) if kept else None}
    text = f"restored backup {data['backup']} to {data['target']}, reached {data['reached_lsn']}, now on timeline {data['new_timeline']}"
    if report.erasures_replayed:
        text += f"\nerased again: {report.erasures_replayed}"
    if mem0_history is not None:
        text += f"\nMem0's history is that of the backup: {mem0_history}"
    if kept is not None:
        text += f"\nthe history that was there is kept at {kept}"
    if report.undo_point:
        text += f"\nto undo: memharbor restore --name {report.undo_point}"
    output.result(data, text)


def _into_folder(output: Output, opened: OpenStack, plan: RestorePlan, into: str, *, replace: bool, yes: bool) -> None:

    from memharbor.backup.erasure import replay_erasures
    from memharbor.backup.into_folder import restore_into_folder
    from memharbor.backup.records import Records
    from memharbor.output import size_text

    if replace:
        confirm(f"Delete what `{into}` holds?", yes=yes)
    records = Records(opened.engine)
    report = restore_into_folder(
        opened, plan, Path(into), output, replace=replace, on_open=lambda rows: replay_erasures(records, rows)
    )
    output.result(
        report.as_data(),
        f"restored backup {plan.backup.id} to {plan.target} into {report.folder}, {size_text(report.size_bytes)}",
    )


def _into_stack(
    output: Output, opened: OpenStack, plan: RestorePlan, other: OpenStack, *, replace: bool, yes: bool
) -> None:
    from contextlib import closing

    from memharbor.backup.erasure import replay_erasures
    from memharbor.backup.into_stack import restore_into_stack
    from memharbor.backup.records import Records
    from memharbor.names import ROLE_NAMES
    from memharbor.schema.passwords import encrypt_password
    from memharbor.target import find_target

    name = other.outputs.stack
    if replace:
        confirm(f"Replace the database of stack {name}, for which there is no way back?", yes=yes)
    passwords = {ROLE_NAMES[role]: secret.get_secret_value() for role, secret in other.outputs.passwords.items()}
    with closing(find_target(name).connect(dbname="postgres")) as connection:
        verifiers = {role: encrypt_password(connection, role, password) for role, password in passwords.items()}
    # Whom either stack erased stays erased.
    kept = [Records(each.engine) for each in (opened, other)]
    report = restore_into_stack(
        opened,
        plan,
        other,
        output,
        verifiers=verifiers,
        on_open=lambda rows: [record for records in kept for record in replay_erasures(records, rows)],
    )
    output.result(
        report.as_data(),
        f"restored backup {plan.backup.id} to {plan.target} into stack {name}\n"
        f"next: memharbor backup create --type full --stack {name}",
    )
