"""
The one piece of Memharbor that runs inside an application: unmodified Mem0 under row level security.

Mem0 takes any object as `connection_pool` and asks it for `connection()`. `user_pool` returns such an object, bound to
one user: it sets `app.user_id` inside each transaction, so the policies of Memharbor's tables decide what Mem0 sees,
through a transaction pooler too. Build one light `Memory` per user over one shared pool.

    pool = ConnectionPool(os.environ["MEMHARBOR_APP_DSN"], open=True)
    config = {"vector_store": {"provider": "pgvector", "config": {"connection_pool": user_pool(pool, "alice")}}}
    memory = Memory.from_config(config)

The user is bound to the object and not taken from a context variable, because Mem0 searches its entities in threads of
its own, which a context variable does not reach. This module imports neither Mem0 nor a driver. What it protects from
is a missing filter and a wrong id, not a hostile user with SQL access as the same role.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from memharbor.errors import ConfigError

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg_pool import ConnectionPool


class UserPool:
    """
    Lend a pool's connections with one user's identity set; made by `user_pool`.

    It has what Mem0's pgvector store calls on a pool, and nothing else.
    """

    def __init__(self, pool: ConnectionPool[Any], user_id: str) -> None:
        self._pool = pool
        self._user_id = user_id

    @contextmanager
    def connection(self, timeout: float | None = None) -> Iterator[Connection[Any]]:
        """
        Lend a connection in a transaction of the user's own.

        The transaction is committed at the end of the block, or rolled back by an error. The identity ends with it:
        what runs after a `commit()` of one's own, in the same block, belongs to nobody and sees nothing.

        Args:
            timeout: Seconds to wait for a free connection; the pool's own timeout by default.

        Raises:
            ConfigError: The pool's connections are in autocommit, where an identity would end at once.
        """
        with self._pool.connection(timeout=timeout) as connection:
            if connection.autocommit:
                raise ConfigError(
                    "the connections of this pool are in autocommit, where no identity can be set for a transaction",
                    hint="build the pool without `autocommit=True`",
                )
            connection.execute("select set_config('app.user_id', %s, true)", (self._user_id,))
            yield connection

    def close(self) -> None:
        """Leave the shared pool open: Mem0 closes what it was given when one `Memory` is garbage."""

    def __deepcopy__(self, memo: dict[int, Any]) -> UserPool:
        """Return itself: Mem0 copies its configuration for the entity store, which must keep this user's pool."""
        return self

    def __repr__(self) -> str:
        """Name the user, never the connection."""
        return f"{type(self).__name__}(user_id={self._user_id!r})"


def user_pool(pool: ConnectionPool[Any], user_id: str) -> UserPool:
    """
    Bind a shared psycopg pool to one user, for Mem0's `connection_pool`.

    Args:
        pool: The application's pool, with the app role's DSN; it stays the application's to close.
        user_id: The same value that Mem0 is given as `user_id`.

    Raises:
        TypeError: The user is not a text, for instance `None`.
        ValueError: The user is empty (which is nobody), begins or ends with white space (which Mem0 strips, so that the
            policies would refuse what it writes) or holds a NUL (which PostgreSQL cannot store).

    >>> user_pool(None, "")
    Traceback (most recent call last):
    ...
    ValueError: user_id is empty: an empty user is nobody
    """
    if not isinstance(user_id, str):
        raise TypeError(f"user_id must be a str, not {type(user_id).__name__}")
    if not user_id:
        raise ValueError("user_id is empty: an empty user is nobody")
    if user_id != user_id.strip():
        raise ValueError(f"user_id {user_id!r} begins or ends with white space, which Mem0 strips")
    if "\0" in user_id:
        raise ValueError("user_id holds a NUL, which PostgreSQL cannot store")
    return UserPool(pool, user_id)
