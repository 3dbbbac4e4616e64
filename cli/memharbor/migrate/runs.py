"""
Runs of migrations: what was asked for, kept in the work folder, and opened again to go on.

No secret is kept: a database's address and keys come from the environment each time.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from memharbor.database import Connection, transaction, translated_errors
from memharbor.errors import ConfigError, StateRefusedError, UsageError, VerificationError
from memharbor.migrate.load import Loader, OnConflict
from memharbor.migrate.opening import EmbeddingSpec, Pace, SourceSpec, open_embedder, open_source, say_notes
from memharbor.migrate.pipeline import Pipeline, Plan, Report, Step, refuse_changed_source, settings_digest
from memharbor.migrate.record import Source, SourceInfo
from memharbor.migrate.recorded_model import refuse_other_model
from memharbor.migrate.transform import Choice, parse_bound
from memharbor.migrate.workfolder import CLEARED, STEPS, WorkFolder
from memharbor.names import ROLES
from memharbor.output import Output
from memharbor.target import Target

Vectors = Literal["carry", "generate"]
# What the last comparison of a run with the database found; absent where it was not finished.
VERIFIED = "verified.json"


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
            self.pipeline.run(until, self.loader, texts, second=self.second, dry_run=dry_run)
            if until == "verify" and not dry_run:
                self.folder.write_json(VERIFIED, {"same": True})
        except VerificationError:
            self.folder.write_json(VERIFIED, {"same": False})
            raise
        finally:
            self.folder.write_dead_letters()
        return self.pipeline.report()


def new_folder(folder: Path, kind: str, *, now: datetime) -> WorkFolder:
    """
    Name a new run, after its source and the time.

    >>> new_folder(Path("runs"), "platform", now=datetime(2026, 11, 21, 9, 30, tzinfo=UTC)).path.name
    '20261121T093000Z-platform'
    """
    name = f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{kind}"
    candidates = (folder / name, *(folder / f"{name}-{number}" for number in range(2, 1000)))
    return WorkFolder(next(path for path in candidates if not path.exists()))


def list_runs(folder: Path) -> list[WorkFolder]:
    """List the runs in a folder of runs, oldest first."""
    found = (WorkFolder(path) for path in sorted(folder.glob("*")) if path.is_dir())
    return [run for run in found if run.exists]


def find_run(folder: Path, name: str | None) -> WorkFolder:
    """
    Find a run by its name, or the newest.

    Raises:
        ConfigError: There is none.
    """
    runs = list_runs(folder)
    found = next((run for run in runs if run.path.name == name), None) if name else (runs[-1] if runs else None)
    if found is None and name and WorkFolder(Path(name)).exists:
        return WorkFolder(Path(name))
    if found is None:
        there_are = f"there are {', '.join(run.path.name for run in runs)}" if runs else "there is none yet"
        raise ConfigError(f"there is no run `{name or ''}`; {there_are}", hint="memharbor migrate run --help")
    return found


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


def describe_run(folder: WorkFolder) -> dict[str, Any]:
    """
    Say how far a run is: segments by step, refusals, and its state.

    The state is `to resume`; `to verify`, all is loaded; `complete`, and compared with the database; `differs`, it was
    found to be another one there; `rolled back`; or `cleared`.
    """
    run = folder.read_run()
    counts = {step: len(folder.segments(step)) for step in STEPS}
    is_done = folder.is_read() and len(set(counts.values())) == 1
    return {
        "name": folder.path.name,
        "source": run["source"]["name"],
        **counts,
        "refused": sum(1 for _ in folder.dead_letters()),
        "state": _state(folder, is_done=is_done),
    }


def _state(folder: WorkFolder, *, is_done: bool) -> str:
    if folder.read_json(CLEARED) is not None:
        return "cleared"
    if folder.read_json("rolled-back.json") is not None:
        return "rolled back"
    verified = folder.read_json(VERIFIED)
    if not is_done:
        return "to resume"
    if verified is None:
        return "to verify"
    return "complete" if verified["same"] else "differs"


def refuse_cleared(folder: WorkFolder) -> None:
    """
    Refuse to work with a run whose files are gone.

    Raises:
        StateRefusedError: A user of the run was erased, and its files with them.
    """
    if folder.read_json(CLEARED) is not None:
        raise StateRefusedError(
            f"the files of run {folder.path.name} went with a user who was erased",
            hint="begin a new one: memharbor migrate run",
        )


def read_checkpoint(folder: WorkFolder) -> str:
    """
    Read which checkpoint was taken before a run.

    Raises:
        StateRefusedError: None was.
    """
    name = folder.read_run()["checkpoint"]
    if name is None:
        raise StateRefusedError("no checkpoint was taken before this run", hint="memharbor checkpoint list")
    return str(name)


def forget_load(folder: WorkFolder, target: Target) -> None:
    """Note that what a run loaded was rolled back, so that it cannot go on as if it were there."""
    run = folder.read_run()
    with closing(target.connect(autocommit=True)) as connection, _as_service(connection):
        connection.execute("delete from memharbor.migration_ledger where run_id = %s", (uuid.UUID(run["run_id"]),))
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
