"""`memharbor status`."""

from __future__ import annotations

import click

from memharbor.commands import common_options, dsn_option, stack_option
from memharbor.output import Output


@click.command()
@dsn_option
@stack_option
@common_options
def status(output: Output, stack: str, dsn: str | None) -> int:
    """
    Show what runs, what is stored and how well it is backed up.

    Exits with 10 when a part cannot be read or a container is not healthy.

    \b
    Example:
      memharbor status --output json
    """
    from memharbor.errors import VerificationError
    from memharbor.status import is_down, status_text, take_status
    from memharbor.target import find_target

    taken = take_status(find_target(stack, dsn))
    output.result(taken, status_text(taken))
    return VerificationError.exit_code if is_down(taken) else 0
