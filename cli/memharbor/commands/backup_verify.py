"""`memharbor backup verify`."""

from __future__ import annotations

import click

from memharbor.commands import common_options, stack_option
from memharbor.output import Output


@click.command()
@click.argument("backup_id", metavar="[ID]", required=False)
@stack_option
@common_options
def verify(output: Output, backup_id: str | None, stack: str) -> int:
    """
    Verify what lies in the backup store: every file of every backup, and the WAL without a gap.

    With an ID: that backup, what it depends on, and the WAL without which it is not consistent. Exits with 10 when
    anything is found. Only `memharbor drill` proves that a backup can be restored.

    \b
    Example:
      memharbor backup verify
    """
    from memharbor.backup.verify import BackupVerifier
    from memharbor.errors import VerificationError
    from memharbor.operations import backup_engine

    verifier = BackupVerifier(backup_engine(stack))
    with output.step(f"Verify {f'backup {backup_id}' if backup_id else 'the backups'} of stack {stack}"):
        result = verifier.verify(backup_id)
    output.result(result.as_data(), result.as_text())
    return 0 if result.is_good else VerificationError.exit_code
