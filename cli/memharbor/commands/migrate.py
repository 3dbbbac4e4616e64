"""`memharbor migrate`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from memharbor.commands import common_options, confirm, dry_run_option, dsn_option, stack_option, yes_option
from memharbor.commands.migrate_embed import embed
from memharbor.commands.migrate_export import export
from memharbor.commands.migrate_options import (
    checkpoint_option,
    choice_options,
    embedding_options,
    pace_options,
    read_pace,
    read_settings,
    read_source,
    read_users,
    run_argument,
    source_options,
)
from memharbor.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable

    from memharbor.migrate.opening import Pace, SourceSpec
    from memharbor.migrate.pipeline import Report, Step
    from memharbor.migrate.runs import RunSettings
    from memharbor.migrate.transform import Choice
    from memharbor.migrate.workfolder import WorkFolder
    from memharbor.target import Target

_STEPS = ["read", "transform", "embed", "load", "verify"]


@click.group()
def migrate() -> None:
    """Bring memories in from elsewhere, and take them out again."""


@migrate.command()
@source_options
@choice_options
@embedding_options
@click.option("--sample", type=click.IntRange(min=1), default=1000, show_default=True, help="Items to try.")
@dsn_option
@stack_option
@common_options
def plan(output: Output, sample: int, dsn: str | None, stack: str, **options: Any) -> None:
    """
    Say what a migration will take: counts, time, cost of embeddings, and what will be refused.

    The first items go through every step for real, and what they loaded is rolled back; a file is counted to its end.
    Nothing is written, and nothing is sent to an embedding endpoint: only a model of this machine is timed.

    \b
    Example:
      memharbor migrate plan --from file --input platform-export.json --model text-embedding-3-small
    """
    from memharbor.migrate.rehearsal import rehearse_sample
    from memharbor.target import find_target

    target = find_target(stack, dsn)
    settings = read_settings(options, target)
    made = rehearse_sample(settings, target, output, size=sample)
    output.result(made.as_data(), made.text())


@migrate.command()
@source_options
@choice_options
@embedding_options
@click.option("--until", type=click.Choice(_STEPS), default="verify", show_default=True, help="The last step to do.")
@checkpoint_option
@dry_run_option
@dsn_option
@stack_option
@common_options
def run(
    output: Output, until: Step, checkpoint: bool, dry_run: bool, dsn: str | None, stack: str, **options: Any
) -> None:
    """
    Bring memories in: read, transform, embed, load, verify.

    Takes a checkpoint first and prints how to roll back. What is refused is kept with its reason; the rest comes in. A
    run that was stopped goes on with `resume`.

    \b
    Examples:
      memharbor migrate run --from file --input platform-export.json --dry-run
      memharbor migrate run --from platform --users alice,bob --model text-embedding-3-small
    """
    from memharbor.migrate.rehearsal import rehearse
    from memharbor.target import find_target

    target = find_target(stack, dsn)
    settings = read_settings(options, target)
    if dry_run:
        report = rehearse(settings, target, output)
        output.result({"dry_run": True, **report.as_data()}, f"would do: {_counts_text(report)}")
        return
    take = partial(_take_checkpoint, output, stack, dsn) if checkpoint else None
    _carry_out(output, target, _new_folder(stack, dsn, settings), until, settings=settings, take_checkpoint=take)


@migrate.command()
@source_options
@click.option("--output-file", "path", type=click.Path(dir_okay=False), required=True, help="A file of JSON lines.")
@click.option("--users", metavar="ID,…", help="Only these users.")
@click.option("--from-date", metavar="TIME", help="Only what was created then or later.")
@click.option("--to-date", metavar="TIME", help="Only what was created before then.")
@click.option("--replace", is_flag=True, help="Replace a file that is there.")
@dry_run_option
@common_options
def read(output: Output, path: str, replace: bool, dry_run: bool, **options: Any) -> None:
    """
    Read a source into a file of JSON lines with a manifest; needs no database of ours.

    A reading that was stopped goes on when it is repeated. `migrate run --from file` reads the file, and does the same
    as a run from the source.

    \b
    Examples:
      memharbor migrate read --from platform --output-file platform-export.jsonl
      memharbor migrate read --from platform --users alice,bob --output-file two-users.jsonl
    """
    from pathlib import Path

    from memharbor.migrate.fetching import fetch, refuse_unwritable
    from memharbor.migrate.opening import open_source

    spec, users, choice = _read_choice(options)
    with open_source(spec, users=users) as source:
        if dry_run:
            refuse_unwritable(Path(path), replace=replace)
            info = source.describe()
            counts = ", ".join(f"{count:,} of kind {kind}" for kind, count in info.counts.items()) or "what is there"
            text = f"would read {counts} from {info.name}" + (", and keep what is chosen" if choice else "")
            output.result({"dry_run": True, "counts": dict(info.counts)}, text)
            return
        manifest = fetch(source, Path(path), output, replace=replace, choice=choice)
    refused = sum(manifest["refused"].values())
    output.result(manifest, f"{sum(manifest['items'].values()):,} items in {path}; refused {refused:,}")


@migrate.command()
@run_argument
@click.option("--until", type=click.Choice(_STEPS), default="verify", show_default=True, help="The last step to do.")
@pace_options
@dry_run_option
@dsn_option
@stack_option
@common_options
def resume(
    output: Output, name: str | None, until: Step, dry_run: bool, dsn: str | None, stack: str, **options: Any
) -> None:
    """
    Go on with a run that was stopped, or with one step of it; the newest by default.

    \b
    Examples:
      memharbor migrate resume
      memharbor migrate resume 20261121T093000Z-file --until embed
    """
    from memharbor.migrate.run_folders import describe_run, find_run
    from memharbor.operations import migrations_folder
    from memharbor.target import find_target

    folder = find_run(migrations_folder(stack, dsn), name)
    if dry_run:
        found = describe_run(folder)
        done = ", ".join(f"{found[step]:,} {step}" for step in ("read", "transformed", "embedded", "loaded"))
        output.result({"dry_run": True, **found}, f"would go on with run {found['name']}, of which segments are {done}")
        return
    _carry_out(output, find_target(stack, dsn), folder, until, pace=read_pace(options))


@migrate.command()
@run_argument
@stack_option
@dsn_option
@common_options
def status(output: Output, name: str | None, dsn: str | None, stack: str) -> None:
    """
    Show how far the runs are.

    \b
    Example:
      memharbor migrate status
    """
    from memharbor.migrate.run_folders import describe_run, find_run, list_runs
    from memharbor.operations import migrations_folder

    folder = migrations_folder(stack, dsn)
    runs = [find_run(folder, name)] if name else list_runs(folder)
    output.table(
        [describe_run(each) for each in runs],
        ["name", "source", "read", "transformed", "embedded", "loaded", "refused", "state"],
        empty="no run yet; run `memharbor migrate run --help`",
    )


@migrate.command()
@run_argument
@click.option("--input", "path", type=click.Path(exists=True, dir_okay=False), help="A mended copy of them.")
@click.option("--remap-users", metavar="FILE", help="A longer one than the run had.")
@checkpoint_option
@dry_run_option
@dsn_option
@stack_option
@common_options
def retry(
    output: Output,
    name: str | None,
    path: str | None,
    remap_users: str | None,
    checkpoint: bool,
    dry_run: bool,
    dsn: str | None,
    stack: str,
) -> None:
    """
    Try again what a run refused, after it was mended in `dead-letters.jsonl` of its folder; the newest by default.

    Items are chosen and renamed as the run did; what it refused later on has its new name already.

    \b
    Examples:
      memharbor migrate retry 20261121T093000Z-file
      memharbor migrate retry 20261121T093000Z-file --remap-users all-users.csv
    """
    from pathlib import Path

    from memharbor.migrate.rehearsal import rehearse
    from memharbor.migrate.remapping import read_remap
    from memharbor.migrate.run_folders import find_run
    from memharbor.migrate.runs import settings_of_retry
    from memharbor.operations import migrations_folder
    from memharbor.target import find_target

    folder = find_run(migrations_folder(stack, dsn), name)
    settings = settings_of_retry(folder, path, read_remap(Path(remap_users)) if remap_users else None)
    target = find_target(stack, dsn)
    if dry_run:
        report = rehearse(settings, target, output)
        output.result({"dry_run": True, **report.as_data()}, f"would do: {_counts_text(report)}")
        return
    take = partial(_take_checkpoint, output, stack, dsn) if checkpoint else None
    _carry_out(output, target, _new_folder(stack, dsn, settings), "verify", settings=settings, take_checkpoint=take)


@migrate.command()
@run_argument
@click.option("--with", "other", metavar="STACK", help="Compare the stack's database with another stack's instead.")
@dsn_option
@stack_option
@common_options
def compare(output: Output, name: str | None, other: str | None, dsn: str | None, stack: str) -> int:
    """
    Compare what a run carried with the database, or two databases; to the bit of every vector.

    Exits with 10 on any difference. With `--dsn`, `--with` compares that database with a stack's.

    \b
    Examples:
      memharbor migrate compare
      memharbor migrate compare --with staging
    """
    from memharbor.errors import UsageError, VerificationError
    from memharbor.migrate.rehearsal import compare_run, compare_stacks
    from memharbor.migrate.run_folders import find_run
    from memharbor.operations import migrations_folder
    from memharbor.target import find_target

    if name is not None and other is not None:
        raise UsageError("a run or `--with`, not both")
    target = find_target(stack, dsn)
    with output.step("Compare"):
        if other is not None:
            found = compare_stacks(target, find_target(other))
        else:
            found = compare_run(find_run(migrations_folder(stack, dsn), name), target, output)
    count = found["missing"] + found["different"] + found["extra"]
    lines = [f"{each['what']}: {each['table']} {each['id']} {', '.join(each['columns'])}" for each in found["rows"]]
    seen = ", ".join(f"{max(each):,} {table}" for table, each in found.get("compared", {}).items())
    lines.append((f"{count:,} differences" if count else "no difference") + (f" in {seen}" if seen else ""))
    output.result(found, "\n".join(lines))
    return VerificationError.exit_code if count else 0


@migrate.command()
@run_argument
@dry_run_option
@yes_option
@dsn_option
@stack_option
@common_options
def rollback(output: Output, name: str | None, dry_run: bool, yes: bool, dsn: str | None, stack: str) -> None:
    """
    Roll the database back to the checkpoint that was taken before a run; exactly.

    \b
    Example:
      memharbor migrate rollback --dry-run
    """
    from memharbor.backup.roll_back import roll_back
    from memharbor.migrate.run_folders import find_run, read_checkpoint
    from memharbor.migrate.runs import forget_load
    from memharbor.operations import migrations_folder, open_checkpoints

    folder = find_run(migrations_folder(stack, dsn), name)
    checkpoint = read_checkpoint(folder)
    place = open_checkpoints(stack, dsn)
    plan = place.plan(checkpoint, None)
    if dry_run:
        output.result({"dry_run": True, **plan.as_data()}, f"would roll back to {checkpoint} by {plan.way}: {plan.why}")
        return
    confirm(f"Roll the memories back to checkpoint `{checkpoint}`?", yes=yes)
    report = roll_back(plan, place.connect, place.opened, output)
    forget_load(folder, place.target)
    output.result(report.as_data(), f"rolled back to checkpoint {checkpoint} by {plan.way} in {report.seconds:.1f} s")


def _read_choice(options: dict[str, Any]) -> tuple[SourceSpec, tuple[str, ...], Choice | None]:
    """
    Read which source and which of its items are meant.

    Raises:
        UsageError: `--users` names nobody, or a date is none.
    """
    from memharbor.migrate.runs import RunSettings

    spec, users = read_source(options), read_users(options["users"])
    settings = RunSettings(spec, users, options["from_date"], options["to_date"], vectors="generate")
    chooses = bool(users or options["from_date"] or options["to_date"])
    return spec, users, settings.choice(0) if chooses else None


def _new_folder(stack: str, dsn: str | None, settings: RunSettings) -> WorkFolder:
    from datetime import UTC, datetime

    from memharbor.migrate.run_folders import new_folder
    from memharbor.operations import migrations_folder

    return new_folder(migrations_folder(stack, dsn), settings.source.kind, now=datetime.now(UTC))


def _take_checkpoint(output: Output, stack: str, dsn: str | None, run_name: str) -> str:
    from memharbor.backup.checkpoint import Scope
    from memharbor.backup.checkpoint_creation import create_checkpoint
    from memharbor.operations import open_checkpoints

    name = f"before-{run_name}".lower()
    with output.step(f"Create checkpoint {name}"):
        create_checkpoint(open_checkpoints(stack, dsn).checkpoints, name, Scope((), None), copy=None)
    return name


def _carry_out(
    output: Output,
    target: Target,
    folder: WorkFolder,
    until: Step,
    *,
    settings: RunSettings | None = None,
    take_checkpoint: Callable[[str], str] | None = None,
    pace: Pace | None = None,
) -> None:
    from memharbor.migrate.runs import opened_run

    with opened_run(folder, target, output, settings=settings, take_checkpoint=take_checkpoint, pace=pace) as opened:
        report = opened.carry_out(until)
        name = folder.path.name
        text = f"run {name}: {_counts_text(report)}"
        if report.counts["refused"]:
            text += f"\nrefused ones, with their reasons: {folder.path}/dead-letters.jsonl"
        if opened.checkpoint:
            where = "" if target.outputs is None else f" --stack {target.outputs.stack}"
            text += f"\nto undo: memharbor migrate rollback {name}{where}"
        output.result({"run": name, "checkpoint": opened.checkpoint, **report.as_data()}, text)


def _counts_text(report: Report) -> str:
    words = ("read", "inserted", "updated", "same", "skipped", "not_chosen", "refused")
    return ", ".join(f"{report.counts[word]:,} {word.replace('_', ' ')}" for word in words)


migrate.add_command(embed)
migrate.add_command(export)
