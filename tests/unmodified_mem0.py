"""
Unmodified Mem0 for the tests: the pinned release, configured in the two ways that Memharbor supports.

As `service`, Mem0 gets a connection string and opens its own pool; as `app`, it gets one `user_pool` per user over a
shared pool. Nothing of Mem0 is patched: its embedder and model are reached through `OPENAI_BASE_URL`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from psycopg_pool import ConnectionPool

from memharbor.embedder import ANY_KEY
from memharbor.mem0 import user_pool
from tests.openai_stub import OpenAIStub

Role = Literal["service", "app"]


@cache
def memory_class() -> Any:
    """Import Mem0's `Memory`, without telemetry and without a folder in the home directory."""
    os.environ.setdefault("MEM0_TELEMETRY", "False")
    os.environ.setdefault("MEM0_DIR", tempfile.mkdtemp(prefix="memharbor-mem0-"))
    from mem0 import Memory

    return Memory


@dataclass
class Memories:
    """
    Mem0 in one role, on one collection of one database.

    `of(user_id)` is the Mem0 that an application would use for that user: one for everybody as service, one each as app.
    """

    role: Role
    dsn: str
    dims: int
    collection: str
    folder: Path
    stub: OpenAIStub
    _made: dict[str, Any] = field(default_factory=dict)
    _pool: ConnectionPool[Any] | None = None

    def of(self, user_id: str) -> Any:
        """Get the Mem0 that acts for a user."""
        key = user_id if self.role == "app" else ""
        if key not in self._made:
            self._made[key] = memory_class().from_config(self.config(user_id))
        return self._made[key]

    def config(self, user_id: str) -> dict[str, Any]:
        """Write the configuration as Mem0's documentation has it."""
        where: dict[str, Any] = {"connection_string": self.dsn}
        if self.role == "app":
            self._pool = self._pool or ConnectionPool(self.dsn, min_size=1, max_size=8, open=True)
            where = {"connection_pool": user_pool(self._pool, user_id)}
        return {
            "vector_store": {
                "provider": "pgvector",
                "config": {"collection_name": self.collection, "embedding_model_dims": self.dims, **where},
            },
            "embedder": {
                "provider": "openai",
                "config": {"model": "text-embedding-3-small", "embedding_dims": self.dims},
            },
            "history_db_path": str(self.folder / f"history-{len(self._made)}.db"),
        }

    def forget(self, user_id: str) -> None:
        """Let go of one user's Mem0, whose stores then close what they were given."""
        memory = self._made.pop(user_id)
        for closed in (memory, memory.embedding_model.client, memory.llm.client):
            closed.close()

    def close(self) -> None:
        """Close what Mem0 opened; it would do so itself when it is garbage."""
        for memory in self._made.values():
            for store in (memory.vector_store, memory._entity_store):
                if store is not None:
                    store.connection_pool.close()
        for key in list(self._made):
            self.forget(key)
        if self._pool is not None:
            self._pool.close()


@contextmanager
def unmodified_mem0(role: Role, dsn: str, *, dims: int, collection: str = "mem0") -> Iterator[Memories]:
    """Run Mem0 against a database, with a stand-in for OpenAI."""
    with ExitStack() as stack:
        stub = stack.enter_context(OpenAIStub(dims))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memharbor-mem0-")))
        environ = {"OPENAI_BASE_URL": stub.base_url, "OPENAI_API_KEY": ANY_KEY}
        stack.enter_context(mock.patch.dict(os.environ, environ))
        for name in ("OPENAI_API_BASE", "OPENROUTER_API_KEY"):
            os.environ.pop(name, None)
        memories = Memories(role, dsn, dims, collection, folder, stub)
        stack.callback(memories.close)
        yield memories
