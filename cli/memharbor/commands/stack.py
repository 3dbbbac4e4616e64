"""`memharbor stack`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from memharbor.commands import common_options, dry_run_option, stack_option, yes_option
from memharbor.names import DSN_ROLES
from memharbor.output import Output


@click.group()
def stack() -> None:
    """Initialize a stack and show how to reach it."""


@stack.command()
@click.option(
    "--escrow",
    "escrow_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Key escrow file of a lost stack, to bring it up again and restore its backups.",
)
@dry_run_option
@stack_option
@common_options
def init(output: Output, stack: str, escrow_file: Path | None, dry_run: bool) -> None:
    """
    Create a stack's config with its secrets and certificates; again, it changes nothing.

    Run it again, and then `pulumi up`, to renew certificates: those that end within 60 days are made anew.

    `MEMHARBOR_*` variables become the config of a new stack: also those that `stack env` of another one has set. The
    config of a stack that exists is kept; where a variable differs, the `pulumi config set` command is named.

    The secrets are also written into a key escrow file, which belongs elsewhere: with it and the backup store alone
    the stack comes back on another machine.

    \b
    Examples:
      memharbor stack init --stack dev
      memharbor stack init --stack dev --escrow key-escrow.json
    """
    from memharbor.settings import settings_from_environment
    from memharbor.stack.init import init_stack

    environment = settings_from_environment(os.environ)
    report = init_stack(stack, environment, escrow_file=escrow_file, dry_run=dry_run)
    for note in report.notes:
        output.note(note)
    output.result(report.as_data(), report.text)


@stack.command()
@stack_option
@common_options
def show(output: Output, stack: str) -> None:
    """
    Show a stack's nodes, endpoints and images; no secret.

    \b
    Example:
      memharbor stack show
    """
    from memharbor.stack import read_outputs

    data = read_outputs(stack).model_dump(mode="json", exclude={"passwords", "ca_certificate"})
    output.result(data, "\n".join(f"{key}: {value}" for key, value in data.items()))


@stack.command()
@stack_option
@common_options
def inventory(output: Output, stack: str) -> None:
    """
    Print the Ansible inventory; no secret.

    \b
    Example:
      memharbor stack inventory
    """
    import json

    from memharbor.stack import build_inventory
    from memharbor.target import find_target

    target = find_target(stack, os.environ.get("MEMHARBOR_DSN"))
    data = build_inventory(target.settings, stack="" if target.outputs is None else target.outputs.stack)
    output.result(data, json.dumps(data, indent=2))


@stack.command()
@click.argument("role", type=click.Choice(DSN_ROLES))
@click.option("--direct", is_flag=True, help="Straight to PostgreSQL instead of through the pool.")
@click.option("--read-only", is_flag=True, help="The endpoint for reading.")
@click.option("--session", is_flag=True, help="The session pool, for long work.")
@stack_option
@common_options
def dsn(output: Output, role: str, direct: bool, read_only: bool, session: bool, stack: str) -> None:
    """
    Print the libpq URI of a role, with its password.

    `admin` is PostgreSQL's superuser and always direct. For `psql` use `memharbor stack env`: what stands in an argument
    can be read by every user of the machine.

    \b
    Example:
      export DATABASE_URL="$(memharbor stack dsn app)"
    """
    from memharbor.target import find_target

    uri = find_target(stack, os.environ.get("MEMHARBOR_DSN")).dsn(
        role, direct=direct, read_only=read_only, session=session
    )
    output.result({"dsn": uri}, uri)


@stack.command()
@click.option("--role", type=click.Choice(DSN_ROLES), default="app", show_default=True, help="Whom PG* is for.")
@stack_option
@common_options
def env(output: Output, role: str, stack: str) -> None:
    """
    Print `export` lines with which programs connect, passwords included.

    MEMHARBOR_EMBEDDING_DIMS is among them, for the programs: a new stack made in the same shell would get these dims too.

    \b
    Examples:
      eval "$(memharbor stack env)"
      eval "$(memharbor stack env --role admin)" && psql
    """
    import shlex

    from memharbor.stack import environment, read_outputs

    variables = environment(read_outputs(stack), role)
    output.result(variables, "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()))


@stack.command()
@click.argument("name")
@dry_run_option
@yes_option
@common_options
def destroy(output: Output, name: str, dry_run: bool, yes: bool) -> None:
    """
    Delete a stack with its data and its secrets; it must be named.

    \b
    Example:
      memharbor stack destroy dev --dry-run
    """
    from memharbor.commands import confirm
    from memharbor.stack.init import destroy_stack

    if not dry_run:
        confirm(f"Delete stack {name} with all its memories and backups?", yes=yes)
    report = destroy_stack(name, output, dry_run=dry_run)
    output.result(report, f"{'would delete' if dry_run else 'deleted'}: {', '.join(report['deleted']) or 'nothing'}")
