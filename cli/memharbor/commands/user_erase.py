"""`memharbor user erase`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from memharbor.commands import common_options, confirm, dry_run_option, dsn_option, stack_option, yes_option
from memharbor.output import Output

if TYPE_CHECKING:
    from memharbor.backup.erase_user import Place


@click.command()
@click.argument("user_id", metavar="[ID]", required=False)
@click.option("--reason", metavar="TEXT", help="Why; kept in the record, so it must not hold the id.")
@click.option("--requested-by", metavar="NAME", help="Who asks; your login by default.")
@click.option(
    "--rewrite", is_flag=True, help="Write the tables anew, so that deleted bytes leave the files. Locks them."
)
@click.option("--replay", is_flag=True, help="Erase again whom a restore that was not ours has brought back.")
@click.option("--certificates", type=click.Path(path_type=Path, file_okay=False), help="Folder of the certificates.")
@dry_run_option
@yes_option
@dsn_option
@stack_option
@common_options
def erase(
    output: Output,
    user_id: str | None,
    reason: str | None,
    requested_by: str | None,
    rewrite: bool,
    replay: bool,
    certificates: Path | None,
    dry_run: bool,
    yes: bool,
    dsn: str | None,
    stack: str,
) -> None:
    """
    Erase a user for good: no restore brings them back.

    Deletes their memories, entities, relationships, categories, history and memberships, and what checkpoints and
    migrations copied of them. A record beside the backups sees to it that every later restore erases them again. Writes a signed
    certificate that names the user by a digest. Repeating it does no harm.

    \b
    Example:
      memharbor user erase alice --reason "request 4711"
    """
    from memharbor.errors import UsageError
    from memharbor.operations import erasure_place, migrations_folder

    if replay == bool(user_id) or (user_id and not reason):
        raise UsageError("give an ID with `--reason`, or `--replay` alone", hint="memharbor user erase --help")
    with erasure_place(stack, dsn, certificates) as place:
        if user_id and reason:
            runs = migrations_folder(stack, dsn)
            _erase(
                output, place, runs, user_id, dry_run=dry_run, yes=yes, reason=reason, by=requested_by, rewrite=rewrite
            )
        else:
            _replay(output, place, dry_run=dry_run)


def _erase(
    output: Output,
    place: Place,
    runs: Path,
    user_id: str,
    *,
    dry_run: bool,
    yes: bool,
    reason: str,
    by: str | None,
    rewrite: bool,
) -> None:
    from memharbor.backup.erase_user import erase as erase_for_good
    from memharbor.backup.erasure import count_rows, new_erasure, user_digest
    from memharbor.migrate.forgetting import forget_user

    counts = count_rows(place.connection, user_id)
    if dry_run:
        new_erasure(user_id, reason=reason, requested_by=by)
        said = ", ".join(f"{count:,} {table}" for table, count in counts.items()) or "no rows"
        cleared = forget_user(runs, user_id, dry_run=True)
        data = {"dry_run": True, "user_sha256": user_digest(user_id), "counts": counts, "migrations_cleared": cleared}
        said += f", files of {len(cleared)} migrations" if cleared else ""
        output.result(data, f"would erase user {user_digest(user_id)[:12]}: {said}")
        return
    question = f"Erase {sum(counts.values()):,} rows of user `{user_id}` for good, also from every later restore?"
    confirm(question, yes=yes)
    report = erase_for_good(place, user_id, output, reason=reason, requested_by=by, rewrite=rewrite)
    # Dead letters and staged rows of migrations are copies as well.
    cleared = forget_user(runs, user_id)
    text = report.text + (f"\nfiles of {len(cleared)} migrations cleared" if cleared else "")
    output.result({**report.as_data(), "migrations_cleared": cleared}, text)
    if place.stack is None:
        output.note("a restore by the provider brings the user back; then run `memharbor user erase --replay`")


def _replay(output: Output, place: Place, *, dry_run: bool) -> None:
    from memharbor.backup.erase_user import pending, replay

    done = pending(place) if dry_run else replay(place)
    doing = "would erase" if dry_run else "erased"
    text = f"{doing} {len(done)} users again" if done else "nobody who was erased is back"
    output.result({"dry_run": dry_run, "replayed": [record["id"] for record in done]}, text)
