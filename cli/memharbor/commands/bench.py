"""`memharbor bench`."""

from __future__ import annotations

import click

from memharbor.commands import common_options, confirm, dry_run_option, dsn_option, stack_option, yes_option
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


@bench.command("migrate")
@click.option("--rows", type=click.IntRange(100), default=20_000, show_default=True, help="Memories to make.")
@click.option("--users", type=click.IntRange(1), default=50, show_default=True, help="Users they belong to.")
@dry_run_option
@yes_option
@dsn_option
@stack_option
@common_options
def migrate(output: Output, rows: int, users: int, dry_run: bool, yes: bool, dsn: str | None, stack: str) -> None:
    """
    Compare a load with statements of a hundred rows and with a bare COPY, on an empty database.

    Loads the same made-up memories each way and empties the database again. Ratios are against the first way.

    \b
    Example:
      memharbor bench migrate --stack bench --yes
    """
    from memharbor.bench.measure import compare
    from memharbor.bench.migrate import MigrateBench, peak_memory_bytes
    from memharbor.output import size_text
    from memharbor.target import find_target

    run = MigrateBench(find_target(stack, dsn), output)
    run.refuse_memories()
    if dry_run:
        text = f"would load {rows:,} memories of {users:,} users four times, and delete them again"
        output.result({"dry_run": True, "rows": rows, "users": users}, text)
        return
    confirm(f"Load {rows:,} made-up memories four times, and delete them again?", yes=yes)
    measures = compare(run.run(rows=rows, users=users))
    for each in measures:
        each["rows_per_second"] = round(rows / each["seconds"])
    output.table(measures, ["way", "seconds", "seconds_ratio", "rows_per_second"])
    output.note(f"peak memory {size_text(peak_memory_bytes())}")
