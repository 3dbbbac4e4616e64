"""
Loads side by side: the seeds' import script, a bare COPY, and ours; and embedding, text by text and in batches.

The rows of a load have their embeddings already, so that no model is measured. Ours includes what the others leave out:
every row is checked and judged, the segments are on disk, and what was loaded is compared with the database.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from memharbor.backup.access import run_script
from memharbor.bench.measure import WORDS, Measure
from memharbor.database import Connection, run_statement, transaction, translated_errors
from memharbor.errors import StateRefusedError
from memharbor.migrate.behind import Behind
from memharbor.migrate.load import Loader
from memharbor.migrate.opening import SourceSpec
from memharbor.migrate.record import Record, pack_vector
from memharbor.migrate.runs import RunSettings, opened_run
from memharbor.migrate.text_index import build_text_index, drop_text_index
from memharbor.migrate.vector import Vector
from memharbor.migrate.vector_type import know_vectors
from memharbor.migrate.workfolder import WorkFolder
from memharbor.output import Output
from memharbor.schema.migrations import VECTOR_SCHEMA
from memharbor.target import Target
from memharbor.templates import render

# Of the seeds' script: rows a statement by psycopg2's execute_values, and rows a transaction.
_STATEMENT_ROWS, _BATCH_ROWS = 100, 1000
_SEGMENT_ROWS = 1000
_AT = "2025-01-15T10:00:00+00:00"
_SCRIPT = (
    "insert into {} (id, user_id, agent_id, run_id, memory, hash, metadata, categories, embedding, created_at, updated_at)"
    " values {} on conflict (id) do update set memory = excluded.memory, metadata = excluded.metadata,"
    " updated_at = excluded.updated_at"
)


@dataclass
class MigrateBench:
    """
    One run of the comparison.

    Args:
        target: A database without memories.
        output: Where progress is said.
    """

    target: Target
    output: Output

    def run(self, *, rows: int, users: int) -> list[Measure]:
        """
        Load the same rows each way, and leave the database as empty as it was.

        Args:
            rows: Memories to make; they are held in memory.
            users: Users that they belong to.

        Raises:
            StateRefusedError: The database holds memories, which a benchmark must not touch.
        """
        self.refuse_memories()
        dims = self.target.settings.embedding_dims
        records = list(_made(rows, users, dims))
        variables = {"embedding_dims": dims, "vector_schema": VECTOR_SCHEMA}
        with closing(self.target.connect(autocommit=True)) as connection, tempfile.TemporaryDirectory() as folder:
            know_vectors(connection)
            with translated_errors("making the tables that it is compared with"):
                run_script(connection, render("bench/tables.sql", variables))
            ways: Sequence[tuple[str, Callable[[], None]]] = (
                (
                    "the seeds' script, their indexes and trigger",
                    lambda: _by_script(connection, records, "memharbor_bench.memories"),
                ),
                ("the seeds' script, our schema", lambda: _by_script(connection, records, "public.memories")),
                ("COPY BINARY, no index, no trigger", lambda: _by_copy(connection, records)),
                ("load step", lambda: _by_loader(connection, records, self.target)),
                ("load step, text index after it", lambda: _by_loader(connection, records, self.target, after=True)),
                ("migrate run", self._by_run(records, Path(folder))),
            )
            try:
                return [self._measured(connection, way, work) for way, work in ways]
            finally:
                run_script(connection, render("bench/drop_tables.sql", {}))

    def refuse_memories(self) -> None:
        """
        Refuse a database that is in use.

        Raises:
            StateRefusedError: It holds memories.
        """
        with closing(self.target.connect(autocommit=True)) as connection:
            row = connection.execute("select exists (select from memharbor.memories)").fetchone()
        if row is not None and row[0]:
            raise StateRefusedError(
                f"{self.target.name} holds memories", hint="make up STACK=bench, and bench that one"
            )

    def _measured(self, connection: Connection, way: str, work: Callable[[], None]) -> Measure:
        try:
            # Each way begins with nothing left to write of the one before.
            run_statement(connection, "checkpoint")
            with self.output.step(f"Load by {way}"):
                begun_at = time.monotonic()
                work()
                return Measure("load", way, time.monotonic() - begun_at)
        finally:
            remove_rows(connection)

    def _by_run(self, records: Sequence[Record], folder: Path) -> Callable[[], None]:
        path = folder / "memories.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for record in records:
                line = {"id": str(record.id), **record.data, "embedding": pack_vector(record.embedding)}
                file.write(json.dumps(line) + "\n")

        def work() -> None:
            settings = RunSettings(SourceSpec("file", (str(path),)), keep_duplicates=True)
            with opened_run(WorkFolder(folder / "run"), self.target, self.output, settings=settings) as opened:
                opened.carry_out("verify")

        return work


def remove_rows(connection: Connection) -> None:
    """Remove what a benchmark wrote, and the room that it took."""
    with translated_errors("tidying up"):
        run_statement(connection, "delete from memharbor.memories where user_id like 'bench-user-%'")
        run_statement(connection, "delete from memharbor.memory_history where user_id like 'bench-user-%'")
        run_statement(connection, "vacuum memharbor.memories, memharbor.memory_history")


def made_text(draw: random.Random, number: int) -> str:
    """Make up a memory."""
    return f"{' '.join(draw.choices(WORDS.split(), k=12))} {number}"


def _made(rows: int, users: int, dims: int) -> Iterator[Record]:
    draw = random.Random(20261121)  # noqa: S311 - made-up rows
    for number in range(rows):
        text = made_text(draw, number)
        payload = {
            "data": text,
            "hash": f"{number:032x}",
            "text_lemmatized": text.lower(),
            "user_id": f"bench-user-{number % users}",
            "created_at": _AT,
            "updated_at": _AT,
        }
        embedding = Vector.of([draw.uniform(-1, 1) for _ in range(dims)])
        yield Record("memory", uuid.UUID(int=draw.getrandbits(128), version=4), str(number), payload, embedding)


def _by_script(connection: Connection, records: Sequence[Record], table: str) -> None:
    """Write as the seeds' import script does: literals, a hundred rows a statement, a transaction a thousand."""
    with translated_errors("loading by statements"):
        cursor = psycopg.ClientCursor(connection)
        template = f"({', '.join(['%s'] * 11)})"
        for begin in range(0, len(records), _BATCH_ROWS):
            batch = records[begin : begin + _BATCH_ROWS]
            with transaction(connection):
                connection.execute("set local statement_timeout = 0")
                for first in range(0, len(batch), _STATEMENT_ROWS):
                    part = batch[first : first + _STATEMENT_ROWS]
                    values = ", ".join(cursor.mogrify(template, _literals(each)) for each in part)
                    cursor.execute(_SCRIPT.format(table, values).encode())


def _literals(record: Record) -> tuple[object, ...]:
    vector = f"[{','.join(map(str, record.embedding or ()))}]"
    data = record.data
    return (
        str(record.id), record.user_id, None, None, record.text, data["hash"], json.dumps({}), [], vector,
        data["created_at"], data["updated_at"],
    )  # fmt: skip


def _by_copy(connection: Connection, records: Sequence[Record]) -> None:
    statement = sql.SQL("copy memharbor_bench.plain (id, embedding, payload) from stdin (format binary)")
    with translated_errors("loading by COPY"):
        for begin in range(0, len(records), _BATCH_ROWS):
            with transaction(connection), connection.cursor().copy(statement) as copy:
                copy.set_types(["uuid", "vector", "jsonb"])
                for record in records[begin : begin + _BATCH_ROWS]:
                    copy.write_row((record.id, record.embedding, Jsonb(dict(record.data))))


def _by_loader(connection: Connection, records: Sequence[Record], target: Target, *, after: bool = False) -> None:
    run_id = uuid.uuid4()
    if after:
        drop_text_index(connection, target.settings)
    with closing(target.connect(autocommit=True)) as second, Behind(2) as behind:
        loaders = [Loader(each, target.settings, run_id, "bench", "skip") for each in (connection, second)]
        for number, begin in enumerate(range(0, len(records), _SEGMENT_ROWS), start=1):
            loader, part = loaders[number % 2], records[begin : begin + _SEGMENT_ROWS]
            behind.do(partial(loader.load, number, part))
    if after:
        build_text_index(connection)
