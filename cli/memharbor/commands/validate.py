"""`memharbor validate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from memharbor.commands import common_options, dsn_option, stack_option
from memharbor.output import Output

if TYPE_CHECKING:
    from memharbor.target import Target
    from memharbor.validation import BackupStatus


@click.command()
@click.option("--expected-count", type=click.IntRange(min=0), help="So many memories there must be, with embeddings.")
@dsn_option
@stack_option
@common_options
def validate(output: Output, expected_count: int | None, stack: str, dsn: str | None) -> int:
    """
    Check a live stack with real Mem0, and clean up.

    Nine checks: extension, tables, indexes in use, row level security enforcing, pooling, backup, memory CRUD, vector
    search, graph. Exits with 10 when one fails; after one that could not connect the others are not run.

    \b
    Examples:
      memharbor validate
      memharbor validate --expected-count 1500
    """
    from dataclasses import asdict

    from memharbor.errors import VerificationError
    from memharbor.target import find_target
    from memharbor.validation import ValidationContext, run_checks

    target = find_target(stack, dsn)
    context = ValidationContext(
        target.settings,
        target.dsn("admin", direct=True),
        target.dsn("app"),
        target.dsn("service"),
        is_pooled=target.outputs is not None,
        backup_status=None if target.outputs is None else lambda: _backup_status(target),
        expected_count=expected_count,
    )
    results = run_checks(context, on_result=lambda result: output.detail(f"{result.name}: {result.state}"))
    rows = [{**asdict(result), "seconds": round(result.seconds, 1)} for result in results]
    output.table(rows, ["name", "state", "detail", "hint", "seconds"])
    return VerificationError.exit_code if any(result.state == "failed" for result in results) else 0


def _backup_status(target: Target) -> BackupStatus:
    from memharbor.operations import backup_engine
    from memharbor.validation import BackupStatus

    engine = backup_engine(target.stack_outputs("a backup").stack)
    engine.check_archive()
    good = [backup for backup in engine.list_backups() if not backup.has_error]
    if not good:
        return BackupStatus(None, "there is no backup yet; run `memharbor backup create`")
    return BackupStatus(good[-1].ended_at, f"{len(good)} backups, the newest is {good[-1].id}")
