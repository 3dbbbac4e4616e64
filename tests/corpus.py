"""
20,000 memories of 50 users, made from real sentences: the same on every machine and in every run.

One user has 6,000 memories, more than the threshold of an index of its own; the others share the rest as users do, from
about 1,400 down to about 100. Users come interleaved, in the order of time. Where the sentences are from: `tests/data/README.md`.
"""

from __future__ import annotations

import hashlib
import lzma
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memharbor.embedder import embed
from memharbor.settings import VECTOR_PLAIN_DIMS_MAX

if TYPE_CHECKING:
    from psycopg import Connection

SENTENCES = Path(__file__).parent / "data" / "sentences.tsv.xz"
NAMESPACE = uuid.UUID("6f1d3a52-9d0c-5d0e-8f9d-2b1a0c7e4d11")
USERS = tuple(f"user-{number:02d}" for number in range(50))
HEAVY_USER = USERS[0]
HEAVY_ROW_COUNT = 6_000
ROW_COUNT = 20_000
BEGIN_AT = datetime(2024, 1, 1, tzinfo=UTC)
CATEGORIES = ("family", "health", "home", "travel", "work")
SOURCES = ("chat", "email", "import")


@dataclass(frozen=True)
class CorpusMemory:
    """One memory, with what both of Mem0's and the canonical columns need."""

    id: uuid.UUID
    user_id: str
    agent_id: str | None
    run_id: str | None
    memory: str
    metadata: dict[str, Any]
    categories: tuple[str, ...]
    created_at: datetime

    @property
    def payload(self) -> dict[str, Any]:
        """The payload as Mem0 writes it: identity where there is one, metadata flattened at the top."""
        at = self.created_at.isoformat()
        ids = {"user_id": self.user_id, "agent_id": self.agent_id, "run_id": self.run_id}
        return {
            "data": self.memory,
            "hash": hashlib.md5(self.memory.encode(), usedforsecurity=False).hexdigest(),
            "text_lemmatized": self.memory.lower(),
            "created_at": at,
            "updated_at": at,
            "categories": list(self.categories),
            **{name: value for name, value in ids.items() if value is not None},
            **self.metadata,
        }


@cache
def memories() -> tuple[CorpusMemory, ...]:
    """All 20,000 memories, oldest first."""
    with lzma.open(SENTENCES, "rt", encoding="utf-8") as lines:
        sentences = [line.rstrip("\n").split("\t", 1) for line in lines]
    owners = [user for user, count in row_counts().items() for _ in range(count)]
    owners = [owners[place] for place in _mixed(len(owners), "owner")]
    places = _mixed(len(sentences), "sentence")
    return tuple(_memory(number, owners[number], *sentences[places[number]]) for number in range(ROW_COUNT))


def of_user(user_id: str) -> list[CorpusMemory]:
    """One user's memories, oldest first."""
    return [memory for memory in memories() if memory.user_id == user_id]


@cache
def row_counts() -> dict[str, int]:
    """How many memories each user has."""
    weights = [(rank + 3) ** -0.9 for rank in range(len(USERS) - 1)]
    rest = ROW_COUNT - HEAVY_ROW_COUNT
    counts = [int(rest * weight / sum(weights)) for weight in weights]
    counts[0] += rest - sum(counts)
    return dict(zip(USERS, [HEAVY_ROW_COUNT, *counts], strict=True))


def _memory(number: int, user_id: str, book: str, sentence: str) -> CorpusMemory:
    dice = hashlib.blake2b(f"memory:{number}".encode(), digest_size=8).digest()
    return CorpusMemory(
        id=uuid.uuid5(NAMESPACE, f"{user_id}:{number}"),
        user_id=user_id,
        agent_id=f"agent-{dice[0] % 3}" if dice[1] < 85 else None,
        run_id=f"run-{number // 200}" if dice[2] < 51 else None,
        memory=sentence,
        metadata={"book": book, "importance": 1 + dice[3] % 5, "source": SOURCES[dice[4] % 3]},
        categories=tuple(sorted({CATEGORIES[dice[5] % 5], CATEGORIES[dice[6] % 5]})),
        created_at=BEGIN_AT + timedelta(seconds=number * 3_000 + dice[7]),
    )


def _mixed(count: int, seed: str) -> list[int]:
    """The numbers below `count` in an order that depends on the seed only, not on Python's version."""
    return sorted(range(count), key=lambda number: hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest())


def load(connection: Connection[Any], dims: int, *, chosen: Iterable[CorpusMemory] | None = None) -> int:
    """
    Copy memories into `public.memories` by COPY BINARY into a staging table; returns their number.

    The connection is an administrator's: row level security takes no COPY, and no other role may create temporary tables.
    """
    kind = "vector" if dims <= VECTOR_PLAIN_DIMS_MAX else "halfvec"
    with connection.transaction(), connection.cursor() as cursor:
        cursor.execute("create temporary table staging (id uuid, vector real[], payload jsonb) on commit drop")
        with cursor.copy("copy staging (id, vector, payload) from stdin (format binary)") as copy:
            copy.set_types(["uuid", "float4[]", "jsonb"])
            for row in rows(dims, memories() if chosen is None else chosen):
                copy.write_row(row)
        cursor.execute(
            "insert into public.memories (id, embedding, payload)"
            f" select id, vector::{kind}({dims}), payload from staging".encode()
        )
        return cursor.rowcount


def rows(dims: int, chosen: Iterable[CorpusMemory]) -> Iterator[tuple[uuid.UUID, list[float], dict[str, Any]]]:
    """Rows for COPY: id, vector, payload."""
    for memory in chosen:
        yield memory.id, embed(memory.memory, dims), memory.payload
