"""`memharbor user`."""

from __future__ import annotations

from typing import Any

import click

from memharbor.commands import common_options, dry_run_option, dsn_option, stack_option, yes_option
from memharbor.commands.backup_logical import destination_option, identity_option, key_options
from memharbor.commands.user_erase import erase
from memharbor.output import Output


@click.group()
def user() -> None:
    """Back up, restore, show and erase one user."""


@user.command()
@click.argument("user_id", metavar="ID")
@dsn_option
@stack_option
@common_options
def show(output: Output, user_id: str, dsn: str | None, stack: str) -> None:
    """
    Show what there is of a user: rows by table, bytes, times, an index of their own, an erasure.

    \b
    Example:
      memharbor user show customer-123
    """
    from contextlib import closing

    from memharbor.backup.logical import snapshot
    from memharbor.backup.user import show_user
    from memharbor.output import size_text
    from memharbor.target import find_target

    target = find_target(stack, dsn)
    with closing(target.connect(autocommit=True)) as connection, snapshot(connection) as rows:
        summary = show_user(rows, user_id)
    lines = [f"{table.replace('_', ' ')}: {count:,}" for table, count in summary.rows.items()]
    lines.append(f"bytes: {size_text(summary.size_bytes)}")
    lines += [f"{state} memories: {count:,}" for state, count in summary.states.items()]
    for name in ("first_memory_at", "last_memory_at", "last_change_at", "vector_index", "erased_at"):
        lines.append(f"{name.replace('_', ' ')}: {getattr(summary, name) or '-'}")
    output.result(summary.as_data(), "\n".join(lines))


@user.command()
@click.argument("user_id", metavar="ID")
@click.option("--since", metavar="TIME|last", help="Only what changed since the backup of this user taken then.")
@destination_option
@key_options
@dry_run_option
@dsn_option
@stack_option
@common_options
def backup(output: Output, user_id: str, dsn: str | None, stack: str, dry_run: bool, **options: Any) -> None:
    """
    Take a logical backup of one user: `backup create --type logical --user ID`.

    \b
    Example:
      memharbor user backup customer-123 --destination backups
    """
    from memharbor.commands.backup_logical import create_logical

    create_logical(output, stack, dry_run=dry_run, dsn=dsn, user_id=user_id, **options)


@user.command()
@click.argument("source", metavar="ID|FILE")
@click.option("--at", metavar="TIME", help="ID as they were at this moment of the archive: ISO 8601 with an offset.")
@click.option("--user", "user_id", metavar="ID", help="Which user of FILE, where it holds several.")
@click.option("--into", default="live", show_default=True, metavar="live|NEW_ID|file", help="Where the rows go.")
@click.option(
    "--on-conflict", type=click.Choice(["skip", "overwrite", "new-id"]), help="For rows that are there and differ."
)
@destination_option
@identity_option
@dry_run_option
@yes_option
@dsn_option
@stack_option
@common_options
def restore(output: Output, source: str, **options: Any) -> None:
    """
    Restore one user, from a logical backup or from any moment of the archive.

    Nobody else's rows are touched. `--into NEW_ID` brings the rows in as another user's, `--into file` writes them to a
    logical backup. Rows that are there and differ are kept (`skip`, the default), replaced, or joined by those of the
    backup under new ids, which is the default for NEW_ID.

    \b
    Examples:
      memharbor user restore customer-123 --at 2026-10-27T12:00:00Z --dry-run
      memharbor user restore backups/memharbor-memharbor-20261027T120000000000Z --on-conflict overwrite
    """
    from memharbor.commands.user_restore import restore_moment, restore_place
    from memharbor.errors import UsageError

    if options["at"]:
        if options["user_id"]:
            raise UsageError("`--user` belongs to a FILE; with `--at` the argument is the user's id")
        restore_moment(output, source, options)
    else:
        restore_place(output, source, options)


user.add_command(erase)
