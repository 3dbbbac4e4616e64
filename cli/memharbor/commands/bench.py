"""`memharbor bench`."""

from __future__ import annotations

import click

from memharbor.commands import common_options, confirm, dry_run_option, stack_option, yes_option
from memharbor.output import Output


@click.group()
def bench() -> None:
    """Measure two ways of the same work side by side."""


@bench.command("backup")
@click.option("--rows", type=click.IntRange(100), default=100_000, show_default=True, help="Memories to make.")
@click.option("--users", type=click.IntRange(10), default=20_000, show_default=True, help="Users they belong to.")
@dry_run_option
@yes_option
@stack_option
@common_options
def backup(output: Output, rows: int, users: int, dry_run: bool, yes: bool, stack: str) -> None:
    """
    Compare backups and restores with `pg_dump` and `pg_basebackup`, on an empty stack.

    It fills the stack with made-up memories, measures every way once, and empties it again. Ratios are against the first
    way of each piece of work.

    \b
    Example:
      memharbor bench backup --stack bench --rows 100000 --yes
    """
    from memharbor.bench.backup import BackupBench
    from memharbor.bench.measure import compare
    from memharbor.operations import open_stack
    from memharbor.target import find_target

    run = BackupBench(open_stack(stack), find_target(stack), output)
    run.refuse_memories()
    if dry_run:
        text = f"would fill stack {stack} with {rows:,} memories of {users:,} users, measure, and empty it again"
        output.result({"dry_run": True, "rows": rows, "users": users}, text)
        return
    confirm(f"Fill stack {stack} with {rows:,} made-up memories, and empty it again?", yes=yes)
    columns = ["work", "way", "seconds", "seconds_ratio", "size_bytes", "bytes_ratio"]
    output.table(compare(run.run(rows=rows, users=users)), columns)
