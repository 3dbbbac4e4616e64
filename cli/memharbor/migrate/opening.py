"""
Open a source or an embedder by what a person typed. Secrets come from the environment, never from the command line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from memharbor.errors import ConfigError, UsageError
from memharbor.migrate.embedding.model import Embedder
from memharbor.migrate.record import Source
from memharbor.output import Output

if TYPE_CHECKING:
    from memharbor.migrate.http import HttpClient
    from memharbor.migrate.sources.openmemory_vectors import VectorStore

# Where the address of a source's database stands, with its password.
DSN_VARIABLE = "MEMHARBOR_SOURCE_DSN"
PLATFORM_KEY_VARIABLE = "MEM0_API_KEY"
EMBEDDING_KEY_VARIABLE = "OPENAI_API_KEY"
PLATFORM_URL = "https://api.mem0.ai"
OPENAI_URL = "https://api.openai.com/v1"

KINDS = ("file", "platform", "mem0-pgvector", "supabase-vecs", "canonical", "sqlite", "openmemory", "dead-letters")
_FILES = ("file", "sqlite", "openmemory", "dead-letters")


@dataclass(frozen=True)
class SourceSpec:
    """
    Which source is meant, without its secrets.

    Args:
        kind: One of `KINDS`.
        paths: Files, for sources that are files.
        collection: Collection or table, for sources that are databases; for OpenMemory that of its embeddings.
        url: Of a service, where it is not the usual one.
        vectors: An export of the points of a vector store, for OpenMemory.
        users_from: Column that names a user, for ChatSG's tables.
    """

    kind: str
    paths: tuple[str, ...] = ()
    collection: str | None = None
    url: str | None = None
    vectors: str | None = None
    users_from: str = "id"


@dataclass(frozen=True)
class Pace:
    """
    How hard an embedding endpoint is asked. It decides nothing about a run's result: any may go on with any other.

    Args:
        max_rate: Requests a second at most, retries included; 0 for no limit, `None` for what it was.
        concurrency: Requests at once; `None` for what it was.
    """

    max_rate: float | None = None
    concurrency: int | None = None


@dataclass(frozen=True)
class EmbeddingSpec:
    """
    Which model makes embeddings.

    Args:
        model: Its name; `memharbor-hash` is built in, any other is asked for at `url`, or made here with `is_local`.
        dims: Of its embeddings.
        url: Of an OpenAI-compatible endpoint, up to `/v1`.
        is_local: Whether a library of this machine makes them.
        cache: Folder in which what was made is kept.
        max_rate: Requests a second to the endpoint at most; 0 for no limit.
        concurrency: Requests to the endpoint at once.
    """

    model: str
    dims: int
    url: str = OPENAI_URL
    is_local: bool = False
    cache: str = ""
    max_rate: float = 0
    concurrency: int = 4

    def at_pace(self, pace: Pace) -> EmbeddingSpec:
        """
        Make the same model, asked at another pace.

        >>> EmbeddingSpec("m", 8, concurrency=2).at_pace(Pace(max_rate=5)).concurrency
        2
        """
        return replace(
            self,
            max_rate=self.max_rate if pace.max_rate is None else pace.max_rate,
            concurrency=self.concurrency if pace.concurrency is None else pace.concurrency,
        )


def _environment(name: str, what: str, environ: Mapping[str, str]) -> str:
    if not environ.get(name):
        raise ConfigError(f"{what} is not given", hint=f"export {name}=…, so that it is on no command line")
    return environ[name]


def cache_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Name the folder of embeddings that were paid for, shared by all stacks: it holds digests of texts, and no text."""
    environ = os.environ if environ is None else environ
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "memharbor" / "embeddings"


@contextmanager
def open_source(
    spec: SourceSpec, *, users: Sequence[str] = (), max_rate: float = 0, environ: Mapping[str, str] | None = None
) -> Iterator[Source]:
    """
    Open a source.

    Args:
        spec: Which one.
        users: Only these, for a service that can be asked so; all for none.
        max_rate: Requests a second at most, for a service; 0 for no limit.
        environ: Where its secrets are; the process's own variables by default.

    Raises:
        UsageError: A file is not named, or one is that the kind has no use for.
        ConfigError: A secret is not given.
    """
    environ = os.environ if environ is None else environ
    if (spec.kind in _FILES) != bool(spec.paths):
        problem = "needs a file: `--input PATH`" if spec.kind in _FILES else "reads no file"
        raise UsageError(f"`--from {spec.kind}` {problem}")
    paths = [Path(path) for path in spec.paths]
    if len(paths) > 1 and spec.kind != "openmemory":
        raise UsageError(f"`--from {spec.kind}` reads one file at a time")
    if spec.kind == "platform":
        from memharbor.migrate.sources.platform import PlatformSource

        with open_platform(spec.url, max_rate=max_rate, environ=environ) as http:
            yield PlatformSource(http, users=users or None)
    elif spec.kind == "openmemory":
        from memharbor.migrate.sources.openmemory import OpenMemorySource

        yield OpenMemorySource(paths, _vector_store(spec, environ))
    elif spec.kind in _FILES:
        yield _open_file(spec, paths)
    else:
        dsn = _environment(DSN_VARIABLE, "the address of the source's database", environ)
        yield _open_database(spec, dsn)


@contextmanager
def open_platform(
    url: str | None = None, *, max_rate: float = 0, environ: Mapping[str, str] | None = None
) -> Iterator[HttpClient]:
    """
    Open the Mem0 Platform.

    Args:
        url: Where it is not the usual one.
        max_rate: Requests a second at most; 0 for no limit.
        environ: Where its key is; the process's own variables by default.

    Raises:
        ConfigError: The key is not given.
    """
    from memharbor.migrate.http import HttpClient
    from memharbor.migrate.key import find_key

    environ = os.environ if environ is None else environ
    key = find_key(PLATFORM_KEY_VARIABLE, environ)
    if key is None:
        _environment(PLATFORM_KEY_VARIABLE, "the key of the Mem0 Platform", environ)
    rate = max_rate or None
    with HttpClient(url or PLATFORM_URL, key=key, key_variable=PLATFORM_KEY_VARIABLE, max_rate=rate) as http:
        yield http


def _vector_store(spec: SourceSpec, environ: Mapping[str, str]) -> VectorStore | None:
    """Say where the embeddings of OpenMemory are."""
    if spec.vectors and spec.collection:
        raise UsageError("`--vectors` and `--collection` both say where the embeddings are", hint="pass one of them")
    if spec.collection:
        from memharbor.migrate.sources.openmemory_pgvector import CollectionTable

        dsn = _environment(DSN_VARIABLE, "the address of the database that has the embeddings", environ)
        return CollectionTable(dsn, spec.collection)
    if spec.vectors:
        from memharbor.migrate.sources.qdrant_points import PointsExport

        return PointsExport(Path(spec.vectors))
    return None


def say_notes(source: Source, output: Output) -> None:
    """Say what a source noticed when it described itself, and a person should read; few have `notes`."""
    notes: Sequence[str] = getattr(source, "notes", ())
    for note in notes:
        output.note(f"note: {note}")


def _open_file(spec: SourceSpec, paths: list[Path]) -> Source:
    if spec.kind == "sqlite":
        from memharbor.migrate.sources.sqlite import SqliteSource

        return SqliteSource(paths[0], users_from=spec.users_from)  # type: ignore[arg-type]
    if spec.kind == "dead-letters":
        from memharbor.migrate.sources.dead_letters import DeadLetterSource

        return DeadLetterSource(paths[0])
    from memharbor.migrate.sources.files import FileSource

    return FileSource(paths[0])


def _open_database(spec: SourceSpec, dsn: str) -> Source:
    from memharbor.migrate.sources import mem0_pgvector, supabase

    if spec.kind == "mem0-pgvector":
        return mem0_pgvector.Mem0PgvectorSource(dsn, spec.collection or "mem0")
    if spec.kind == "supabase-vecs":
        return supabase.VecsSource(dsn, spec.collection or "mem0")
    return supabase.CanonicalTableSource(dsn, spec.collection or "memories", users_from=spec.users_from)  # type: ignore[arg-type]


@contextmanager
def open_embedder(spec: EmbeddingSpec, *, environ: Mapping[str, str] | None = None) -> Iterator[Embedder]:
    """
    Open what makes embeddings.

    Raises:
        ConfigError: A library, a key or the address is missing.
    """
    from memharbor.migrate.embedding.cache import EmbeddingCache
    from memharbor.migrate.embedding.endpoint import EndpointEmbedder
    from memharbor.migrate.embedding.local import HASH_MODEL, LocalEmbedder
    from memharbor.migrate.key import find_key

    environ = os.environ if environ is None else environ
    with EmbeddingCache(Path(spec.cache), spec.model, spec.dims) as cache:
        if spec.is_local or spec.model == HASH_MODEL:
            yield LocalEmbedder(spec.model, spec.dims, cache=cache)
            return
        key = find_key(EMBEDDING_KEY_VARIABLE, environ)
        if key is None and spec.url == OPENAI_URL:
            raise ConfigError(
                "the key of the embedding endpoint is not given",
                hint=f"export {EMBEDDING_KEY_VARIABLE}=…, or {EMBEDDING_KEY_VARIABLE}_FILE=…: it is on no command line",
            )
        with EndpointEmbedder(
            spec.url,
            spec.model,
            spec.dims,
            key,
            cache=cache,
            concurrency=spec.concurrency,
            max_rate=spec.max_rate or None,
        ) as embedder:
            yield embedder
