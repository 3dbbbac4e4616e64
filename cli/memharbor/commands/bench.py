"""`memharbor bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from memharbor.commands import common_options, confirm, dry_run_option, dsn_option, stack_option, yes_option
from memharbor.output import Output

if TYPE_CHECKING:
    from memharbor.bench.migrate import MigrateBench


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
@click.option("--sizes", metavar="N,…", help="Instead, migrate so many memories from end to end, each size by itself.")
@dry_run_option
@yes_option
@dsn_option
@stack_option
@common_options
def migrate(
    output: Output, rows: int, users: int, sizes: str | None, dry_run: bool, yes: bool, dsn: str | None, stack: str
) -> None:
    """
    Compare a load with the seeds' import script and with a bare COPY, on an empty database.

    Loads the same made-up memories each way, embeds as many texts one by one and in batches, and empties the database
    again. Ratios are against the first way of each piece of work.

    \b
    Examples:
      memharbor bench migrate --stack bench --yes
      memharbor bench migrate --stack bench --sizes 1000,10000,100000,1000000 --yes
    """
    from memharbor.bench.migrate import MigrateBench
    from memharbor.target import find_target

    run = MigrateBench(find_target(stack, dsn), output)
    run.refuse_memories()
    numbers = _read_sizes(sizes)
    work = "migrate " + ", ".join(f"{number:,}" for number in numbers) if numbers else f"load {rows:,}"
    if dry_run:
        text = f"would {work} made-up memories, and delete them again"
        output.result({"dry_run": True, "rows": rows, "users": users, "sizes": numbers}, text)
        return
    confirm(f"{work.capitalize()} made-up memories, and delete them again?", yes=yes)
    if numbers:
        _bench_sizes(run, numbers)
    else:
        _bench_ways(run, rows, users)


def _bench_ways(run: MigrateBench, rows: int, users: int) -> None:
    from memharbor.bench.measure import compare
    from memharbor.bench.whole_runs import embed_both_ways

    measures = compare([*run.run(rows=rows, users=users), *embed_both_ways(run.target, run.output, rows)])
    for each in measures:
        each["rows_per_second"] = round(rows / max(each["seconds"], 0.01))  # which is as exact as they are
    run.output.table(measures, ["work", "way", "seconds", "seconds_ratio", "rows_per_second"])


def _bench_sizes(run: MigrateBench, sizes: list[int]) -> None:
    from dataclasses import asdict

    from memharbor.bench.whole_runs import run_sizes

    found = [asdict(each) for each in run_sizes(run.target, run.output, sizes)]
    for each in found:
        each["minutes"] = round(each.pop("run_seconds") / 60, 2)
        each["compare_seconds"] = round(each["compare_seconds"], 1)
    run.output.table(found, ["rows", "minutes", "compare_seconds", "peak_memory_bytes", "differences"])


def _read_sizes(text: str | None) -> list[int]:
    from memharbor.errors import UsageError

    try:
        sizes = [int(part) for part in (text or "").split(",") if part]
    except ValueError:
        sizes = [0]
    if not all(size > 0 for size in sizes):
        raise UsageError(f"`--sizes {text}` are no numbers of memories", hint="for instance `--sizes 1000,10000`")
    return sizes
