"""
Embed memories that are in the database: those that have no embedding, or all of them anew by another model.

Everything is embedded first, into the cache, and put in place afterwards in one transaction: a search never meets
embeddings of two models, and a run that is killed has paid for nothing in vain.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from memharbor.database import Connection, transaction, translated_errors
from memharbor.errors import StateRefusedError
from memharbor.migrate.embedding.model import Embedder, EmbeddingRefusal
from memharbor.migrate.load import know_vectors
from memharbor.migrate.runs import MODEL_KEY
from memharbor.names import ROLES
from memharbor.output import Output
from memharbor.schema.migrations import VECTOR_SCHEMA
from memharbor.settings import Settings

Filter = Literal["missing", "all"]
_BATCH = 1000
_CONDITIONS = {"missing": "embedding is null", "all": "true"}
# The text that is embedded: a memory's, or an entity's.
_TABLES = {"memories": ("embedding", "payload ->> 'data'"), "entities": ("vector", "payload ->> 'data'")}


@dataclass
class EmbedReport:
    """How many rows were (or would be) embedded, and which were refused: table, id, reason."""

    counts: dict[str, int] = field(default_factory=dict)
    refused: list[dict[str, str]] = field(default_factory=list)

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        return {"embedded": sum(self.counts.values()), "tables": self.counts, "refused": self.refused}


def embed_rows(
    connection: Connection,
    settings: Settings,
    embedder: Embedder | None,
    output: Output,
    *,
    only: Filter = "missing",
    user_id: str | None = None,
) -> EmbedReport:
    """
    Embed rows.

    Args:
        connection: Straight to the database, as its administrator; in autocommit.
        settings: Of the schema.
        embedder: Makes the embeddings; `None` only counts.
        output: Where progress is said.
        only: Which rows.
        user_id: Only this user's.

    Raises:
        StateRefusedError: The text of a row was changed meanwhile; nothing was changed, and the same call goes on.
        ConnectError: The endpoint or the database does not answer; the same call goes on.
    """
    report = EmbedReport()
    know_vectors(connection)
    with translated_errors("embedding"):
        for table in _TABLES:
            report.counts[table] = _count(connection, table, only, user_id)
        if embedder is None:
            return report
        total, done = sum(report.counts.values()), 0
        with output.step(f"Embed {total:,} texts"), output.percent() as on_percent:
            for table in _TABLES:
                for part in _texts(connection, table, only, user_id):
                    embedder.embed([text for _, text in part])
                    done += len(part)
                    on_percent(100 * done / max(total, 1))
        with output.step("Put the embeddings in place"), transaction(connection):
            connection.execute("set local statement_timeout = 0")
            connection.execute("select pg_catalog.set_config('role', %s, true)", (ROLES["service"],))
            for table in _TABLES:
                report.counts[table] = _put(connection, settings, embedder, table, only, user_id, report)
            if only == "all" and user_id is None:
                connection.execute(
                    "insert into memharbor.configs (key, value) values (%s, jsonb_build_object('model', %s::text, 'dims',"
                    " %s::integer)) on conflict (key) do update set value = excluded.value, updated_at = now()",
                    (MODEL_KEY, embedder.model, embedder.dims),
                )
    return report


def _where(table: str, only: Filter, user_id: str | None) -> tuple[str, list[str]]:
    column, text = _TABLES[table]
    condition = f"{text} is not null and {_CONDITIONS[only].replace('embedding', column)}"
    return (f"{condition} and payload ->> 'user_id' = %s", [user_id]) if user_id else (condition, [])


def _count(connection: Connection, table: str, only: Filter, user_id: str | None) -> int:
    where, parameters = _where(table, only, user_id)
    query = f"select count(*) from memharbor.{table} where {where}".encode()
    # Row level security hides everything from an administrator who is no superuser.
    with transaction(connection, role=ROLES["service"]):
        row = connection.execute(query, parameters).fetchone()
    return int(row[0]) if row else 0


def _texts(
    connection: Connection, table: str, only: Filter, user_id: str | None
) -> Iterator[Sequence[tuple[uuid.UUID, str]]]:
    """Read ids and texts in pages by the primary key, so that no transaction stays open while an endpoint answers."""
    where, parameters = _where(table, only, user_id)
    after = uuid.UUID(int=0)
    while True:
        query = f"select id, {_TABLES[table][1]} from memharbor.{table} where {where} and id > %s order by id limit {_BATCH}"
        with transaction(connection, role=ROLES["service"]):
            part = connection.execute(query.encode(), [*parameters, after]).fetchall()
        if not part:
            return
        yield part
        after = part[-1][0]


def _put(
    connection: Connection,
    settings: Settings,
    embedder: Embedder,
    table: str,
    only: Filter,
    user_id: str | None,
    report: EmbedReport,
) -> int:
    column, text = _TABLES[table]
    kind = f"{VECTOR_SCHEMA}.{settings.embedding_type}({settings.embedding_dims})"
    statement = (
        f"update memharbor.{table} set {column} = %b::{VECTOR_SCHEMA}.vector::{kind} where id = %s and {text} = %s"
    ).encode()
    count = 0
    for part in _texts(connection, table, only, user_id):
        # Every one of them is in the cache by now, but those that were written since.
        answers = embedder.embed([each for _, each in part])
        good = []
        for (row_id, body), answer in zip(part, answers, strict=True):
            if isinstance(answer, EmbeddingRefusal):
                report.refused.append({"table": table, "id": str(row_id), "reason": answer.reason})
            else:
                good.append((answer, row_id, body))
        with connection.cursor() as cursor:
            cursor.executemany(statement, good)
            if cursor.rowcount != len(good):
                raise StateRefusedError(
                    "memories were changed meanwhile, and nothing was", hint="the same command again"
                )
        count += len(good)
    return count
