"""`memharbor backup schedule` and `memharbor backup prune`."""

from __future__ import annotations

from typing import Any

import click

from memharbor.commands import common_options, dry_run_option, stack_option
from memharbor.output import Output

_COLUMNS = ["type", "schedule", "next_run_at", "last_run"]


@click.group()
def schedule() -> None:
    """Show and set when backups are made."""


@schedule.command()
@stack_option
@common_options
def show(output: Output, stack: str) -> None:
    """
    Show the schedule, what comes next and how the last scheduled backups ended. Times are UTC.

    \b
    Example:
      memharbor backup schedule show
    """
    from memharbor.scheduling import read_schedule

    data = read_schedule(stack)
    if output.format == "json":
        output.result(data)
        return
    output.table([_row(each) for each in data["backups"]], _COLUMNS)
    days = f", and every moment of the last {data['retention_days']} days" if data["retention_days"] else ""
    output.result({}, f"kept: at least {data['retention_full']} full backups{days}")
    if not data["is_in_force"]:
        output.note(f"the running container has another schedule or retention; run `pulumi up --stack {stack}`")


@schedule.command("set")
@click.option(
    "--schedule",
    "preset",
    type=click.Choice(["hourly", "daily", "weekly", "off"]),
    help="hourly: full each week, diff each day, incr each hour; daily: without incr; weekly: full only.",
)
@click.option("--full", metavar="CRON", help="When full backups are made, five fields in UTC; empty is never.")
@click.option("--diff", metavar="CRON", help="When diff backups are made.")
@click.option("--incr", metavar="CRON", help="When incr backups are made.")
@click.option("--retention", type=click.IntRange(0, 36_500), metavar="DAYS", help="Days back to be restorable.")
@click.option("--keep-full", type=click.IntRange(1, 9999), metavar="N", help="Full backups to keep at least.")
@click.option("--apply/--no-apply", default=True, show_default=True, help="Bring it into force with `pulumi up`.")
@dry_run_option
@stack_option
@common_options
def set_(output: Output, stack: str, apply: bool, dry_run: bool, **options: Any) -> None:
    """
    Set when backups are made and how long they are kept, in the stack's config.

    `pulumi up` makes PostgreSQL's container anew for it: clients of the pool wait some seconds, others are disconnected.

    \b
    Examples:
      memharbor backup schedule set --schedule daily --retention 30
      memharbor backup schedule set --incr '*/15 * * * *'
    """
    from memharbor.backup.schedule import Wanted

    crons = {each: options[each] for each in ("full", "diff", "incr")}
    wanted = Wanted(options["preset"], crons, options["retention"], options["keep_full"])
    _set(output, stack, wanted, apply=apply, dry_run=dry_run)


@schedule.command()
@click.option("--apply/--no-apply", default=True, show_default=True, help="Bring it into force with `pulumi up`.")
@dry_run_option
@stack_option
@common_options
def off(output: Output, stack: str, apply: bool, dry_run: bool) -> None:
    """
    Make no scheduled backup any more; WAL is archived on, and what there is stays.

    \b
    Example:
      memharbor backup schedule off
    """
    from memharbor.backup.schedule import Wanted

    _set(output, stack, Wanted("off", {}), apply=apply, dry_run=dry_run)


@click.command()
@dry_run_option
@stack_option
@common_options
def prune(output: Output, stack: str, dry_run: bool) -> None:
    """
    Delete the backups and WAL that the retention no longer promises; each backup does this by itself at its end.

    \b
    Example:
      memharbor backup prune --dry-run
    """
    from memharbor.operations import backup_engine

    expired = backup_engine(stack).prune(dry_run=dry_run)
    goes = "would go" if dry_run else "gone"
    lines = [f"backup {label}: {goes}" for label in expired.backups]
    lines += [f"WAL {first} to {last}: {goes}" for first, last in expired.wal]
    output.result({"dry_run": dry_run, **expired.as_data()}, "\n".join(lines) or "nothing is too old")


def _set(output: Output, stack: str, wanted: Any, *, apply: bool, dry_run: bool) -> None:
    from memharbor.scheduling import set_schedule

    report = set_schedule(stack, wanted, output, apply=apply, dry_run=dry_run)
    doing = "would set" if dry_run else "set"
    done = [f"{doing} {name} to `{report['settings'][name]}`" for name in report["changed"]]
    output.result(report, "\n".join(done) or "nothing to change: the config of the stack says so already")
    if report["next"]:
        output.note(f"not in force yet; run `{report['next']}`")


def _row(each: dict[str, Any]) -> dict[str, Any]:
    run = each["last_run"]
    last = "" if run is None else f"{run['result']} at {run['ended_at']} {run['backup'] or run['said']}".strip()
    if each["schedule"] != each["in_force"]:
        last = f"in force: {each['in_force'] or 'never'}; {last}".rstrip("; ")
    return {**each, "schedule": each["schedule"] or "never", "last_run": last}
