"""`memharbor drill`."""

from __future__ import annotations

from typing import Any

import click

from memharbor.commands import common_options, dry_run_option, stack_option
from memharbor.output import Output


@click.command()
@click.option("--backup", "backup_id", metavar="ID", help="Drill this backup.  [default: the newest]")
@click.option("--at", metavar="TIME", help="Drill the state of this moment: ISO 8601 with an offset.")
@click.option(
    "--schedule",
    type=click.Choice(["daily", "weekly", "off", "show"]),
    help="Do not drill now: let this machine drill the newest backup regularly, or no more, or show what is set.",
)
@dry_run_option
@stack_option
@common_options
def drill(
    output: Output, backup_id: str | None, at: str | None, schedule: str | None, dry_run: bool, stack: str
) -> None:
    """
    Prove a backup by restoring it.

    Restores it into a throw-away container without a network, compares every user's rows with what was recorded when
    it was made, tries policies, indexes, checksums, search and Mem0's own SQL, and writes a report. Exits with 10 where
    something is wrong. Nothing of the running stack changes but the mark on the backup.

    \b
    Examples:
      memharbor drill
      memharbor drill --at 2026-01-31T12:00:00Z
      memharbor drill --schedule weekly
    """
    from memharbor.errors import UsageError

    if schedule is not None:
        if backup_id or at:
            raise UsageError("`--schedule` drills the newest backup, and excludes `--backup` and `--at`")
        _set_schedule(output, schedule, stack, dry_run=dry_run)
        return
    _drill(output, backup_id, at, stack, dry_run=dry_run)


def _drill(output: Output, backup_id: str | None, at: str | None, stack: str, *, dry_run: bool) -> None:
    from datetime import UTC, datetime

    from memharbor.backup.drill import choose_plan, record_drill, run_drill
    from memharbor.backup.drill_report import write_report
    from memharbor.backup.erasure import replay_erasures
    from memharbor.backup.plan import parse_instant
    from memharbor.backup.records import Records
    from memharbor.errors import VerificationError
    from memharbor.operations import drills_folder, open_stack

    moment = parse_instant(at, now=datetime.now(UTC)) if at is not None else None
    opened = open_stack(stack)
    records = Records(opened.engine)
    with output.step("Look at the backups and their records"):
        plan, manifest = choose_plan(opened, records, backup_id=backup_id, at=moment)
    if dry_run:
        compared = "compare it with its record" if manifest else "compare no rows, since nothing was recorded for it"
        data = {"dry_run": True, **plan.as_data(), "has_record": manifest is not None}
        output.result(data, f"would restore backup {plan.backup.id} to {plan.target}, and {compared}")
        return
    report = run_drill(opened, plan, manifest, output, stack=stack, replay=lambda rows: replay_erasures(records, rows))
    paths = write_report(report, drills_folder(stack))
    record_drill(opened, records, report)
    output.result(
        {**report.as_data(), "files": {kind: str(path) for kind, path in paths.items()}},
        report.as_text() + f"report: {paths['html']}",
    )
    if not report.is_good:
        failed = ", ".join(check.name for check in report.failed)
        raise VerificationError(
            f"backup `{plan.backup.id}` failed its drill: {failed}", hint="docs/runbooks/failed-drill.md"
        )


def _set_schedule(output: Output, schedule: str, stack: str, *, dry_run: bool) -> None:
    import os
    import sys
    from datetime import UTC, datetime
    from pathlib import Path

    from memharbor.backup import drill_schedule
    from memharbor.operations import drills_folder
    from memharbor.stack.provisioner import activated, find_checkout

    binaries, checkout = Path(sys.executable).parent, find_checkout()
    note_path, log = drills_folder(stack) / "schedule.json", drills_folder(stack) / "scheduled.log"
    job = drill_schedule.describe_job(
        stack, str(binaries / "memharbor"), checkout, log, activated(os.environ, checkout, binaries)
    )
    place, note = drill_schedule.find_place(), drill_schedule.read_note(note_path)
    data = {"stack": stack, "frequency": (note or {}).get("frequency"), "place": (note or {}).get("place")}
    if schedule == "show":
        said = f"{data['frequency']}, by {data['place']}" if note else "no drill is scheduled"
        output.result(data, said)
        return
    frequency: Any = None if schedule == "off" else schedule
    line = drill_schedule.render_crontab_line(job, frequency) if frequency and place == "crontab" else None
    units = drill_schedule.render_units(job, frequency) if frequency and place != "crontab" and place else {}
    data = {"stack": stack, "frequency": frequency, "place": place, "line": line, "units": units}
    if dry_run:
        text = line or "".join(f"# {name}\n{unit}\n" for name, unit in units.items())
        output.result({"dry_run": True, **data}, f"would schedule drills: {schedule}\n{text}")
        return
    if frequency is None:
        drill_schedule.remove(job, place)
    else:
        drill_schedule.install(job, frequency, place)
    drill_schedule.write_note(note_path, frequency, place, now=datetime.now(UTC))
    output.result(data, f"drills of stack {stack}: {schedule}" + (f", by {place}" if place else ""))
