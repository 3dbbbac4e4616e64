"""`memharbor migrate export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from memharbor.commands import common_options, dry_run_option, dsn_option, stack_option
from memharbor.output import Output

if TYPE_CHECKING:
    from memharbor.target import Target

TARGETS = ["file", "sqlite", "platform", "zep"]


@click.command()
@click.option("--to", "where", type=click.Choice(TARGETS), default="file", show_default=True)
@click.option(
    "--output-file",
    "path",
    type=click.Path(dir_okay=False),
    help="file, sqlite: where; file: gzip where it ends in .gz.",
)
@click.option(
    "--shape", type=click.Choice(["jsonl", "platform"]), default="jsonl", show_default=True, help="file: of it."
)
@click.option("--users", metavar="ID,…", help="Only these users.")
@click.option(
    "--map-users",
    type=click.Path(exists=True, dir_okay=False),
    help="sqlite: the number of each user, a JSON object or lines NUMBER,USER as --remap-users reads them.",
)
@click.option("--url", metavar="URL", help="platform, zep: where it is not the usual one.")
@click.option(
    "--review",
    type=click.Path(dir_okay=False),
    help="platform: write what is there with other contents to this file, a memory a line.",
)
@click.option(
    "--input", type=click.Path(exists=True, dir_okay=False), help="zep: an export file instead of the database."
)
@click.option("--session", "sessions", metavar="ID,…", help="zep: only what was said in these, by run_id.")
@click.option("--mapping", type=click.Path(exists=True, dir_okay=False), help="zep: roles, memory types and metadata.")
@click.option("--threads", is_flag=True, help="zep: turns of conversations become messages of threads.")
@click.option("--validate", "check", is_flag=True, help="zep: compare afterwards what is there.")
@click.option("--validate-only", "is_only_checked", is_flag=True, help="zep: compare what is there, and write nothing.")
@click.option("--replace", is_flag=True, help="file, sqlite, --review: replace one that is there.")
@dry_run_option
@dsn_option
@stack_option
@common_options
def export(
    output: Output, where: str, users: str | None, dry_run: bool, dsn: str | None, stack: str, **options: Any
) -> int:
    """
    Take memories out: to a file with everything in it, to ChatSG's tables, to the Mem0 Platform, or to Zep Cloud.

    What is in a service already is not written again.

    \b
    Examples:
      memharbor migrate export --output-file memories.jsonl.gz
      memharbor migrate export --to sqlite --output-file chatsg.db --map-users users.csv
      memharbor migrate export --to platform --users alice --dry-run
      memharbor migrate export --to platform --review changed.jsonl
      memharbor migrate export --to zep --validate
      memharbor migrate export --to zep --input mem0-export.json --users alice --session talk-1
    """
    from memharbor.commands.migrate_options import read_users
    from memharbor.migrate.taking_out import count
    from memharbor.target import find_target

    _refuse_misplaced(where, options)
    names = read_users(users)
    if where == "zep":
        return _to_zep(output, names, stack, dsn, options, dry_run=dry_run)
    target = find_target(stack, dsn)
    if where == "sqlite":
        _to_sqlite(output, target, names, options, dry_run=dry_run)
    elif dry_run:
        found = count(target, names)
        output.result({"dry_run": True, "memories": found}, f"would take out {found:,} memories")
    else:
        _to_file_or_platform(output, target, names, where, options)
    return 0


# What would be passed over without a word, and matters.
_ONLY_OF = {
    "review": ("platform", "--review"),
    "input": ("zep", "--input"),
    "sessions": ("zep", "--session"),
    "is_only_checked": ("zep", "--validate-only"),
}


def _refuse_misplaced(where: str, options: dict[str, Any]) -> None:
    from memharbor.errors import UsageError

    for name, (target, option) in _ONLY_OF.items():
        if options[name] not in (None, False) and where != target:
            raise UsageError(f"`{option}` is for `--to {target}`, not for `--to {where}`")


def _to_file_or_platform(
    output: Output, target: Target, users: tuple[str, ...], where: str, options: dict[str, Any]
) -> None:
    from memharbor.migrate.taking_out import to_file, to_platform

    path, replace = options["path"], options["replace"]
    if where == "file":
        manifest = to_file(target, users, path, options["shape"], output, replace=replace)
        output.result(manifest, f"{manifest['memories']:,} memories of {manifest['users']:,} users in {path}")
        return
    output.result(*to_platform(target, users, options["url"], output, review=options["review"], replace=replace))


def _to_sqlite(
    output: Output, target: Target, users: tuple[str, ...], options: dict[str, Any], *, dry_run: bool
) -> None:
    from memharbor.migrate.taking_out import to_sqlite

    path, map_users, replace = options["path"], options["map_users"], options["replace"]
    output.result(*to_sqlite(target, users, path, output, map_users=map_users, replace=replace, dry_run=dry_run))


def _to_zep(
    output: Output, users: tuple[str, ...], stack: str, dsn: str | None, options: dict[str, Any], *, dry_run: bool
) -> int:
    from pathlib import Path

    from memharbor.errors import UsageError, VerificationError
    from memharbor.migrate.taking_out import ToZep, count_for_zep, to_zep
    from memharbor.operations import migrations_folder
    from memharbor.target import find_target

    sessions = tuple(filter(None, (each.strip() for each in (options["sessions"] or "").split(","))))
    if options["sessions"] is not None and not sessions:
        raise UsageError("`--session` names nothing", hint="leave it out for everything")
    named = {name: options[name] for name in ("url", "mapping", "threads", "check", "is_only_checked")}
    choice = ToZep(users, sessions, **named)
    source = Path(options["input"]) if options["input"] else find_target(stack, dsn)
    if dry_run:
        counts = count_for_zep(source, choice)
        output.result({"dry_run": True, **counts}, f"would take out {counts['memories']:,} memories")
        return 0
    report, text = to_zep(source, choice, migrations_folder(stack, dsn) / "zep", output)
    output.result(report, text)
    is_complete = report["validation"] is None or report["validation"]["is_complete"]
    return 0 if is_complete else VerificationError.exit_code
