"""
Two users who exist for one validation only, and every way to act for them.

What they wrote is removed by `remove_probes`. Must not touch anybody else's memories.
"""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg_pool import ConnectionPool

from memharbor.database import Connection, connect
from memharbor.embedder import ANY_KEY, EmbeddingServer
from memharbor.mem0 import UserPool, user_pool
from memharbor.validation.results import CheckError, ValidationContext

PROBE_PREFIX = "memharbor-validate-"


class Probe:
    """
    Two users of this run, and the ways to act for them; used inside its `with` block.

    Args:
        context: What is validated.
    """

    def __init__(self, context: ValidationContext) -> None:
        self.context = context
        run_id = uuid.uuid4()
        self.alice, self.bob = (f"{PROBE_PREFIX}{run_id}-{name}" for name in ("alice", "bob"))
        # The last statement of Mem0's and its parameters.
        self.noted: tuple[sql.Composed, Any] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Probe:
        """Silence Mem0, whose log would tell of the refusals that are provoked here."""
        logger = logging.getLogger("mem0")
        self._stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL + 1)
        return self

    def __exit__(self, *_: object) -> None:
        """Close what was opened."""
        self._stack.close()

    @contextmanager
    def act_as(self, user_id: str) -> Iterator[Connection]:
        """Open a transaction of one user, as the application's role."""
        with self.as_user(user_id).connection() as connection:
            yield connection

    def as_user(self, user_id: str) -> UserPool:
        """Bind the application's pool to a user."""
        return user_pool(self.app_pool, user_id)

    @cached_property
    def app_pool(self) -> ConnectionPool[Any]:
        """The application role's pool, without a user."""
        return self._open_pool(self.context.app_dsn)

    @cached_property
    def service_pool(self) -> ConnectionPool[Any]:
        """The service role's pool."""
        return self._open_pool(self.context.service_dsn)

    def _open_pool(self, dsn: str) -> ConnectionPool[Any]:
        connect(dsn).close()  # a pool would try for half a minute, and then not say why it could not

        def note(statement: sql.Composed, parameters: Any) -> None:
            self.noted = (statement, parameters)

        kwargs = {"cursor_factory": _noting_cursor(note)}
        return self._stack.enter_context(ConnectionPool(dsn, min_size=1, max_size=4, kwargs=kwargs, open=True))

    @cached_property
    def _embedder(self) -> EmbeddingServer:
        return self._stack.enter_context(EmbeddingServer(self.context.settings.embedding_dims))

    @cached_property
    def _folder(self) -> Path:
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="memharbor-validate-")))

    def mem0(self, pool: ConnectionPool[Any] | UserPool) -> Any:
        """
        Build an unmodified Mem0 over a pool.

        Raises:
            CheckError: Mem0 is not installed.
        """
        os.environ["MEM0_TELEMETRY"] = "False"
        os.environ.setdefault("MEM0_DIR", str(self._folder / "mem0"))
        try:
            from mem0 import Memory
        except ImportError as exc:
            raise CheckError(f"Mem0 is not installed: {exc}", "pip install 'memharbor[mem0]'") from exc
        dims = self.context.settings.embedding_dims
        endpoint = {"api_key": ANY_KEY, "openai_base_url": self._embedder.base_url}
        store = {"connection_pool": pool, "embedding_model_dims": dims}
        memory = Memory.from_config(
            {
                "vector_store": {"provider": "pgvector", "config": store},
                "embedder": {"provider": "openai", "config": {**endpoint, "embedding_dims": dims}},
                "llm": {"provider": "openai", "config": endpoint},
                "history_db_path": str(self._folder / f"{uuid.uuid4()}.db"),
            }
        )
        # Held until the end: a Mem0 that is garbage closes the pool that it was given.
        for closed in (memory, memory.embedding_model.client, memory.llm.client):
            self._stack.callback(closed.close)
        return memory


def _noting_cursor(note: Callable[[sql.Composed, Any], None]) -> type[psycopg.Cursor[Any]]:
    """Make a kind of cursor that tells of every statement which Mem0 composed; ours are plain texts."""

    class NotingCursor(psycopg.Cursor[Any]):
        def execute(self, query: Any, params: Any = None, **options: Any) -> NotingCursor:
            if isinstance(query, sql.Composed):
                note(query, params)
            super().execute(query, params, **options)
            return self

    return NotingCursor


def remove_probes(probe: Probe) -> str:
    """Remove what this run wrote, and what a killed one left more than an hour ago."""
    with closing(connect(probe.context.service_dsn)) as connection:
        removed = connection.execute(
            "delete from memories where user_id = any(%s)"
            " or (user_id like %s and updated_at < now() - interval '1 hour') returning user_id",
            ([probe.alice, probe.bob], PROBE_PREFIX + "%"),
        ).fetchall()
        connection.commit()
    users = sorted({probe.alice, probe.bob, *(row[0] for row in removed)})
    detail = f"{len(removed)} memories of the probe users removed"
    with closing(connect(probe.context.admin_dsn)) as connection:
        if connection.execute("select to_regclass('memharbor.memory_history')").fetchone() == (None,):
            return detail
        connection.execute("delete from memharbor.memory_history where user_id = any(%s)", (users,))
        connection.commit()
    # An administrator who is no superuser is held by row level security: the audit trail is not theirs to change.
    with closing(connect(probe.context.service_dsn)) as connection:
        query = "select count(*) from memharbor.memory_history where user_id = any(%s)"
        ((left,),) = connection.execute(query, (users,)).fetchall()
    return detail + (f"; {left} rows of their audit trail remain, which only a superuser can delete" if left else "")
