"""`memharbor config sync-platform`."""

from __future__ import annotations

from pathlib import Path

import click

from memharbor.commands import common_options, dry_run_option
from memharbor.output import Output


@click.command("sync-platform")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--url", metavar="URL", help="Of the service, where it is not the usual one.")
@dry_run_option
@common_options
def sync_platform(output: Output, file: Path, url: str | None, dry_run: bool) -> int:
    """
    Give a project of the Mem0 Platform the settings of a file, as far as it has them.

    FILE is a mapping in JSON, YAML or TOML: custom_instructions, custom_categories, agent_custom_instructions,
    multilingual, decay; or a configuration of Mem0, also in Python, whose prompt becomes custom_instructions. What is null
    or not in it stays as it is there. The key in MEM0_API_KEY says which project. Only what differs is set.

    \b
    Examples:
      memharbor config sync-platform platform.json --dry-run
      memharbor config sync-platform app/memory.py
    """
    from memharbor.errors import VerificationError
    from memharbor.mem0_config.for_platform import read_project_settings
    from memharbor.migrate.opening import open_platform
    from memharbor.migrate.targets.platform_settings import sync_settings

    settings, notes = read_project_settings(file)
    for note in notes:
        output.note(note.line())
    with open_platform(url) as http:
        done = sync_settings(http, settings, apply=not dry_run)
    for name in done.unsupported:
        output.note(f"`{name}` is no setting of a project: the service chooses it")
    for name in done.untaken:
        output.note(f"`{name}` was set, and the service still shows another value")
    output.result({"dry_run": dry_run, **done.as_data()}, done.text(dry_run=dry_run))
    return VerificationError.exit_code if done.untaken else 0
