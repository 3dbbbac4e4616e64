"""`memharbor backup undelete`, `memharbor backup purge` and `memharbor backup offsite`: what the custodian does."""

from __future__ import annotations

import click

from memharbor.commands import common_options, confirm, dry_run_option, stack_option, yes_option
from memharbor.output import Output


@click.command()
@click.option("--since", metavar="TIME", help="Only what was deleted since: ISO 8601 with an offset.")
@click.option("--at", metavar="TIME", help="Bring back what was overwritten as well: the store's state of this moment.")
@dry_run_option
@yes_option
@stack_option
@common_options
def undelete(output: Output, since: str | None, at: str | None, dry_run: bool, yes: bool, stack: str) -> None:
    """
    Bring back what was deleted in the backup store.

    By default everything that was deleted within `version_retention_days`. What pgBackRest let expire comes back, too,
    and goes again with its next expiry.

    \b
    Example:
      memharbor backup undelete --since 2026-01-31T12:00:00Z --dry-run
    """
    from datetime import UTC, datetime

    from memharbor.backup.plan import parse_instant
    from memharbor.errors import UsageError
    from memharbor.operations import open_custodian

    if since and at:
        raise UsageError("`--since` and `--at` exclude each other")
    now = datetime.now(UTC)
    moments = {
        "since": parse_instant(since, now=now) if since else None,
        "at": parse_instant(at, now=now) if at else None,
    }
    custodian = open_custodian(stack)
    if not dry_run:
        confirm(f"Bring back what was deleted in the backup store of stack {stack}?", yes=yes)
    with output.step("Look at the versions in the backup store" if dry_run else "Bring back what was deleted"):
        report = custodian.undelete(**moments, dry_run=dry_run)
    output.result(
        {"dry_run": dry_run, **report},
        f"{_would(dry_run, 'brought', 'bring')} back {report['brought_back']:,} objects: {report['delete_markers']:,}"
        f" delete markers removed, {report['copies']:,} older versions written again",
    )


@click.command()
@dry_run_option
@yes_option
@stack_option
@common_options
def purge(output: Output, dry_run: bool, yes: bool, stack: str) -> None:
    """
    Delete for good what was deleted long ago.

    What pgBackRest deletes or overwrites stays in the store as a version for `version_retention_days`; the custodian
    purges older ones every day. To delete backups by their retention: memharbor backup prune.

    \b
    Example:
      memharbor backup purge --dry-run
    """
    from memharbor.operations import open_custodian
    from memharbor.output import size_text

    custodian = open_custodian(stack)
    if not dry_run:
        confirm(f"Delete old versions in the backup store of stack {stack} for good?", yes=yes)
    with output.step("Look at the versions in the backup store" if dry_run else "Purge old versions"):
        report = custodian.purge(dry_run=dry_run)
    output.result(
        {"dry_run": dry_run, **report},
        f"{_would(dry_run, 'purged', 'purge')} {report['versions']:,} of {report['entries']:,} versions,"
        f" {size_text(report['bytes'])}, and the last of {report['keys']:,} objects",
    )


@click.group()
def offsite() -> None:
    """Show, refresh and fetch the off-site copy of the backup store."""


@offsite.command()
@stack_option
@common_options
def status(output: Output, stack: str) -> None:
    """
    Show how far behind the off-site copy is, and how the last copy went.

    \b
    Example:
      memharbor backup offsite status
    """
    from datetime import UTC, datetime

    from memharbor.backup.custodian import offsite_text
    from memharbor.operations import open_custodian

    report = open_custodian(stack).status()
    output.result(report, offsite_text(report, now=datetime.now(UTC)))


@offsite.command()
@click.option("--accept-changes", is_flag=True, help="Follow although many files changed that are written once.")
@dry_run_option
@stack_option
@common_options
def copy(output: Output, accept_changes: bool, dry_run: bool, stack: str) -> None:
    """
    Bring the off-site copy in step now, beside its schedule.

    \b
    Example:
      memharbor backup offsite copy
    """
    from memharbor.operations import open_custodian
    from memharbor.output import size_text

    custodian = open_custodian(stack)
    with output.step("Compare the copy with the backup store" if dry_run else "Copy"), output.percent() as on_percent:
        report = custodian.copy(accept_changes=accept_changes, dry_run=dry_run, on_percent=on_percent)
    output.result(
        {"dry_run": dry_run, **report},
        f"{_would(dry_run, 'copied', 'copy')} {report['copied']:,} of {report['objects']:,} objects,"
        f" {size_text(report['copied_bytes'])}",
    )


@offsite.command()
@click.option("--replace", is_flag=True, help="Do it although the backup store is not lost.")
@dry_run_option
@yes_option
@stack_option
@common_options
def fetch(output: Output, replace: bool, dry_run: bool, yes: bool, stack: str) -> None:
    """
    Fill a backup store that was lost from its off-site copy.

    Archiving rests meanwhile. What was archived since the copy is a gap: restore, or make a full backup at once.

    \b
    Example:
      memharbor backup offsite fetch --dry-run
    """
    from memharbor.operations import open_custodian
    from memharbor.output import size_text

    custodian = open_custodian(stack)
    if not dry_run:
        confirm(f"Fill the backup store of stack {stack} from its off-site copy?", yes=yes)
    with (
        output.step("Compare the store with its copy" if dry_run else "Fetch the copy"),
        output.percent() as on_percent,
    ):
        report = custodian.fetch(replace=replace, dry_run=dry_run, on_percent=on_percent)
    text = (
        f"{_would(dry_run, 'fetched', 'fetch')} {report['objects']:,} objects, {size_text(report['bytes'])}, as of"
        f" {report['as_of']}, and {_would(dry_run, 'deleted', 'delete')} {report['deleted']:,} that the copy does not have"
    )
    if not dry_run:
        text += (
            "\nnext: memharbor restore, or where the database is as it should be: memharbor backup create --type full"
        )
    output.result({"dry_run": dry_run, **report}, text)


def _would(dry_run: bool, done: str, verb: str) -> str:
    return f"would {verb}" if dry_run else done
