"""`memharbor migrate embed`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from memharbor.commands import common_options, dry_run_option, dsn_option, stack_option
from memharbor.commands.migrate_options import embedding_options, require_embedding
from memharbor.output import Output

if TYPE_CHECKING:
    from memharbor.migrate.reembed import EmbedReport

# As those of `memharbor.migrate.record.State`, which is not imported for the sake of `--help`; a test holds them equal.
STATES = ["active", "paused", "archived", "deleted"]


@click.command()
@embedding_options
@click.option(
    "--filter",
    "only",
    type=click.Choice(["missing", "all"]),
    default="missing",
    show_default=True,
    help="Rows without an embedding, or the others too.",
)
@click.option("--user", "user_id", metavar="ID", help="Only this user's.")
@click.option("--agent", "agent_id", metavar="ID", help="Only this agent's.")
@click.option("--updated-since", metavar="TIME", help="Only memories that were last changed then or later.")
@click.option("--updated-before", metavar="TIME", help="Only memories that were last changed before then.")
@click.option(
    "--state", "states", type=click.Choice(STATES), multiple=True, help="Only memories in it; may be repeated."
)
@click.option(
    "--ids",
    type=click.File("r", encoding="utf-8-sig", errors="replace"),
    metavar="FILE",
    help="Only rows with these ids, one a line; `-` for stdin.",
)
@dry_run_option
@dsn_option
@stack_option
@common_options
def embed(output: Output, dry_run: bool, dsn: str | None, stack: str, **options: Any) -> None:
    """
    Embed memories that have no embedding, or others anew; searches never meet half of it.

    What is given holds all at once. Another model than the one of record is taken only for everything.

    \b
    Examples:
      memharbor migrate embed --model text-embedding-3-small
      memharbor migrate embed --filter all --updated-since 2026-11-01 --model text-embedding-3-small --dry-run
      memharbor migrate embed --filter all --model text-embedding-3-large --embedding-rate 20
    """
    from memharbor.migrate.embedding.rows import choose_rows
    from memharbor.migrate.rehearsal import embed_database
    from memharbor.target import find_target

    names = ("only", "user_id", "agent_id", "updated_since", "updated_before", "states", "ids")
    choice = choose_rows(**{name: options[name] for name in names})
    target = find_target(stack, dsn)
    report = embed_database(target, require_embedding(options, target), output, choice=choice, dry_run=dry_run)
    output.result({"dry_run": dry_run, **report.as_data()}, _text(report, dry_run=dry_run))


def _text(report: EmbedReport, *, dry_run: bool) -> str:
    data = report.as_data()
    counts = ", ".join(f"{count:,} {table}" for table, count in data["tables"].items())
    lines = [f"{'would embed' if dry_run else 'embedded'} {counts}; refused {data['refused']:,}"]
    lines += [f"refused: {row['table']} {row['id']}: {row['detail']}" for row in data["rows"]]
    if data["refused"] > len(data["rows"]):
        lines.append(f"and {data['refused'] - len(data['rows']):,} more")
    if data["cleared"]:
        lines.append(f"{data['cleared']:,} of the refused keep no embedding: another model made theirs")
    if data["unknown_ids"]:
        lines.append(f"{data['unknown_ids']:,} of the ids are those of no row")
    if data.get("usd") is not None:
        lines.append(f"about {data['tokens']:,} tokens, {data['usd']:.2f} USD; what was embedded before costs nothing")
    return "\n".join(lines)
