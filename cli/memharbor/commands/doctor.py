"""`memharbor doctor`."""

from __future__ import annotations

import click

from memharbor.commands import common_options, dsn_option, stack_option
from memharbor.output import Output


@click.command()
@dsn_option
@stack_option
@common_options
def doctor(output: Output, stack: str, dsn: str | None) -> int:
    """
    Find what is wrong, before anything exists as well as after.

    Exits with 10 when something failed; warnings do not count.

    \b
    Example:
      memharbor doctor
    """
    from dataclasses import asdict

    from memharbor.doctor import examine
    from memharbor.errors import VerificationError

    findings = examine(stack, dsn)
    output.table([asdict(finding) for finding in findings], ["area", "level", "cause", "next_command"])
    return VerificationError.exit_code if any(finding.level == "failed" for finding in findings) else 0
