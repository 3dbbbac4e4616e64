"""
PgBouncer's admin console, reached over its socket inside its own container.

Source: PgBouncer usage manual, Admin console. PAUSE waits until the present transactions are done and keeps clients
waiting instead of failing them; KILL drops connections at once and also keeps new ones waiting until RESUME.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from memharbor.containers import Containers, Finished
from memharbor.errors import ExternalToolError
from memharbor.server_files.postgres import POOLER_PORT, POOLER_SOCKET_DIRECTORY
from memharbor.templates import ident


class Pooler:
    """
    Steer the stack's PgBouncers as one.

    Args:
        containers: The Docker engine that runs the stack.
        names: The PgBouncer containers.
    """

    def __init__(self, containers: Containers, names: Sequence[str]) -> None:
        self._containers = containers
        self.names = tuple(names)

    def pause(self, databases: Sequence[str], *, timeout_seconds: int = 30) -> list[str]:
        """
        Let present transactions end, then keep every client waiting; who does not end in time is dropped.

        A pooler that does not run keeps every client out by itself and is left alone.

        Args:
            databases: PgBouncer's database names.
            timeout_seconds: How long a transaction may take to its end.

        Returns:
            The databases whose clients had to be dropped.
        """
        dropped = []
        for name in filter(self._containers.is_running, self.names):
            for database in databases:
                wait = self._run(name, f"pause {ident(database)}", timeout_seconds=timeout_seconds)
                if wait.exit_code != 0 and "already" not in wait.stderr:
                    self._console(name, f"kill {ident(database)}")
                    dropped.append(database)
        return sorted(set(dropped))

    def resume(self, databases: Sequence[str]) -> None:
        """Let the waiting clients go on; databases that are not paused are left alone."""
        for name in filter(self._containers.is_running, self.names):
            paused = {row["name"] for row in self._rows(name, "show databases") if row["paused"] == "1"}
            for database in databases:
                if database in paused:
                    self._console(name, f"resume {ident(database)}")

    def show(self, what: str) -> list[dict[str, str]]:
        """Read one of PgBouncer's `SHOW` tables, for instance `pools`, from every PgBouncer."""
        return [{"pooler": name, **row} for name in self.names for row in self._rows(name, f"show {what}")]

    def _rows(self, name: str, statement: str) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(self._console(name, statement).stdout)))

    def _console(self, name: str, statement: str) -> Finished:
        done = self._run(name, statement)
        if done.exit_code != 0:
            raise ExternalToolError(
                f"PgBouncer refused `{statement}`: {done.last_words}", hint=f"run `docker logs {name}`"
            )
        return done

    def _run(self, name: str, statement: str, *, timeout_seconds: int = 30) -> Finished:
        return self._containers.execute(
            name,
            [
                "timeout",
                str(timeout_seconds),
                "psql",
                "--no-psqlrc",
                "--csv",
                "--host",
                POOLER_SOCKET_DIRECTORY,
                "--port",
                str(POOLER_PORT),
                "--username",
                "pgbouncer",
                "--command",
                statement,
                "pgbouncer",
            ],
        )
