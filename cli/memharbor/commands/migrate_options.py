"""Options that the commands of `memharbor migrate` share, and what they mean."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from memharbor.commands import Command

if TYPE_CHECKING:
    from memharbor.migrate.opening import EmbeddingSpec, Pace, SourceSpec
    from memharbor.migrate.runs import RunSettings
    from memharbor.target import Target

# As `memharbor.migrate.opening.KINDS`, which is not imported for the sake of `--help`; a test holds them equal.
KINDS = ["file", "platform", "mem0-pgvector", "supabase-vecs", "canonical", "sqlite", "openmemory", "dead-letters"]

# Those in which a table `users` may say what users are called.
_WITH_USERS = ("sqlite", "canonical")
_SOURCE_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def _add(command: Command, options: list[Any]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def run_argument(command: Command) -> Command:
    """Give a command the name of a run; the newest by default."""
    return click.argument("name", metavar="[RUN]", required=False)(command)


def checkpoint_option(command: Command) -> Command:
    """Give a command the choice to take no checkpoint before it writes."""
    option = click.option("--checkpoint/--no-checkpoint", default=True, help="Take a checkpoint first.  [default: yes]")
    return option(command)


def source_options(command: Command) -> Command:
    """Give a command the options that name a source."""
    return _add(
        command,
        [
            click.option("--from", "kind", type=click.Choice(KINDS), required=True, help="What kind of source."),
            click.option(
                "--input", "paths", multiple=True, metavar="FILE", help="The file; more than one for openmemory."
            ),
            click.option(
                "--collection",
                metavar="NAME",
                help="Collection or table; openmemory: with its embeddings.  [default: mem0, memories]",
            ),
            click.option("--url", metavar="URL", help="Of a service, where it is not the usual one."),
            click.option("--vectors", metavar="FILE", help="openmemory: points that Qdrant exported."),
            click.option(
                "--users-from",
                type=click.Choice(["id", "username", "email"]),
                default="id",
                show_default=True,
                help="sqlite, canonical: what becomes the user's id: its number, or a column of table `users`.",
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
                "--carry-vectors/--generate-embeddings",
                default=True,
                help="Take the embeddings of the source, or make all anew, with `--model`.  [default: take]",
            ),
            click.option(
                "--source-name",
                metavar="NAME",
                help="Part of the ids that are made, where a source's are no UUIDs.  [default: the kind of source]",
            ),
            *_load_options(),
        ],
    )


def _load_options() -> list[Any]:
    return [
        click.option(
            "--on-conflict",
            type=click.Choice(["skip", "overwrite", "new-id"]),
            default="skip",
            show_default=True,
            help="What becomes of a memory whose id is taken by a different one.",
        ),
        click.option("--keep-duplicates", is_flag=True, help="Let the same text of the same owner in more than once."),
        click.option("--batch-size", type=click.IntRange(1, 50_000), default=1000, show_default=True),
        click.option("--max-rate", type=click.FloatRange(min=0), default=0, help="Rows a second.  [default: no limit]"),
        click.option(
            "--text-index",
            type=click.Choice(["auto", "keep", "after"]),
            default="auto",
            show_default=True,
            help="The index of keyword search: keep it, or build it after the load; auto: after for a large import.",
        ),
    ]


def embedding_options(command: Command) -> Command:
    """Give a command the options that name an embedding model."""
    return _add(
        command,
        [
            click.option("--model", metavar="NAME", help="Embeds what has no embedding; without it that stays so."),
            click.option("--dims", type=click.IntRange(min=1), help="Of its embeddings.  [default: the schema's]"),
            click.option("--embedding-url", metavar="URL", help="Of an OpenAI-compatible endpoint, up to /v1."),
            click.option("--local", is_flag=True, help="Embed on this machine, by fastembed or sentence-transformers."),
            *_pace_options(),
        ],
    )


def pace_options(command: Command) -> Command:
    """Give a command the options that say how hard an embedding endpoint is asked."""
    return _add(command, _pace_options())


def _pace_options() -> list[Any]:
    return [
        click.option(
            "--embedding-rate",
            type=click.FloatRange(min=0),
            help="Requests to the endpoint a second at most, retries included; 0 for no limit.  [default: no limit]",
        ),
        click.option(
            "--embedding-concurrency",
            type=click.IntRange(1, 100),
            help="Requests to the endpoint at once.  [default: 4]",
        ),
    ]


def read_pace(options: dict[str, Any]) -> Pace:
    """Read how hard an embedding endpoint is asked."""
    from memharbor.migrate.opening import Pace

    return Pace(options["embedding_rate"], options["embedding_concurrency"])


def require_embedding(options: dict[str, Any], target: Target) -> EmbeddingSpec:
    """
    Read which model is meant.

    Raises:
        UsageError: None is.
    """
    from memharbor.errors import UsageError

    spec = read_embedding(options, target)
    if spec is None:
        raise UsageError("no model is named", hint="pass `--model text-embedding-3-small`, or another")
    return spec


def read_embedding(options: dict[str, Any], target: Target) -> EmbeddingSpec | None:
    """Read which model is meant, if any."""
    from memharbor.migrate.opening import OPENAI_URL, EmbeddingSpec, cache_folder

    if not options["model"]:
        return None
    spec = EmbeddingSpec(
        options["model"],
        options["dims"] or target.settings.embedding_dims,
        options["embedding_url"] or OPENAI_URL,
        options["local"],
        str(cache_folder()),
    )
    return spec.at_pace(read_pace(options))


def read_source(options: dict[str, Any]) -> SourceSpec:
    """
    Read which source is meant.

    Raises:
        UsageError: The source has no table that names users.
    """
    from pathlib import Path

    from memharbor.errors import UsageError
    from memharbor.migrate.opening import SourceSpec

    if options["users_from"] != "id" and options["kind"] not in _WITH_USERS:
        hint = "rename users with `--remap-users FILE`"
        raise UsageError(f"`--from {options['kind']}` has no table `users` to name them from", hint=hint)
    return SourceSpec(
        options["kind"],
        tuple(str(Path(path).absolute()) for path in options["paths"]),
        options["collection"],
        options["url"],
        str(Path(options["vectors"]).absolute()) if options["vectors"] else None,
        options["users_from"],
    )


def read_users(text: str | None) -> tuple[str, ...]:
    """
    Read which users are meant; none for all.

    Raises:
        UsageError: The option is there, and names nobody.
    """
    from memharbor.errors import UsageError

    users = tuple(filter(None, (user.strip() for user in (text or "").split(","))))
    if text is not None and not users:
        raise UsageError("`--users` names nobody", hint="leave it out for everybody")
    return users


def read_settings(options: dict[str, Any], target: Target) -> RunSettings:
    """
    Read what was asked for.

    Raises:
        UsageError: An option is wrong.
        SourceDataError: The file of `--remap-users` cannot be read.
    """
    from pathlib import Path

    from memharbor.errors import UsageError
    from memharbor.migrate.remapping import read_remap
    from memharbor.migrate.runs import RunSettings

    source_name = options["source_name"]
    if source_name is not None and not _SOURCE_NAME.fullmatch(source_name):
        raise UsageError(
            f"`--source-name` is no name: {source_name!r}", hint="letters, digits, `.`, `_` and `-`, up to 64"
        )
    if not options["carry_vectors"] and not options["model"]:
        raise UsageError(
            "`--generate-embeddings` leaves out the embeddings of the source, and no model is named to make others",
            hint="pass `--model text-embedding-3-small`, or another",
        )
    settings = RunSettings(
        read_source(options),
        read_users(options["users"]),
        options["from_date"],
        options["to_date"],
        read_remap(Path(options["remap_users"])) if options["remap_users"] else {},
        options["on_conflict"],
        "carry" if options["carry_vectors"] else "generate",
        read_embedding(options, target),
        options["batch_size"],
        options["max_rate"],
        options["keep_duplicates"],
        source_name,
        options["text_index"],
    )
    settings.choice(target.settings.embedding_dims)  # refuses a date that is none, before anything is opened
    return settings
