"""
Load records into a Memharbor database: COPY into temporary tables, judge each row, merge through the contract.

Rows are written by the service role, so that policies, triggers and the audit trail hold for them as for any other.
A segment is one transaction, and the ledger in the database says in the same transaction that it is there: a run that is
killed between the two never loads a segment twice. Why: docs/adr/0016-migration-by-segments.md.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import psycopg
from psycopg import sql

from memharbor.backup.access import all_rows, run_script
from memharbor.database import Connection, server_text, transaction, translated_errors
from memharbor.errors import StateRefusedError
from memharbor.migrate.behind import Turn
from memharbor.migrate.merging import COLUMNS, INSERT, JUDGE, STAGED, TYPES, UPDATE, staged_row
from memharbor.migrate.opening import EmbeddingSpec
from memharbor.migrate.record import NAMESPACE, Record
from memharbor.migrate.recorded_model import note_model
from memharbor.migrate.vector_type import know_vectors
from memharbor.names import ROLES
from memharbor.schema.migrations import VECTOR_SCHEMA
from memharbor.settings import Settings
from memharbor.templates import render

OnConflict = Literal["skip", "overwrite", "new-id"]

# A text above this is shown to the text search before it is loaded: tsvector holds 1 MiB of distinct words.
# Source: PostgreSQL manual, 12.11 Limitations.
_LONG_TEXT_BYTES = 100_000
_JOINS = (
    "select pg_catalog.set_config('enable_hashjoin', %(joins)s, true),"
    " pg_catalog.set_config('enable_mergejoin', %(joins)s, true)"
)
# Of the advisory lock that one segment of a run holds at a time: "mhmi".
_LOCK_CLASS = 0x6D686D69
# Room for what is staged; it cannot be changed any more once a session has had a temporary table.
_TEMPORARY_BUFFERS = (
    "select pg_catalog.set_config('temp_buffers', '64MB', false) where pg_catalog.pg_my_temp_schema() = 0"
)
# What makes one row wrong and not the server: data exceptions, constraints, limits of a program.
_ROW_SQLSTATES = ("22", "23", "54")


@dataclass
class Loaded:
    """
    What became of one segment.

    Args:
        counts: Rows by what was (or would be) done: `inserted`, `updated`, `same`, `skipped`, `refused`.
        refused: The refused ones: place in the segment, reason and detail.
        skipped: Places of those that the database has another version of, which was kept.
        renumbered: The new id by place, as text, of those whose id was taken.
    """

    counts: Counter[str] = field(default_factory=Counter)
    refused: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    renumbered: dict[str, str] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """Spell it as JSON data."""
        return {
            "counts": dict(self.counts),
            "refused": self.refused,
            "skipped": self.skipped,
            "renumbered": self.renumbered,
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Loaded:
        """Read what `as_data` spelled."""
        return cls(Counter(data["counts"]), data["refused"], data["skipped"], data["renumbered"])

    def copy(self) -> Loaded:
        """Copy it, so that what a part added can be forgotten."""
        return Loaded(self.counts.copy(), list(self.refused), list(self.skipped), dict(self.renumbered))

    def refuse(self, place: int, reason: str, detail: str) -> None:
        """Refuse a row."""
        self.refused.append({"place": place, "reason": reason, "detail": detail})
        self.counts["refused"] += 1


class Loader:
    """
    Load segments of one run.

    Args:
        connection: Straight to the database, as its administrator; in autocommit.
        settings: Of the schema that is there.
        run_id: Of the run.
        source: Name of the source, for the ledger.
        on_conflict: What becomes of a row whose id is taken by a different one of the same user.
        will_embed: For a dry run: what has no embedding yet will have one.
        embedding: The run's own model, which goes on record with the first embedding of it that is written.
    """

    def __init__(
        self,
        connection: Connection,
        settings: Settings,
        run_id: uuid.UUID,
        source: str,
        on_conflict: OnConflict,
        *,
        will_embed: bool = False,
        embedding: EmbeddingSpec | None = None,
    ) -> None:
        self._will_embed, self._embedding = will_embed, embedding
        know_vectors(connection)
        variables = {
            "embedding_dims": settings.embedding_dims,
            # In the row where it fits a page, so that staging it writes no second table.
            "embedding_storage": "plain" if settings.embedding_type == "vector" else "external",
            "owner": ROLES["owner"],
            "role": ROLES["service"],
            "vector_schema": VECTOR_SCHEMA,
        }
        with translated_errors("preparing to load"):
            connection.execute(_TEMPORARY_BUFFERS)
            run_script(connection, render("migrate/foretold.sql", {"role": ROLES["service"]}))
            run_script(connection, render("migrate/stage.sql", variables))
        self._connection, self.settings = connection, settings
        self._run_id, self._source, self._on_conflict = run_id, source, on_conflict
        self._lock = (_LOCK_CLASS, str(run_id))

    def load(
        self, number: int, records: Sequence[Record], turn: Turn = lambda: None, *, dry_run: bool = False
    ) -> Loaded:
        """
        Load one segment; one that is there already is not loaded again.

        Args:
            number: Of the segment; they are loaded in order.
            records: Its records.
            turn: Called when they are staged, and before they are judged: waits until the segment before is loaded.
            dry_run: Judge only.

        Raises:
            StateRefusedError: An earlier segment is missing in the database: it was rolled back, or is another one.
            DatabaseError: The server refused for a reason that is not of a row.
            ConnectError: The connection was lost; the same call goes on from there.
        """
        loaded = Loaded()
        places = [place for place in range(len(records)) if not self._is_refused(place, records[place], loaded)]
        rows = [(place, records[place]) for place in places]
        with translated_errors("loading"), self._transaction(rollback=dry_run):
            is_staged = self._try_stage(rows)
            turn()
            if not dry_run:
                # The server may still commit for a process that was killed: what it loads is waited for, and then known.
                self._connection.execute("select pg_catalog.pg_advisory_xact_lock(%s, hashtext(%s))", self._lock)
                with self._as_service():
                    known = self._known(number)
                if known is not None:
                    return known
            self._write_part(rows, loaded, is_staged=is_staged)
            if not dry_run:
                with self._as_service():
                    self._note(number, loaded)
        if dry_run:
            self._foretell(rows, loaded)
        return loaded

    def judge(self, records: Sequence[Record]) -> Iterator[tuple[int, str]]:
        """Compare records with the database; yields the place and the verdict of each that is not the same."""
        with self._staged(records, rollback=True):
            for kind in STAGED:
                self._judge(kind)
            yield from self._connection.execute(
                "select place, verdict from pg_temp.judged where verdict <> 'same' order by place"
            ).fetchall()

    def _known(self, number: int) -> Loaded | None:
        """Read from the ledger what became of a segment; `None` where it is the next one."""
        row = self._connection.execute(
            "select position, detail from memharbor.migration_ledger where run_id = %s and step = 'load'",
            (self._run_id,),
        ).fetchone()
        position = int(row[0]) if row is not None else 0
        if position < number - 1:
            raise StateRefusedError(
                f"segment {number - 1} of this run is not in the database any more: it was rolled back or restored",
                hint="begin a new run; rows that are there already stay as they are",
            )
        if position != number or row is None:
            return None if position < number else Loaded()
        return Loaded.from_data(row[1]["last"])

    def _foretell(self, rows: Sequence[tuple[int, Record]], loaded: Loaded) -> None:
        """Keep in mind which memories would be there by now."""
        refused = {each["place"] for each in loaded.refused}
        ids = [record.id for place, record in rows if record.kind == "memory" and place not in refused]
        with translated_errors("rehearsing"):
            self._connection.execute(
                "insert into pg_temp.foretold_memories select distinct unnest(%s::uuid[]) on conflict do nothing",
                (ids,),
            )

    def _try_stage(self, rows: list[tuple[int, Record]]) -> bool:
        try:
            with self._connection.transaction():
                self._stage(rows)
                return True
        except psycopg.Error as exc:
            if not _is_of_a_row(exc):
                raise
            return False

    def _write_part(self, rows: list[tuple[int, Record]], loaded: Loaded, *, is_staged: bool = False) -> None:
        """Write what the server takes; a row that it does not take is found by halves."""
        before = loaded.copy()
        try:
            with self._connection.transaction():
                if not is_staged:
                    self._clear_staged()
                    self._stage(rows)
                self._merge(rows, loaded)
        except psycopg.Error as exc:
            if not _is_of_a_row(exc):
                raise
            loaded.counts, loaded.refused = before.counts, before.refused
            loaded.skipped, loaded.renumbered = before.skipped, before.renumbered
            if len(rows) == 1:
                loaded.refuse(rows[0][0], "rejected", server_text(exc).splitlines()[0])
                return
            half = len(rows) // 2
            self._write_part(rows[:half], loaded)
            self._write_part(rows[half:], loaded)

    def _clear_staged(self) -> None:
        """Forget another part; what a whole segment staged goes with its transaction."""
        for name in STAGED.values():
            self._run(f"delete from pg_temp.{name}")

    @contextmanager
    def _transaction(self, *, rollback: bool) -> Iterator[None]:
        with transaction(self._connection, rollback=rollback):
            self._connection.execute("set local statement_timeout = 0")
            self._connection.execute("set local search_path = pg_catalog, pg_temp")
            # A segment is sorted, and handed to the audit trail's trigger, with its embeddings: not by way of files.
            self._connection.execute("set local work_mem = '64MB'")
            yield

    @contextmanager
    def _staged(self, records: Sequence[Record], *, rollback: bool) -> Iterator[None]:
        with translated_errors("comparing"), self._transaction(rollback=rollback):
            self._stage(list(enumerate(records)))
            with self._as_service():
                yield

    @contextmanager
    def _as_service(self) -> Iterator[None]:
        self._connection.execute("select pg_catalog.set_config('role', %s, true)", (ROLES["service"],))
        yield
        self._connection.execute("select pg_catalog.set_config('role', 'none', true)")

    def _merge(self, rows: list[tuple[int, Record]], loaded: Loaded) -> None:
        for kind in STAGED:
            if not any(record.kind == kind for _, record in rows):
                continue
            with self._as_service():
                self._judge(kind)
                if self._on_conflict == "new-id" and kind in ("memory", "entity"):
                    self._renumber(kind, loaded)
                self._decide(loaded)
                self._note_model(rows)
                if kind != "history":
                    self._run(INSERT[kind])
                    if kind in UPDATE:
                        self._run(UPDATE[kind])
            if kind == "history":
                # The audit trail takes rows from nobody but its owner.
                with all_rows(self._connection, ["memory_history"]):
                    self._run(INSERT[kind])
                self._connection.execute("select pg_catalog.set_config('role', 'none', true)")
            self._run("delete from pg_temp.judged")

    def _stage(self, rows: Sequence[tuple[int, Record]]) -> None:
        for kind, name in STAGED.items():
            wanted = [(place, record) for place, record in rows if record.kind == kind]
            if not wanted:
                continue
            columns = sql.SQL(", ").join(map(sql.Identifier, COLUMNS[kind]))
            statement = sql.SQL("copy pg_temp.{} ({}) from stdin (format binary)").format(sql.Identifier(name), columns)
            with self._connection.cursor().copy(statement) as copy:
                copy.set_types([TYPES.get(column, "text") for column in COLUMNS[kind]])
                for place, record in wanted:
                    copy.write_row(staged_row(place, record, will_embed=self._will_embed))

    def _judge(self, kind: str) -> None:
        # A segment is small beside the table, and is looked up in it by its ids, whatever is known of either's size.
        self._connection.execute(_JOINS, {"joins": "off"})
        self._run(JUDGE[kind])
        self._connection.execute(_JOINS, {"joins": "on"})

    def _renumber(self, kind: str, loaded: Loaded) -> None:
        """Give rows whose id is taken a new one, the same in every run, and judge them again."""
        staged = f"pg_temp.{STAGED[kind]}"
        taken = self._connection.execute(
            f"select s.place, s.id, s.payload::text from {staged} s join pg_temp.judged j using (place)"
            " where j.verdict in ('conflict', 'foreign')".encode()
        ).fetchall()
        if not taken:
            return
        for place, old_id, payload in taken:
            digest = hashlib.sha256(payload.encode()).hexdigest()
            new_id = uuid.uuid5(NAMESPACE, f"new-id:{old_id}:{digest}")
            loaded.renumbered[str(place)] = str(new_id)
            self._connection.execute(f"update {staged} set id = %s where place = %s".encode(), (new_id, place))
        self._run("delete from pg_temp.judged")
        self._judge(kind)

    def _decide(self, loaded: Loaded) -> None:
        if self._on_conflict == "overwrite":
            self._run("update pg_temp.judged set verdict = 'update' where verdict = 'conflict'")
            for place in self._places("foreign"):
                loaded.refuse(place, "rejected", "its id belongs to another user here")
            self._run("delete from pg_temp.judged where verdict = 'foreign'")
        self._run("update pg_temp.judged set verdict = 'skip' where verdict in ('conflict', 'foreign')")
        loaded.skipped += self._places("skip")
        self._run("update pg_temp.judged set verdict = 'update' where verdict = 'embed'")
        for place in self._places("dangling"):
            loaded.refuse(place, "dangling", "a memory that it names is not there, or is another user's")
        self._run("delete from pg_temp.judged where verdict = 'dangling'")
        words = {"insert": "inserted", "update": "updated", "same": "same", "skip": "skipped"}
        for verdict, count in self._connection.execute(
            "select verdict, count(*) from pg_temp.judged group by verdict"
        ).fetchall():
            loaded.counts[words[verdict]] += count

    def _note_model(self, rows: Sequence[tuple[int, Record]]) -> None:
        """Put the run's model on record, where an embedding that it made is written."""
        made = [place for place, record in rows if record.is_made]
        if self._embedding is None or not made:
            return
        writes = "select from pg_temp.judged where verdict in ('insert', 'update') and place = any(%s) limit 1"
        if self._connection.execute(writes, (made,)).rowcount:
            note_model(self._connection, self._embedding)

    def _places(self, verdict: str) -> list[int]:
        query = "select place from pg_temp.judged where verdict = %s order by place"
        return [place for (place,) in self._connection.execute(query, (verdict,)).fetchall()]

    def _is_refused(self, place: int, record: Record, loaded: Loaded) -> bool:
        text = str(record.data.get("text_lemmatized") or "")
        if record.kind != "memory" or len(text) < _LONG_TEXT_BYTES // 4 or len(text.encode()) < _LONG_TEXT_BYTES:
            return False
        try:
            with self._connection.transaction():
                self._connection.execute("select pg_catalog.to_tsvector('pg_catalog.simple', %s) is null", (text,))
        except psycopg.errors.ProgramLimitExceeded as exc:
            loaded.refuse(place, "text-too-long", server_text(exc).splitlines()[0])
            return True
        return False

    def _note(self, number: int, loaded: Loaded) -> None:
        detail = json.dumps({"last": loaded.as_data(), "on_conflict": self._on_conflict})
        self._connection.execute(
            """
            insert into memharbor.migration_ledger as l
              (run_id, step, source, state, position, row_count, detail, started_at)
            values (%(run)s, 'load', %(source)s, 'running', %(number)s, %(count)s, %(detail)s, now())
            on conflict (run_id, step) do update
            set position = excluded.position, row_count = l.row_count + excluded.row_count, detail = excluded.detail
            """,
            {
                "run": self._run_id,
                "source": self._source,
                "number": str(number),
                "count": loaded.counts["inserted"] + loaded.counts["updated"],
                "detail": detail,
            },
        )

    def finish(self) -> None:
        """Note in the ledger that the run is complete."""
        with (
            translated_errors("writing the ledger of migrations"),
            transaction(self._connection, role=ROLES["service"]),
        ):
            self._connection.execute(
                "update memharbor.migration_ledger set state = 'done', finished_at = now()"
                " where run_id = %s and step = 'load' and state <> 'done'",
                (self._run_id,),
            )

    def _run(self, statement: str) -> None:
        kind = f"{VECTOR_SCHEMA}.{self.settings.embedding_type}({self.settings.embedding_dims})"
        send = f"{VECTOR_SCHEMA}.{self.settings.embedding_type}_send"
        self._connection.execute(statement.replace("CAST", kind).replace("SEND", send).encode())


def _is_of_a_row(error: psycopg.Error) -> bool:
    return error.sqlstate is not None and error.sqlstate.startswith(_ROW_SQLSTATES)
