"""Let a connection send embeddings as pgvector takes them."""

from __future__ import annotations

from collections.abc import Sequence

from psycopg.adapt import Dumper
from psycopg.pq import Format
from psycopg.types import TypeInfo

from memharbor.database import Connection
from memharbor.errors import StateRefusedError
from memharbor.migrate.vector import Vector
from memharbor.schema.migrations import VECTOR_SCHEMA


class _VectorDumper(Dumper):
    """Sends an embedding as pgvector reads it."""

    format = Format.BINARY

    def dump(self, embedding: Sequence[float]) -> bytes:
        return Vector.of(embedding).sent()


def know_vectors(connection: Connection) -> None:
    """Let COPY BINARY send embeddings."""
    info = TypeInfo.fetch(connection, f"{VECTOR_SCHEMA}.vector")
    if info is None:
        raise StateRefusedError("the database has no pgvector", hint="ansible-playbook ansible/playbooks/site.yml")
    info.register(connection)
    dumper = type("VectorDumper", (_VectorDumper,), {"oid": info.oid})
    for kind in (tuple, Vector):
        connection.adapters.register_dumper(kind, dumper)
