"""
Runs of migrations: what was asked for, kept in the work folder, and opened again to go on.

No secret is kept: a database's address and keys come from the environment each time.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from memharbor.database import Connection, transaction, translated_errors
from memharbor.errors import StateRefusedError, UsageError, VerificationError
from memharbor.migrate.load import Loader, OnConflict
from memharbor.migrate.opening import EmbeddingSpec, Pace, SourceSpec, open_embedder, open_source, say_notes
from memharbor.migrate.pipeline import Pipeline, Plan, Report, Step, refuse_changed_source, settings_digest
from memharbor.migrate.record import Source, SourceInfo
from memharbor.migrate.recorded_model import refuse_other_model
from memharbor.migrate.run_folders import VERIFIED, refuse_cleared
from memharbor.migrate.text_index import TextIndex, build_text_index, drop_text_index, is_built_after
from memharbor.migrate.transform import Choice, parse_bound
from memharbor.migrate.workfolder import WorkFolder
from memharbor.names import ROLES
from memharbor.output import Output
from memharbor.target import Target

Vectors = Literal["carry", "generate"]
# There from when the index of keyword search was dropped on.
TEXT_INDEX = "text-index.json"
# Of a source that tells its size and not its items: an embedding of 1,536 dimensions in base64.
_ITEM_BYTES = 8192
# What the last comparison of a run with the database found; absent where it was not finished.


@dataclass(frozen=True)
class RunSettings:
    """
    What decides about a run's result.

    Args:
        source: Where items come from.
        users: Only these.
        from_date: Only what was created then or later.
        to_date: Only what was created before then.
        remap_users: New name by name in the source.
        on_conflict: What becomes of a row whose id is taken by a different one.
        vectors: Whether embeddings of the source are carried, or all are made anew.
        embedding: What makes those that are missing; `None` leaves them out.
        batch_size: Items a segment.
        max_rate: Items a second at most; 0 for no limit.
        keep_duplicates: Whether the same text of the same owner may come in under several ids.
        source_name: Name of the source that made ids are of; what it calls itself by default.
        text_index: Whether the index of keyword search is kept, or built after the load; `auto` for large imports.
    """

    source: SourceSpec
    users: tuple[str, ...] = ()
    from_date: str | None = None
    to_date: str | None = None
    remap_users: Mapping[str, str] = field(default_factory=dict)
    on_conflict: OnConflict = "skip"
    vectors: Vectors = "carry"
    embedding: EmbeddingSpec | None = None
    batch_size: int = 1000
    max_rate: float = 0
    keep_duplicates: bool = False
    source_name: str | None = None
    text_index: TextIndex = "auto"

    def as_data(self) -> dict[str, Any]:
        """Spell it for `run.json`."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> RunSettings:
        """Read what `as_data` spelled."""
        embedding = data["embedding"]
        spec = {**data["source"], "paths": tuple(data["source"]["paths"])}
        return cls(
            **{
                **data,
                "source": SourceSpec(**spec),
                "users": tuple(data["users"]),
                "embedding": None if embedding is None else EmbeddingSpec(**embedding),
            }
        )

    def choice(self, dims: int) -> Choice:
        """
        Say which items travel.

        Raises:
            UsageError: A date is none.
        """
        return Choice(
            frozenset(self.users) if self.users else None,
            _bound("--from-date", self.from_date),
            _bound("--to-date", self.to_date),
            self.remap_users,
            dims,
            carry_vectors=self.vectors == "carry",
        )


def _bound(option: str, text: str | None) -> datetime | None:
    try:
        return None if text is None else parse_bound(text)
    except ValueError as exc:
        raise UsageError(f"`{option}` is no moment: {text}", hint="for instance 2026-01-31, or with a time") from exc


@dataclass(frozen=True)
class Run:
    """A run that is open: its folder, and all that it works with."""

    folder: WorkFolder
    settings: RunSettings
    run_id: uuid.UUID
    source: Source
    info: SourceInfo
    pipeline: Pipeline
    loader: Loader
    second: Loader
    connection: Connection
    checkpoint: str | None

    def carry_out(self, until: Step, *, dry_run: bool = False) -> Report:
        """
        Do what is left to do, up to a step.

        Raises:
            MemharborError: A step failed; the same call goes on from there.
        """
        if until == "verify":
            self.folder.path.joinpath(VERIFIED).unlink(missing_ok=True)
        try:
            texts = partial(read_texts, self.connection)
            with self._text_index_after() if until in ("load", "verify") and not dry_run else nullcontext():
                self.pipeline.run(until, self.loader, texts, second=self.second, dry_run=dry_run)
            if until == "verify" and not dry_run:
                self.folder.write_json(VERIFIED, {"same": True})
        except VerificationError:
            self.folder.write_json(VERIFIED, {"same": False})
            raise
        finally:
            self.folder.write_dead_letters()
        return self.pipeline.report()

    @contextmanager
    def _text_index_after(self) -> Iterator[None]:
        """Load without the index of keyword search, where that is worth it; a run that is stopped builds it later."""
        items = sum(self.info.counts.values()) or (self.info.size_bytes or 0) // _ITEM_BYTES
        if self.folder.read_json(TEXT_INDEX) is None and is_built_after(
            self.connection, self.settings.text_index, items
        ):
            self.folder.write_json(TEXT_INDEX, {"is_built": False})
            drop_text_index(self.connection, self.loader.settings)
        try:
            yield
        except VerificationError:
            self._build_text_index()
            raise
        self._build_text_index()

    def _build_text_index(self) -> None:
        if (self.folder.read_json(TEXT_INDEX) or {}).get("is_built") is False:
            with self.pipeline.output.step("Build the index of keyword search"):
                build_text_index(self.connection)
            self.folder.write_json(TEXT_INDEX, {"is_built": True})


@contextmanager
def opened_run(
    folder: WorkFolder,
    target: Target,
    output: Output,
    *,
    settings: RunSettings | None = None,
    take_checkpoint: Callable[[str], str] | None = None,
    needs_embeddings: bool = True,
    pace: Pace | None = None,
) -> Iterator[Run]:
    """
    Open a run to carry it out, or begin one.

    Args:
        folder: Its folder.
        target: The database that it loads into.
        output: Where progress is said.
        settings: Of a run that begins; a run that goes on has its own.
        take_checkpoint: Called with the run's name before a run begins, once all else is known to be good.
        needs_embeddings: Whether embeddings will be made; a dry run makes none.
        pace: Of the embedding endpoint from now on, where it is not that with which the run began.

    Raises:
        StateRefusedError: The source, the database or the settings are not those that the run began with.
        ConfigError: The source or the embedding model is not to be had.
    """
    with ExitStack() as stack:
        if folder.exists:
            _refuse_other_run(folder, target)
        if settings is None:
            settings = RunSettings.from_data(folder.read_run()["settings"])
        if pace is not None and settings.embedding is not None:
            settings = replace(settings, embedding=settings.embedding.at_pace(pace))
        connection = stack.enter_context(target.connect(autocommit=True))
        if settings.embedding is not None:
            refuse_other_model(connection, target, settings.embedding)
        source = stack.enter_context(open_source(settings.source, users=settings.users, max_rate=settings.max_rate))
        info = source.describe()
        say_notes(source, output)
        embedder = None
        if settings.embedding is not None and needs_embeddings:
            embedder = stack.enter_context(open_embedder(settings.embedding))
        if not folder.exists:
            # Its name is taken from here on, whatever happens to it: the checkpoint has the same.
            folder.path.mkdir(parents=True, exist_ok=True)
            checkpoint = None if take_checkpoint is None else take_checkpoint(folder.path.name)
            _begin(folder, settings, info, target, checkpoint)
        run = folder.read_run()
        refuse_changed_source(run, info)
        # The name stays that of the first run, so that what is tried again keeps its ids.
        info = replace(info, name=run["source"]["name"])
        choice, erased = settings.choice(target.settings.embedding_dims), read_erased(connection)
        size, rate, keep = settings.batch_size, settings.max_rate, settings.keep_duplicates
        pipeline = Pipeline(folder, Plan(source, info, choice, size, rate, embedder, erased, keep), output)
        loader, second = (
            _make_loader(each, target, run, settings, will_embed=not needs_embeddings)
            for each in (connection, stack.enter_context(target.connect(autocommit=True)))
        )
        run_id = uuid.UUID(run["run_id"])
        yield Run(folder, settings, run_id, source, info, pipeline, loader, second, connection, run["checkpoint"])


def _make_loader(
    connection: Connection, target: Target, run: Mapping[str, Any], settings: RunSettings, *, will_embed: bool
) -> Loader:
    embedding = settings.embedding
    return Loader(
        connection,
        target.settings,
        uuid.UUID(run["run_id"]),
        run["source"]["name"],
        settings.on_conflict,
        will_embed=will_embed and embedding is not None,
        embedding=embedding,
    )


def _begin(folder: WorkFolder, settings: RunSettings, info: SourceInfo, target: Target, checkpoint: str | None) -> None:
    run = {
        "run_id": str(uuid.uuid4()),
        "began_at": datetime.now(UTC).isoformat(),
        "target": target.identity,
        "schema": _schema(target),
        "source": asdict(replace(info, name=settings.source_name or info.name)),
        "settings": settings.as_data(),
        "checkpoint": checkpoint,
    }
    folder.begin({**run, "digest": settings_digest(run)})


def _schema(target: Target) -> dict[str, Any]:
    """Say what of the schema decides about a run's result."""
    names = ("embedding_dims", "embedding_type", "embedding_distance")
    return {name: getattr(target.settings, name) for name in names}


def _refuse_other_run(folder: WorkFolder, target: Target) -> None:
    refuse_cleared(folder)
    if folder.read_json("rolled-back.json") is not None:
        raise StateRefusedError("this run was rolled back", hint="begin a new one: memharbor migrate run")
    run = folder.read_run()
    if run["target"] != target.identity:
        raise StateRefusedError(
            f"this run loads into {run['target']}, not into {target.identity}",
            hint="pass `--stack` or `MEMHARBOR_DSN` as it began",
        )
    was, now = run.get("schema", {}), _schema(target)
    if was != now:
        changes = [
            f"{name} was {was.get(name)} and is {value}" for name, value in now.items() if was.get(name) != value
        ]
        raise StateRefusedError(
            f"the schema is not what it was when this run began: {', '.join(changes)}",
            hint="begin a new run: memharbor migrate run",
        )
    if run.get("digest") != settings_digest({key: run[key] for key in run if key not in ("format", "digest")}):
        raise StateRefusedError(
            f"`{folder.path / 'run.json'}` was changed since this run began",
            hint="begin a new run with other settings: memharbor migrate run",
        )


def read_texts(connection: Connection) -> Iterator[Any]:
    """Read id, owner and MD5 of the text of every memory that is active, streamed."""
    with _as_service(connection), connection.cursor(name="memharbor_texts") as cursor:
        cursor.itersize = 10_000
        cursor.execute(
            "select id, user_id, agent_id, run_id, md5(memory) from memharbor.memories"
            " where state = 'active' and memory is not null"
        )
        yield from cursor


def read_erased(connection: Connection) -> frozenset[str]:
    """Read the SHA-256 of the users that were erased."""
    with _as_service(connection):
        rows = connection.execute("select user_id_sha256 from memharbor.erase_ledger").fetchall()
    return frozenset(row[0] for row in rows)


@contextmanager
def _as_service(connection: Connection) -> Iterator[None]:
    """Act as the service role: an administrator who is no superuser sees no row of tables under row level security."""
    with translated_errors("asking the database"), transaction(connection, role=ROLES["service"]):
        yield


def forget_load(folder: WorkFolder, target: Target) -> None:
    """Note that what a run loaded was rolled back, so that it cannot go on as if it were there."""
    run = folder.read_run()
    with closing(target.connect(autocommit=True)) as connection:
        with _as_service(connection):
            connection.execute("delete from memharbor.migration_ledger where run_id = %s", (uuid.UUID(run["run_id"]),))
        if (folder.read_json(TEXT_INDEX) or {}).get("is_built") is False:
            build_text_index(connection)
    folder.write_json("rolled-back.json", {"at": datetime.now(UTC).isoformat()})


def settings_of_retry(
    folder: WorkFolder, path: str | None, remap_users: Mapping[str, str] | None = None
) -> RunSettings:
    """
    Make settings of a run that tries again what another one refused, under the same ids.

    Args:
        folder: Of the other run.
        path: A mended copy of its dead letters; they themselves by default.
        remap_users: New name by name in the source; those of the other run by default.

    Raises:
        StateRefusedError: The other run's files are gone.
    """
    refuse_cleared(folder)
    letters = str(Path(path or folder.path / "dead-letters.jsonl").absolute())
    run = folder.read_run()
    settings = RunSettings.from_data(run["settings"])
    return replace(
        settings,
        source=SourceSpec("dead-letters", (letters,)),
        source_name=run["source"]["name"],
        remap_users=settings.remap_users if remap_users is None else remap_users,
    )
