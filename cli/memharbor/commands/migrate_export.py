"""`memharbor migrate export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from memharbor.commands import common_options, dry_run_option, dsn_option, stack_option
from memharbor.output import Output

if TYPE_CHECKING:
    from memharbor.target import Target


@click.command()
@click.option("--to", "where", type=click.Choice(["file", "platform", "zep"]), default="file", show_default=True)
@click.option("--output-file", "path", type=click.Path(dir_okay=False), help="file: where; gzip where it ends in .gz.")
@click.option(
    "--shape", type=click.Choice(["jsonl", "platform"]), default="jsonl", show_default=True, help="Of the file."
)
@click.option("--users", metavar="ID,…", help="Only these users.")
@click.option("--url", metavar="URL", help="platform, zep: where it is not the usual one.")
@click.option("--mapping", type=click.Path(exists=True, dir_okay=False), help="zep: roles, memory types and metadata.")
@click.option("--threads", is_flag=True, help="zep: turns of conversations become messages of threads.")
@click.option("--validate", "check", is_flag=True, help="zep: count afterwards what is there.")
@click.option("--replace", is_flag=True, help="file: replace one that is there.")
@dry_run_option
@dsn_option
@stack_option
@common_options
def export(
    output: Output, where: str, users: str | None, dry_run: bool, dsn: str | None, stack: str, **options: Any
) -> int:
    """
    Take memories out: to a file with everything in it, to the Mem0 Platform, or to Zep Cloud.

    What is in a service already is not written again.

    \b
    Examples:
      memharbor migrate export --output-file memories.jsonl.gz
      memharbor migrate export --to platform --users alice --dry-run
      memharbor migrate export --to zep --validate
    """
    from memharbor.migrate.taking_out import count
    from memharbor.target import find_target

    target = find_target(stack, dsn)
    names = tuple(filter(None, (user.strip() for user in (users or "").split(","))))
    if dry_run:
        found = count(target, names)
        output.result({"dry_run": True, "memories": found}, f"would take out {found:,} memories")
        return 0
    if where == "zep":
        return _to_zep(output, target, names, stack, dsn, options)
    _to_file_or_platform(output, target, names, where, options)
    return 0


def _to_file_or_platform(
    output: Output, target: Target, users: tuple[str, ...], where: str, options: dict[str, Any]
) -> None:
    from memharbor.migrate.taking_out import to_file, to_platform

    if where == "file":
        manifest = to_file(target, users, options["path"], options["shape"], output, replace=options["replace"])
        output.result(
            manifest, f"{manifest['memories']:,} memories of {manifest['users']:,} users in {options['path']}"
        )
        return
    report = to_platform(target, users, options["url"], output)
    output.result(report, ", ".join(f"{number:,} {word}" for word, number in report["counts"].items()))


def _to_zep(
    output: Output, target: Target, users: tuple[str, ...], stack: str, dsn: str | None, options: dict[str, Any]
) -> int:
    from memharbor.errors import VerificationError
    from memharbor.migrate.taking_out import to_zep
    from memharbor.operations import migrations_folder

    report, text = to_zep(
        target,
        users,
        migrations_folder(stack, dsn) / "zep",
        output,
        url=options["url"],
        mapping=options["mapping"],
        threads=options["threads"],
        check=options["check"],
    )
    output.result(report, text)
    is_complete = report["validation"] is None or report["validation"]["is_complete"]
    return 0 if is_complete else VerificationError.exit_code
