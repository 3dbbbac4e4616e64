"""
Embed memories that are in the database: those that have no embedding, or others anew.

Everything is embedded first, into the cache, and put in place afterwards in one transaction: a search never meets
embeddings of two models, and a run that is killed has paid for nothing in vain. Rows are written and searched meanwhile;
only while the embeddings are put in place does a writer of the same rows wait.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from memharbor.backup.access import run_script
from memharbor.database import Connection, transaction, translated_errors
from memharbor.migrate.embedding.model import Embedder, EmbeddingRefusal, Estimate, estimate_cost, estimate_tokens
from memharbor.migrate.embedding.rows import VECTOR_COLUMNS, RowChoice, parse_ids
from memharbor.migrate.recorded_model import MODEL_KEY, read_model
from memharbor.migrate.vector_type import know_vectors
from memharbor.names import ROLES
from memharbor.output import Output
from memharbor.schema.migrations import VECTOR_SCHEMA
from memharbor.settings import Settings
from memharbor.templates import render

_BATCH = 1000
_LISTED_MAX = 100
# Id, text, and whether there is an embedding.
_Page = Sequence[tuple[uuid.UUID, str, bool]]
_NO_TEXT = EmbeddingRefusal("no-text", "it has no text to embed")


@dataclass
class EmbedReport:
    """
    How many rows were (or would be) embedded, and which were refused.

    Args:
        counts: Embedded rows by table.
        reasons: Refused rows by reason.
        rows: The first of them: `table`, `id`, `reason`, `detail`.
        cleared: Refused rows whose embedding, by another model, was taken away.
        unknown_ids: Chosen ids that no row has.
        estimate: Before it is done, what the endpoint will take where nothing is in the cache.
    """

    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(VECTOR_COLUMNS, 0)))
    reasons: Counter[str] = field(default_factory=Counter)
    rows: list[dict[str, str]] = field(default_factory=list)
    cleared: int = 0
    unknown_ids: int = 0
    estimate: Estimate | None = None

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        data = {
            "embedded": self.counts.total(),
            "tables": dict(self.counts),
            "refused": self.reasons.total(),
            "reasons": dict(sorted(self.reasons.items())),
            "rows": self.rows,
            "cleared": self.cleared,
            "unknown_ids": self.unknown_ids,
        }
        if self.estimate is not None:
            data |= {"tokens": self.estimate.tokens, "usd": self.estimate.usd}
        return data

    def refuse(self, table: str, row_id: uuid.UUID, refusal: EmbeddingRefusal) -> None:
        """Count a row that is not embedded."""
        self.reasons[refusal.reason] += 1
        if len(self.rows) < _LISTED_MAX:
            self.rows.append({"table": table, "id": str(row_id), "reason": refusal.reason, "detail": refusal.detail})


def foretell_rows(connection: Connection, choice: RowChoice, model: str) -> EmbedReport:
    """
    Say what `embed_rows` would do, but for what an endpoint refuses; nothing is written.

    Args:
        connection: Straight to the database, as its administrator; in autocommit.
        choice: Which rows.
        model: That would embed them.

    Raises:
        UsageError: An id is none.
    """
    report, tokens = EmbedReport(), 0.0
    clears = _clears(connection, choice, model)
    with translated_errors("counting"):
        report.unknown_ids = _take_ids(connection, choice)
        for table in VECTOR_COLUMNS:
            for row_id, text, is_embedded in chain.from_iterable(_pages(connection, table, choice)):
                if text.strip():
                    report.counts[table] += 1
                    tokens += max(1.0, estimate_tokens(text))
                else:
                    report.refuse(table, row_id, _NO_TEXT)
                    report.cleared += clears and is_embedded
    report.estimate = estimate_cost(tokens, model)
    return report


def embed_rows(
    connection: Connection, settings: Settings, embedder: Embedder, output: Output, choice: RowChoice
) -> EmbedReport:
    """
    Embed rows.

    Args:
        connection: Straight to the database, as its administrator; in autocommit.
        settings: Of the schema.
        embedder: Makes the embeddings.
        output: Where progress is said.
        choice: Which rows.

    Raises:
        UsageError: An id is none.
        EmbeddingError: The endpoint does not answer; nothing was changed, and the same call goes on.
        ConnectError: The database does not answer; the same.
    """
    report = EmbedReport()
    know_vectors(connection)
    clears = _clears(connection, choice, embedder.model)
    with translated_errors("embedding"):
        report.unknown_ids = _take_ids(connection, choice)
        total, done = sum(_count(connection, table, choice) for table in VECTOR_COLUMNS), 0
        with output.step(f"Embed {total:,} texts"), output.percent() as on_percent:
            for table in VECTOR_COLUMNS:
                for part in _pages(connection, table, choice):
                    embedder.embed([text for _, text, _ in part])
                    done += len(part)
                    on_percent(min(100.0, 100 * done / max(total, 1)))
        with output.step("Put the embeddings in place"), transaction(connection):
            connection.execute("set local statement_timeout = 0")
            connection.execute("select pg_catalog.set_config('role', %s, true)", (ROLES["service"],))
            for table in VECTOR_COLUMNS:
                for part in _pages(connection, table, choice, lock=True):
                    _put(connection, settings, embedder, table, part, report, clears=clears)
            _note_model(connection, embedder, choice, report)
    return report


def _clears(connection: Connection, choice: RowChoice, model: str) -> bool:
    """Tell whether an embedding that stays would be of another model than the rest."""
    return choice.is_everything and read_model(connection) not in (None, model)


def _note_model(connection: Connection, embedder: Embedder, choice: RowChoice, report: EmbedReport) -> None:
    """Note which model made the embeddings: all of them, or those of a database where nobody knows."""
    if not choice.is_everything and not report.counts.total():
        return
    known = "update set value = excluded.value, updated_at = now()" if choice.is_everything else "nothing"
    statement = (
        "insert into memharbor.configs (key, value)"
        " values (%s, jsonb_build_object('model', %s::text, 'dims', %s::integer))"
        f" on conflict (key) do {known}"
    )
    connection.execute(statement.encode(), (MODEL_KEY, embedder.model, embedder.dims))


def _take_ids(connection: Connection, choice: RowChoice) -> int:
    """Let the database know the ids that were chosen; counts those that no row has."""
    if choice.ids is None:
        return 0
    run_script(connection, render("migrate/chosen.sql", {"role": ROLES["service"]}))
    ids = parse_ids(choice.ids)
    while part := list(islice(ids, _BATCH)):
        connection.execute("insert into pg_temp.chosen_ids select unnest(%s::uuid[]) on conflict do nothing", (part,))
    connection.execute("analyze pg_temp.chosen_ids")
    with transaction(connection, role=ROLES["service"]):
        row = connection.execute(
            "select count(*) from pg_temp.chosen_ids c"
            " where not exists (select from memharbor.memories m where m.id = c.id)"
            " and not exists (select from memharbor.entities e where e.id = c.id)"
        ).fetchone()
    return int(row[0]) if row else 0


def _count(connection: Connection, table: str, choice: RowChoice) -> int:
    where, parameters = choice.condition(table)
    # Row level security hides everything from an administrator who is no superuser.
    with transaction(connection, role=ROLES["service"]):
        row = connection.execute(
            f"select count(*) from memharbor.{table} where {where}".encode(), parameters
        ).fetchone()
    return int(row[0]) if row else 0


def _pages(connection: Connection, table: str, choice: RowChoice, *, lock: bool = False) -> Iterator[_Page]:
    """
    Read rows in pages by the primary key, so that no transaction stays open while an endpoint answers.

    With `lock`, in a transaction of the caller, nobody changes a row any more that was read.
    """
    after: uuid.UUID | None = None
    while True:
        where, parameters = choice.condition(table, after)
        query = (
            f"select id, coalesce(payload ->> 'data', ''), {VECTOR_COLUMNS[table]} is not null from memharbor.{table}"
            f" where {where} order by id limit {_BATCH}{' for no key update' if lock else ''}"
        )
        with transaction(connection, role=ROLES["service"]):
            part = connection.execute(query.encode(), parameters).fetchall()
        if not part:
            return
        yield part
        after = part[-1][0]


def _put(
    connection: Connection,
    settings: Settings,
    embedder: Embedder,
    table: str,
    part: _Page,
    report: EmbedReport,
    *,
    clears: bool,
) -> None:
    column = VECTOR_COLUMNS[table]
    kind = f"{VECTOR_SCHEMA}.{settings.embedding_type}({settings.embedding_dims})"
    put = f"update memharbor.{table} set {column} = %b::{VECTOR_SCHEMA}.vector::{kind} where id = %s".encode()
    clear = f"update memharbor.{table} set {column} = null where id = any(%s)".encode()
    # Every one of them is in the cache by now, but those that were written since.
    answers = embedder.embed([text for _, text, _ in part])
    good, bad = [], []
    for (row_id, _, is_embedded), answer in zip(part, answers, strict=True):
        if isinstance(answer, EmbeddingRefusal):
            report.refuse(table, row_id, answer)
            bad += [row_id] if is_embedded else []
        else:
            good.append((answer, row_id))
    with connection.cursor() as cursor:
        cursor.executemany(put, good)
    report.counts[table] += len(good)
    if clears and bad:
        connection.execute(clear, (bad,))
        report.cleared += len(bad)
