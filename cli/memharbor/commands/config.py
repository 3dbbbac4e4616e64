"""`memharbor config`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memharbor.commands import common_options, dsn_option, stack_option
from memharbor.commands.config_platform import sync_platform
from memharbor.output import Output

if TYPE_CHECKING:
    from memharbor.mem0_config.for_stack import Printed
    from memharbor.target import Target


@click.group()
def config() -> None:
    """Convert Mem0's configurations, and print one for a stack."""


config.add_command(sync_platform)


@config.command()
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--from", "release", type=click.Choice(["0.1", "1.0"]), help="What it was written for.  [default: told by its keys]"
)
@click.option(
    "--format", "form", type=click.Choice(["json", "python"]), default="json", show_default=True, help="Of the result."
)
@common_options
def convert(output: Output, old: Path, release: Any, form: str) -> None:
    """
    Convert a configuration of Mem0 0.1.x or 1.x to 2.x, and name each key that is dropped, renamed or added.

    OLD is Python, JSON, YAML or TOML; Python is read and never run. Secrets in it are replaced by variables of the
    environment: `${NAME}` in JSON, which a program has to put in; the Python form does it itself.

    \b
    Examples:
      memharbor config convert config.json > mem0.json
      memharbor config convert app/memory.py --from 1.0 --format python
    """
    from memharbor.mem0_config.convert import convert as convert_configuration
    from memharbor.mem0_config.reading import read_configuration
    from memharbor.mem0_config.render import as_data, as_json, as_program

    converted = convert_configuration(read_configuration(old), release, name=old.name)
    for note in converted.notes:
        output.note(note.line())
    text = as_json(converted.config) if form == "json" else as_program(converted.config)
    data = {
        "config": as_data(converted.config),
        "notes": [{"kind": note.kind, "key": note.key, "text": note.text} for note in converted.notes],
        "from": converted.release,
        "checked_by": converted.checked_by,
    }
    output.result(data | ({"python": text} if form == "python" else {}), text)


@config.command()
@click.option("--basic", "kind", flag_value="basic", help="Mem0 as the service, with a connection string.")
@click.option("--enterprise", "kind", flag_value="enterprise", help="One Memory per user; PostgreSQL keeps them apart.")
@click.option("--server", "kind", flag_value="server", help="Variables for Mem0's own server.")
@click.option(
    "--model",
    envvar="MEMHARBOR_EMBEDDING_MODEL",
    show_envvar=True,
    metavar="NAME",
    help="That embeds.  [default: the one of OpenAI that fits the stack's dims]",
)
@dsn_option
@stack_option
@common_options
def mem0(output: Output, kind: str | None, model: str | None, dsn: str | None, stack: str) -> None:
    """
    Print a configuration of Mem0 for a stack; passwords by reference to the environment.

    The first two are Python programs that run as they are; with `--output json` their configuration is data.

    \b
    Examples:
      memharbor config mem0 --basic > memory.py
      memharbor config mem0 --server > .env
    """
    from memharbor.errors import UsageError
    from memharbor.target import find_target

    if kind is None:
        raise UsageError("nothing says which configuration", hint="pass `--basic`, `--enterprise` or `--server`")
    printed = _configuration(kind, find_target(stack, dsn), model)
    for note in printed.notes:
        output.note(note)
    name = "environment" if kind == "server" else "config"
    program = {} if kind == "server" else {"python": printed.text}
    output.result({name: printed.data, **program, "notes": printed.notes}, printed.text)


def _configuration(kind: str, target: Target, model: str | None) -> Printed:
    from memharbor.mem0_config.for_stack import choose_model, for_server, for_service, for_users

    settings = target.settings
    dims = settings.embedding_dims
    model = choose_model(dims, model)
    if kind == "enterprise":
        return for_users(target.dsn("app"), dims, model, settings.pool_size)
    make = for_server if kind == "server" else for_service
    return make(target.dsn("service"), dims, model)
