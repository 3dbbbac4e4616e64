"""
The command line: parse, call, convert errors. No decision is taken here.

Commands are found by name and imported when they are used, so that `--help` stays fast: `COMMANDS` names each one with
the module that holds it and its short help (`tests/unit/test_contracts.py` holds it to the docstrings).
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from memharbor import __version__
from memharbor.errors import INTERRUPTED_EXIT_CODE, MemharborError, UsageError
from memharbor.names import DEFAULT_STACK, STACK_VARIABLE
from memharbor.output import Output

COMMANDS = {
    "backup": ("memharbor.commands.backup", "Create and list backups."),
    "bench": ("memharbor.commands.bench", "Measure two ways of the same work side by side."),
    "checkpoint": ("memharbor.commands.checkpoint", "Name a state of the memories, to roll back to."),
    "config": ("memharbor.commands.config", "Convert Mem0's configurations, and print one for a stack."),
    "doctor": ("memharbor.commands.doctor", "Find what is wrong, before anything exists as well as after."),
    "drill": ("memharbor.commands.drill", "Prove a backup by restoring it."),
    "migrate": ("memharbor.commands.migrate", "Bring memories in from elsewhere, and take them out again."),
    "restore": ("memharbor.commands.restore", "Restore the stack's database from its backups."),
    "rollback": (
        "memharbor.commands.rollback",
        "Roll back to a checkpoint, exactly: to the row and to the bits of every vector.",
    ),
    "schema": ("memharbor.commands.schema", "Render, plan, apply and verify the schema."),
    "settings": ("memharbor.commands.settings", "Show every setting with its origin."),
    "stack": ("memharbor.commands.stack", "Initialize a stack and show how to reach it."),
    "status": ("memharbor.commands.status", "Show what runs, what is stored and how well it is backed up."),
    "user": ("memharbor.commands.user", "Back up, restore, show and erase one user."),
    "validate": ("memharbor.commands.validate", "Check a live stack with real Mem0, and clean up."),
}

Command = TypeVar("Command", bound=Callable[..., Any])


class LazyGroup(click.Group):
    """Hold the commands of `COMMANDS` without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the one command that is asked for."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from `COMMANDS`."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in sorted(COMMANDS)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="memharbor")
def cli() -> None:
    """
    Operate a Memharbor stack: a self-hosted PostgreSQL home for Mem0 memories.

    \b
    Exit codes: 0 ok, 2 usage, 3 config, 4 connect, 5 database, 6 external tool, 9 state refused,
    10 verification differs, 11 changes pending. All of them: docs/reference/exit-codes.md
    """


def common_options(command: Command) -> Command:
    """
    Give a command `--output` and `--verbose`, and an `Output` as its first argument.

    The command is called as `command(output, **options)`.
    """

    @click.option(
        "--output", "output_format", type=click.Choice(["text", "json"]), default="text", help="Form of stdout."
    )
    @click.option("--verbose", is_flag=True, help="Say more on stderr.")
    @functools.wraps(command)
    def wrapped(*args: Any, output_format: Any, verbose: bool, **options: Any) -> Any:
        return command(Output(output_format, verbose=verbose), *args, **options)

    return wrapped  # type: ignore[return-value]  # functools.wraps keeps the command's own signature


def stack_option(command: Command) -> Command:
    """Give a command `--stack`: the option, then MEMHARBOR_STACK, then `dev`."""
    return click.option(
        "--stack",
        envvar=STACK_VARIABLE,
        default=DEFAULT_STACK,
        show_default=True,
        show_envvar=True,
        help="Name of the stack.",
    )(command)


def dsn_option(command: Command) -> Command:
    """Give a command `--dsn` (without a password) and MEMHARBOR_DSN (with or without)."""
    return click.option(
        "--dsn",
        callback=_refuse_secret,
        metavar="URI",
        help="A database that no stack of yours made, without its password. [env var: MEMHARBOR_DSN, with password]",
    )(command)


def _refuse_secret(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return os.environ.get("MEMHARBOR_DSN") or None
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    from memharbor.database import redact_dsn

    try:
        parts = conninfo_to_dict(value)
    except psycopg.Error:
        # The parser quotes what it chokes on, which may be a piece of a password: neither text nor cause leaves.
        raise UsageError(
            "`--dsn` cannot be read as a libpq connection string",
            hint="give a URI like `postgresql://user@host:5432/database`, with special characters percent-encoded",
        ) from None
    if parts.get("password") or parts.get("sslpassword"):
        raise UsageError(
            f"`--dsn {redact_dsn(value)}` holds a password, and arguments can be read by every process",
            hint=["put the whole URI into MEMHARBOR_DSN", "or the password into PGPASSWORD or a PGPASSFILE"],
        )
    return value


def yes_option(command: Command) -> Command:
    """Give a command `--yes`."""
    return click.option("--yes", is_flag=True, help="Do not ask.")(command)


def dry_run_option(command: Command) -> Command:
    """Give a command `--dry-run`."""
    return click.option("--dry-run", is_flag=True, help="Say what would be done and change nothing.")(command)


def confirm(question: str, *, yes: bool) -> None:
    """
    Ask before something that cannot be taken back.

    Raises:
        UsageError: There is no terminal to ask on and `--yes` is not given.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{question[0].lower()}{question[1:]} needs a confirmation", hint="pass `--yes`")
    click.confirm(question, abort=True, err=True)


def main(arguments: list[str] | None = None) -> None:
    """
    Run the command line and end the process with a documented exit code.

    Args:
        arguments: The words after `memharbor`; those of the process by default.
    """
    try:
        code = cli(arguments, standalone_mode=False)
    except click.exceptions.Exit as exc:
        sys.exit(exc.exit_code)
    except click.ClickException as exc:
        sys.stderr.write(f"error: {exc.format_message()}\n")
        if isinstance(exc, click.UsageError) and exc.ctx is not None:
            sys.stderr.write(f"hint: run `{exc.ctx.command_path} --help`\n")
        sys.exit(UsageError.exit_code)
    except (click.Abort, KeyboardInterrupt) as exc:
        # Click turns Ctrl-C into Abort too; a question that was answered with no, or by nobody, has no such origin.
        if isinstance(exc, KeyboardInterrupt) or isinstance(exc.__cause__ or exc.__context__, KeyboardInterrupt):
            sys.stderr.write("interrupted\n")
            sys.exit(INTERRUPTED_EXIT_CODE)
        sys.stderr.write("aborted\n")
        sys.exit(MemharborError.exit_code)
    except MemharborError as exc:
        sys.stderr.write(f"error: {exc.message}\n" + "".join(f"hint: {hint}\n" for hint in exc.hints))
        sys.exit(exc.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


__all__ = [
    "COMMANDS",
    "cli",
    "common_options",
    "confirm",
    "dry_run_option",
    "dsn_option",
    "main",
    "stack_option",
    "yes_option",
]
