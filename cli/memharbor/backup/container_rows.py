"""
Rows of a server that only its own container can reach: one without a network, or one that clients are kept out of.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from memharbor.backup.rows import RowSource
from memharbor.containers import Containers
from memharbor.errors import DatabaseError


@dataclass(frozen=True)
class ContainerRows(RowSource):
    """
    Rows of a database whose server runs in a container, read beside it as its superuser.

    Every statement is a session of its own. psql reads it: what looks like one of its variables, `:name` outside of quotes,
    must not be in it.

    Args:
        containers: The Docker engine.
        container: The server's container.
        database: The database.
        prelude: Statements before each one, for instance ``set role``.
    """

    containers: Containers
    container: str
    database: str
    prelude: str = ""

    def query(self, statement: str) -> list[tuple[str | None, ...]]:
        """
        Run one statement; see `RowSource`. It may write.

        Raises:
            DatabaseError: PostgreSQL refused it.
        """
        # Rows end with a zero byte, which no value can hold; what stands between values and for null is drawn anew.
        between, null = f"|{secrets.token_hex(16)}|", f"null{secrets.token_hex(16)}"
        form = ["--no-align", "--tuples-only", "--record-separator-zero", "--field-separator", between]
        done = self.containers.execute(
            self.container, self._psql(*form, f"--pset=null={null}"), stdin=self._text(statement)
        )
        if done.exit_code != 0:
            raise DatabaseError(f"reading rows in container `{self.container}`: {done.last_words}")
        rows = done.stdout.split("\0")[:-1]
        return [tuple(None if value == null else value for value in row.split(between)) for row in rows]

    def copy_out(self, statement: str) -> Iterator[bytes]:
        """
        Run ``COPY … TO STDOUT``; see `RowSource`.

        Raises:
            ExternalToolError: PostgreSQL refused it; said at the end.
        """
        return self.containers.stream(self.container, self._psql(), stdin=self._text(statement))

    def _psql(self, *options: str) -> list[str]:
        command = ["psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--dbname", self.database]
        return [*command, *options, "--file=-"]

    def _text(self, statement: str) -> bytes:
        # By standard input: arguments are limited, and everybody sees them.
        return f"set client_encoding = 'UTF8';\n{self.prelude}\n{statement}\n;\n".encode()
