"""`memharbor validate`."""

from __future__ import annotations

import click

from memharbor.commands import common_options, dsn_option, stack_option
from memharbor.output import Output


@click.command()
@dsn_option
@stack_option
@common_options
def validate(output: Output, stack: str, dsn: str | None) -> int:
    """
    Check a live stack with real Mem0, and clean up.

    Nine checks: extension, tables, indexes in use, row level security enforcing, pooling, backup, memory CRUD, vector
    search, graph. Exits with 10 when one fails.

    \b
    Example:
      memharbor validate
    """
    raise NotImplementedError
