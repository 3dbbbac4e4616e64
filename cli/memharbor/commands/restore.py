"""`memharbor restore`."""

from __future__ import annotations

import click

from memharbor.commands import common_options, confirm, dry_run_option, stack_option, yes_option
from memharbor.output import Output


@click.command()
@click.option("--at", metavar="TIME", help="Restore the state of this moment: ISO 8601 with an offset.")
@click.option("--name", metavar="POINT", help="Restore the state of this named restore point.")
@dry_run_option
@yes_option
@stack_option
@common_options
def restore(output: Output, at: str | None, name: str | None, dry_run: bool, yes: bool, stack: str) -> None:
    """
    Restore the stack's database from its backups.

    To the end of the archive, to a moment or to a named point. Clients of the pool wait meanwhile. Before it begins, the
    present state is named and archived, so that the restore itself can be undone.

    \b
    Examples:
      memharbor restore --at 2026-01-31T12:00:00Z
      memharbor restore --name before-upgrade --dry-run
    """
    from datetime import UTC, datetime

    from memharbor.backup.plan import parse_instant, plan_restore
    from memharbor.backup.restore import Restore
    from memharbor.errors import UsageError
    from memharbor.operations import open_stack

    if at and name:
        raise UsageError("`--at` and `--name` exclude each other")
    moment = parse_instant(at, now=datetime.now(UTC)) if at else None
    opened = open_stack(stack)
    with output.step("Look at the backups and the archive"):
        plan = plan_restore(opened.engine, at=moment, name=name)
    if dry_run:
        output.result(
            {"dry_run": True, **plan.as_data()}, f"would restore backup {plan.backup.id} and replay to {plan.target}"
        )
        return
    confirm(f"Replace database `{opened.outputs.database}` of stack {stack} by its state at {plan.target}?", yes=yes)
    report = Restore(opened.engine, opened.containers, opened.pooler, opened.pool_databases, output).run(plan)
    data = report.as_data()
    text = f"restored backup {data['backup']} to {data['target']}, reached {data['reached_lsn']}, now on timeline {data['new_timeline']}"
    if report.undo_point:
        text += f"\nto undo: memharbor restore --name {report.undo_point}"
    output.result(data, text)
