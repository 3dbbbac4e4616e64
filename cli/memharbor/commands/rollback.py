"""`memharbor rollback`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from memharbor.commands import common_options, confirm, dry_run_option, dsn_option, stack_option, yes_option
from memharbor.output import Output

if TYPE_CHECKING:
    from memharbor.backup.rollback import RollbackPlan


@click.command()
@click.option("--to", "name", required=True, metavar="NAME|last", help="The checkpoint.")
@click.option(
    "--way", type=click.Choice(["copies", "restored-copy", "restore"]), help="How.  [default: the cheapest exact one]"
)
@dry_run_option
@yes_option
@dsn_option
@stack_option
@common_options
def rollback(output: Output, name: str, way: Any, dry_run: bool, yes: bool, dsn: str | None, stack: str) -> None:
    """
    Roll back to a checkpoint, exactly: to the row and to the bits of every vector.

    Puts the copied rows back where the tables are as they were, else restores to the checkpoint's point; says which
    and why. Users who were erased since stay erased. The state before gets a name, so that it can be undone.

    \b
    Examples:
      memharbor rollback --to last --dry-run
      memharbor rollback --to before-upgrade
    """
    from memharbor.backup.roll_back import roll_back
    from memharbor.operations import open_checkpoints

    place = open_checkpoints(stack, dsn)
    with output.step("Look for the cheapest exact way"):
        plan = place.plan(name, way)
    if dry_run:
        output.result({"dry_run": True, **plan.as_data()}, f"would go back: {_text(plan)}")
        return
    output.note(_text(plan))
    confirm(f"Roll {plan.checkpoint.scope} back to checkpoint `{plan.checkpoint.name}`?", yes=yes)
    report = roll_back(plan, place.connect, place.opened, output)
    data = report.as_data()
    text = f"rolled back to checkpoint {plan.checkpoint.name} by {plan.way} in {report.seconds:.1f} s"
    if report.undo_point and place.opened is not None:
        text += f"\nto undo: memharbor restore --name {report.undo_point}"
    output.result(data, text)


def _text(plan: RollbackPlan) -> str:
    lines = [f"way {plan.way}: {plan.why}"]
    changed = {table: each for table, each in (plan.changes or {}).items() if each.total}
    lines += [
        f"{table}: {each.added:,} added, {each.changed:,} changed, {each.removed:,} removed since"
        for table, each in changed.items()
    ]
    if plan.changes is not None and not changed:
        lines.append("no row was changed since")
    return "\n".join(lines)
