"""
Loads side by side: statements of a hundred rows as the seeds' script writes them, a bare COPY, and ours.

The rows have their embeddings already, so that no model is measured. Ours includes what the others leave out: every row is
checked and judged, the segments are on disk, and what was loaded is compared with the database.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from memharbor.bench.measure import WORDS, Measure
from memharbor.database import Connection, run_statement, transaction, translated_errors
from memharbor.errors import StateRefusedError
from memharbor.migrate.load import Loader, know_vectors
from memharbor.migrate.opening import SourceSpec
from memharbor.migrate.record import Record, pack_vector
from memharbor.migrate.runs import RunSettings, opened_run
from memharbor.migrate.workfolder import WorkFolder
from memharbor.output import Output
from memharbor.schema.migrations import VECTOR_SCHEMA
from memharbor.target import Target
from memharbor.templates import render

# Of the seeds' script: rows a statement by psycopg2's execute_values, and rows a transaction.
_STATEMENT_ROWS, _BATCH_ROWS = 100, 1000
_SEGMENT_ROWS = 1000
_AT = "2025-01-15T10:00:00+00:00"


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
            rows: Memories to make.
            users: Users that they belong to.

        Raises:
            StateRefusedError: The database holds memories, which a benchmark must not touch.
        """
        self.refuse_memories()
        records = list(_made(rows, users, self.target.settings.embedding_dims))
        with closing(self.target.connect(autocommit=True)) as connection, tempfile.TemporaryDirectory() as folder:
            know_vectors(connection)
            ways: Sequence[tuple[str, Callable[[], None]]] = (
                ("execute_values, indexes and triggers", lambda: _by_statements(connection, records)),
                ("COPY BINARY, no index, no trigger", lambda: _by_copy(connection, records, self.target)),
                ("load step", lambda: _by_loader(connection, records, self.target)),
                ("migrate run", self._by_run(records, Path(folder))),
            )
            return [self._measured(connection, way, work) for way, work in ways]

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
            with self.output.step(f"Load by {way}"):
                begun_at = time.monotonic()
                work()
                return Measure("load", way, time.monotonic() - begun_at)
        finally:
            with translated_errors("tidying up"):
                run_statement(connection, "delete from memharbor.memories where user_id like 'bench-user-%'")
                run_statement(connection, "delete from memharbor.memory_history where user_id like 'bench-user-%'")
                run_statement(connection, "vacuum memharbor.memories")

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


def peak_memory_bytes() -> int:
    """Tell the most memory that this process has had. Source: getrusage(2); kilobytes on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _made(rows: int, users: int, dims: int) -> Iterator[Record]:
    draw = random.Random(20261121)  # noqa: S311 - made-up rows
    for number in range(rows):
        text = " ".join(draw.choices(WORDS.split(), k=12))
        payload = {
            "data": f"{text} {number}",
            "hash": f"{number:032x}",
            "text_lemmatized": text.lower(),
            "user_id": f"bench-user-{number % users}",
            "created_at": _AT,
            "updated_at": _AT,
        }
        values = [draw.uniform(-1, 1) for _ in range(dims)]
        embedding = struct.unpack(f"<{dims}f", struct.pack(f"<{dims}f", *values))
        yield Record("memory", uuid.UUID(int=draw.getrandbits(128), version=4), str(number), payload, embedding)


def _by_statements(connection: Connection, records: Sequence[Record]) -> None:
    """Write as the seeds' import script does: literals, a hundred rows a statement, a transaction a thousand."""
    with translated_errors("loading by statements"):
        cursor = psycopg.ClientCursor(connection)
        for begin in range(0, len(records), _BATCH_ROWS):
            batch = records[begin : begin + _BATCH_ROWS]
            with transaction(connection):
                connection.execute("set local statement_timeout = 0")
                for first in range(0, len(batch), _STATEMENT_ROWS):
                    values = [
                        cursor.mogrify("(%s, %s, %s, %s)", _literals(each)) for each in batch[first : first + 100]
                    ]
                    cursor.execute(
                        (
                            "insert into public.memories (id, user_id, memory, embedding) values "  # noqa: S608
                            + ", ".join(values)
                        ).encode()
                    )


def _literals(record: Record) -> tuple[str, ...]:
    vector = "[" + ",".join(map(repr, record.embedding or ())) + "]"
    return (str(record.id), str(record.user_id), record.text, vector)


def _by_copy(connection: Connection, records: Sequence[Record], target: Target) -> None:
    with translated_errors("loading by COPY"):
        variables = {"embedding_dims": target.settings.embedding_dims, "vector_schema": VECTOR_SCHEMA}
        run_statement(connection, render("bench/plain_table.sql", variables))
        statement = sql.SQL("copy pg_temp.bench_plain (id, embedding, payload) from stdin (format binary)")
        with transaction(connection), connection.cursor().copy(statement) as copy:
            copy.set_types(["uuid", "vector", "jsonb"])
            for record in records:
                copy.write_row((record.id, record.embedding, Jsonb(dict(record.data))))


def _by_loader(connection: Connection, records: Sequence[Record], target: Target) -> None:
    loader = Loader(connection, target.settings, uuid.uuid4(), "bench", "skip")
    for number, begin in enumerate(range(0, len(records), _SEGMENT_ROWS), start=1):
        loader.load(number, records[begin : begin + _SEGMENT_ROWS])
