"""Options that the commands of `memharbor migrate` share, and what they mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from memharbor.commands import Command

if TYPE_CHECKING:
    from memharbor.migrate.opening import EmbeddingSpec, SourceSpec
    from memharbor.migrate.runs import RunSettings
    from memharbor.target import Target

# As `memharbor.migrate.opening.KINDS`, which is not imported for the sake of `--help`; a test holds them equal.
KINDS = ["file", "platform", "mem0-pgvector", "supabase-vecs", "canonical", "sqlite", "openmemory", "dead-letters"]


def _add(command: Command, options: list[Any]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def run_argument(command: Command) -> Command:
    """Give a command the name of a run; the newest by default."""
    return click.argument("name", metavar="[RUN]", required=False)(command)


def source_options(command: Command) -> Command:
    """Give a command the options that name a source."""
    return _add(
        command,
        [
            click.option("--from", "kind", type=click.Choice(KINDS), required=True, help="What kind of source."),
            click.option(
                "--input", "paths", multiple=True, metavar="FILE", help="The file; more than one for openmemory."
            ),
            click.option("--collection", metavar="NAME", help="Collection or table.  [default: mem0, memories]"),
            click.option("--url", metavar="URL", help="Of a service, where it is not the usual one."),
            click.option("--vectors", metavar="FILE", help="openmemory: points that its vector store exported."),
            click.option(
                "--users-from",
                type=click.Choice(["id", "username", "email"]),
                default="id",
                show_default=True,
                help="sqlite: what becomes the user's id.",
            ),
        ],
    )


def choice_options(command: Command) -> Command:
    """Give a command the options that say which items travel and how."""
    return _add(
        command,
        [
            click.option("--users", metavar="ID,…", help="Only these users."),
            click.option("--from-date", metavar="TIME", help="Only what was created then or later."),
            click.option("--to-date", metavar="TIME", help="Only what was created before then."),
            click.option(
                "--remap-users", metavar="FILE", help="JSON object or CSV: the new id by the id in the source."
            ),
            click.option(
                "--on-conflict",
                type=click.Choice(["skip", "overwrite", "new-id"]),
                default="skip",
                show_default=True,
                help="What becomes of a memory whose id is taken by a different one.",
            ),
            click.option(
                "--keep-duplicates", is_flag=True, help="Let the same text of the same owner in more than once."
            ),
            click.option("--batch-size", type=click.IntRange(1, 50_000), default=1000, show_default=True),
            click.option(
                "--max-rate", type=click.FloatRange(min=0), default=0, help="Rows a second.  [default: no limit]"
            ),
            click.option(
                "--carry-vectors/--generate-embeddings",
                default=True,
                help="Take the embeddings of the source, or make all anew.  [default: take]",
            ),
        ],
    )


def embedding_options(command: Command) -> Command:
    """Give a command the options that name an embedding model."""
    return _add(
        command,
        [
            click.option("--model", metavar="NAME", help="Embeds what has no embedding; without it that stays so."),
            click.option("--dims", type=click.IntRange(min=1), help="Of its embeddings.  [default: the schema's]"),
            click.option("--embedding-url", metavar="URL", help="Of an OpenAI-compatible endpoint, up to /v1."),
            click.option("--local", is_flag=True, help="Embed on this machine, by fastembed or sentence-transformers."),
        ],
    )


def read_embedding(options: dict[str, Any], target: Target, *, required: bool = False) -> EmbeddingSpec | None:
    """
    Read which model is meant.

    Raises:
        UsageError: None is, and one is required.
    """
    from memharbor.errors import UsageError
    from memharbor.migrate.opening import OPENAI_URL, EmbeddingSpec, cache_folder

    if not options["model"]:
        if required:
            raise UsageError("no model is named", hint="pass `--model text-embedding-3-small`, or another")
        return None
    return EmbeddingSpec(
        options["model"],
        options["dims"] or target.settings.embedding_dims,
        options["embedding_url"] or OPENAI_URL,
        options["local"],
        str(cache_folder()),
    )


def read_source(options: dict[str, Any]) -> SourceSpec:
    """Read which source is meant."""
    from pathlib import Path

    from memharbor.migrate.opening import SourceSpec

    return SourceSpec(
        options["kind"],
        tuple(str(Path(path).absolute()) for path in options["paths"]),
        options["collection"],
        options["url"],
        options["vectors"],
        options["users_from"],
    )


def read_settings(options: dict[str, Any], target: Target) -> RunSettings:
    """
    Read what was asked for.

    Raises:
        UsageError: An option is wrong.
        SourceDataError: The file of `--remap-users` cannot be read.
    """
    from pathlib import Path

    from memharbor.migrate.runs import RunSettings, read_remap

    users = tuple(filter(None, (user.strip() for user in (options["users"] or "").split(","))))
    settings = RunSettings(
        read_source(options),
        users,
        options["from_date"],
        options["to_date"],
        read_remap(Path(options["remap_users"])) if options["remap_users"] else {},
        options["on_conflict"],
        "carry" if options["carry_vectors"] else "generate",
        read_embedding(options, target),
        options["batch_size"],
        options["max_rate"],
        options["keep_duplicates"],
    )
    settings.choice(target.settings.embedding_dims)  # refuses a date that is none, before anything is opened
    return settings
