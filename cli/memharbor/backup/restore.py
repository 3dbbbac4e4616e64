"""
Carry a restore plan out, in place: pause, keep a way back, restore with delta, replay, verify, resume.

What can be refused was refused in `memharbor.backup.plan`. Until PostgreSQL is stopped every failure, Ctrl-C included,
lets the clients go on as if nothing had been. After that a failure leaves the database down and the pool paused, says
so, and the same command goes on from there: a delta restore only fetches what differs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from memharbor.backup.container_rows import ContainerRows
from memharbor.backup.engine import BackupEngine, percent_reader
from memharbor.backup.plan import RestorePlan, check_reached, share_replayed
from memharbor.backup.rows import RowSource
from memharbor.backup.server import archive_present_state, ask_server, read_reached, refuse_small_disk
from memharbor.backup.wal import format_lsn, parse_lsn
from memharbor.containers import Containers
from memharbor.errors import ExternalToolError, MemharborError, StateRefusedError, VerificationError
from memharbor.output import Output
from memharbor.pooler import Pooler
from memharbor.server_files.postgres import DATA_DIRECTORY

# What is done with a restored database before clients are let in; what it returns is counted in the report.
OnOpen = Callable[[RowSource], Sequence[Any]]

RECOVERY_TIMEOUT_SECONDS = 3600

# Runs in a job that has the stopped server's volumes, and takes the same lock as the server's entrypoint.
# WAL that the archive does not have (the server went down before it was archived) is put back beside the restored files:
# replay takes it from there where the archive has none. The copy is complete once it has its name, and is kept until
# the restore has been verified, so that a restore that is stopped and run again still has it.
# The server is reached from inside its container only, until what it is has been verified: a client that does not come
# through the pool must not be earlier. Source: PostgreSQL manual, postgresql.auto.conf.
_RESTORE_FILES = """
set -eu
root=${PGDATA%/*}; kept=$root/wal-before-restore
exec 9>> "$root/lock"
flock --nonblock 9 || { echo 'another container works on this volume' >&2; exit 65; }
rm -f "$PGDATA/postmaster.pid"
mkdir -p -m 0700 "$PGDATA"
if [ "$KEEP_WAL" = yes ] && [ ! -d "$kept" ] && [ -d "$PGDATA/pg_wal" ]; then
  rm -rf "$kept.new"; mkdir -m 0700 "$kept.new"
  for file in "$PGDATA"/pg_wal/[0-9A-F]*; do
    [ -f "$file" ] || continue
    [ -e "$PGDATA/pg_wal/archive_status/${file##*/}.done" ] || cp -p "$file" "$kept.new/"
  done
  mv "$kept.new" "$kept"
fi
"$@"
echo "listen_addresses = ''" >> "$PGDATA/postgresql.auto.conf"
if [ -d "$kept" ]; then
  for file in "$kept"/*; do [ ! -f "$file" ] || cp -p "$file" "$PGDATA/pg_wal/"; done
fi
sync
"""
# A server process's own FATAL: a client's carries `user@database` before it (log_line_prefix in server_files).
_SERVER_FATAL = re.compile(r"\[\d+\] FATAL: ")


@dataclass(frozen=True)
class RestoreReport:
    """What a restore did. Times in seconds; `reached_lsn` is where the old timeline was left."""

    plan: RestorePlan
    undo_point: str | None
    reached_lsn: int
    timeline: int
    dropped_clients_of: list[str]
    seconds: dict[str, float]
    erasures_replayed: int = 0

    def as_data(self) -> dict[str, Any]:
        """Describe the restore for `--output json`."""
        return {
            **self.plan.as_data(),
            "reached_lsn": format_lsn(self.reached_lsn),
            "new_timeline": self.timeline,
            "undo_point": self.undo_point,
            "dropped_clients_of": self.dropped_clients_of,
            "erasures_replayed": self.erasures_replayed,
            "seconds": {step: round(seconds, 1) for step, seconds in self.seconds.items()},
        }


class Restore:
    """
    Carry a plan out.

    Args:
        engine: The stack's backups.
        containers: The Docker engine that runs the stack.
        pooler: The stack's PgBouncers.
        databases: PgBouncer's database names.
        output: Where progress is said.
        database: The database with the schema.
    """

    def __init__(
        self,
        engine: BackupEngine,
        containers: Containers,
        pooler: Pooler,
        databases: list[str],
        output: Output,
        *,
        database: str,
    ) -> None:
        self._engine = engine
        self._database = database
        self._query = ask_server(containers, engine.container)
        self._container = engine.container
        self._containers = containers
        self._pooler = pooler
        self._databases = databases
        self._output = output
        self._seconds: dict[str, float] = {}
        self._undo_point: str | None = None

    def run(self, plan: RestorePlan, *, on_open: OnOpen | None = None) -> RestoreReport:
        """
        Restore in place.

        Args:
            plan: What to restore.
            on_open: Called with the restored database after it was verified and before any client is let in.

        Raises:
            StateRefusedError: There is not enough disk, or the present state could not be archived; nothing was changed.
            ExternalToolError: pgBackRest or PostgreSQL failed; the database is down and the pool paused.
            VerificationError: Less was reached than asked for; the pool stays paused.
        """
        refuse_small_disk(self._engine.run_beside, plan.backup.database_bytes)
        try:
            dropped = self._timed("Pause the pool", lambda: self._pooler.pause(self._databases))
            has_way_back = self._keep_way_back()
        except BaseException:
            self._pooler.resume(self._databases)
            raise
        try:
            timeline, reached, replayed = self._replace(plan, on_open, keep_wal=not has_way_back)
        except MemharborError as exc:
            raise self._with_consequences(exc) from exc
        except BaseException:
            self._output.note(f"the database is not open and the pool is paused: {self._next_step()}")
            raise
        self._timed("Resume the pool", lambda: self._pooler.resume(self._databases))
        # Clients are served by now; a `status` that follows shall not say that the server is starting.
        self._timed("Wait for the healthcheck", lambda: self._containers.wait_until_healthy(self._container))
        return RestoreReport(plan, self._undo_point, reached, timeline, dropped, self._seconds, replayed)

    def _replace(self, plan: RestorePlan, on_open: OnOpen | None, *, keep_wal: bool) -> tuple[int, int, int]:
        self._timed("Stop PostgreSQL", lambda: self._containers.stop(self._container))
        self._timed(f"Restore backup {plan.backup.id}", lambda: self._restore_files(plan, keep_wal=keep_wal))
        self._containers.start(self._container)
        self._timed(f"Replay to {plan.target}", lambda: self._wait_until_open(plan))
        timeline, reached = read_reached(self._query)
        check_reached(plan, reached)
        replayed = 0
        if on_open is not None:
            rows = ContainerRows(self._containers, self._container, self._database)
            replayed = len(self._timed("Replay erasures", lambda: on_open(rows)))
        self._timed("Let clients in again", lambda: self._open_to_clients(plan))
        return timeline, reached, replayed

    def _with_consequences(self, exc: MemharborError) -> MemharborError:
        """Say what a failure leaves behind. A refusal in the middle is a failure: files may have been replaced."""
        kind = type(exc) if isinstance(exc, ExternalToolError | VerificationError) else ExternalToolError
        hints = [self._next_step(), *exc.hints[:1]]
        message = f"{exc.message}\nclients wait at the paused pool"
        if isinstance(exc, VerificationError):
            message += "\nthe database is open at what was reached, to commands inside its container only"
            accept = f"docker exec {self._container} sh -c ': > $PGDATA/postgresql.auto.conf'"
            restart = f"docker restart {self._container} {' '.join(self._pooler.names)}"
            hints = [self._next_step(), f"to accept what was reached: {accept} && {restart}"]
        return kind(message, hint=hints)

    def _next_step(self) -> str:
        if self._undo_point is not None:
            return f"run the command again, or go back with `memharbor restore --name {self._undo_point}`"
        return "run the command again; it goes on from here"

    def _timed(self, text: str, work: Callable[[], Any]) -> Any:
        begun_at = time.monotonic()
        with self._output.step(text):
            result = work()
        self._seconds[text] = time.monotonic() - begun_at
        return result

    def _keep_way_back(self) -> bool:
        """Name the present state and archive all of it; False where there is no server that could."""
        if not self._containers.is_running(self._container):
            self._output.note("PostgreSQL is down: what it had not archived is put back beside the restored files")
            return False
        foreign = self._engine.foreign_system_id()
        if foreign is not None:
            self._output.note(f"the present cluster (system identifier {foreign}) is not the one that was backed up")
            return True
        try:
            if self._query("select pg_is_in_recovery()") == "t":
                return True
        except (ExternalToolError, StateRefusedError) as exc:
            self._output.note(f"PostgreSQL does not answer, so that this restore cannot be undone: {exc.message}")
            return False
        name = f"memharbor-before-restore-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        self._timed("Archive what was written last", lambda: self._archive_rest(name))
        self._undo_point = name
        return True

    def _archive_rest(self, name: str) -> None:
        try:
            archive_present_state(self._query, name)
        except StateRefusedError as exc:
            raise StateRefusedError(
                f"{exc.message}, so that the restore could not be undone",
                hint=[*exc.hints, f"to restore all the same: docker stop {self._container}"],
            ) from exc

    def _restore_files(self, plan: RestorePlan, *, keep_wal: bool) -> None:
        script = f"KEEP_WAL={'yes' if keep_wal else 'no'}\n{_RESTORE_FILES}"
        command = ["sh", "-c", script, "restore", *self._engine.restore_command(plan.backup, plan.options)]
        with self._output.percent(plan.backup.database_bytes) as on_percent:
            done = self._containers.run_job(
                self._container, command, owns_data=True, on_line=percent_reader(on_percent)
            )
        if done.exit_code != 0:
            raise ExternalToolError(f"`pgbackrest restore` failed with exit code {done.exit_code}:\n{done.last_words}")

    def _wait_until_open(self, plan: RestorePlan) -> None:
        deadline = time.monotonic() + RECOVERY_TIMEOUT_SECONDS
        with self._output.percent() as on_percent:
            while time.monotonic() < deadline:
                if self._is_open(plan, on_percent):
                    return
                time.sleep(0.3)
        raise ExternalToolError(f"PostgreSQL is still replaying after {RECOVERY_TIMEOUT_SECONDS} seconds")

    def _is_open(self, plan: RestorePlan, on_percent: Callable[[float], None]) -> bool:
        """Tell whether the server has been promoted, and say how far it is."""
        log = self._containers.logs_of_this_run(self._container)
        fatal = [line for line in log.splitlines() if _SERVER_FATAL.search(line)]
        if fatal or not self._containers.is_running(self._container):
            self._containers.stop(self._container)
            raise ExternalToolError(
                f"PostgreSQL did not recover: {fatal[-1] if fatal else 'its container ended'}",
                hint="without `--at` and `--name` it recovers to the end of the archive",
            )
        try:
            state = self._query("select pg_is_in_recovery(), pg_last_wal_replay_lsn()").split("|")
        except (ExternalToolError, StateRefusedError):
            return False  # it does not answer yet
        if len(state) == 2 and state[1]:
            on_percent(share_replayed(plan, parse_lsn(state[1])))
        return state[0] == "f"

    def _open_to_clients(self, plan: RestorePlan) -> None:
        """Clear what the restore left in the settings, and start the server anew, so that it listens."""
        # pgBackRest leaves the target in postgresql.auto.conf, which no server of ours may carry (docs/adr/0006).
        script = f": > {DATA_DIRECTORY}/postgresql.auto.conf && rm -rf {DATA_DIRECTORY}/../wal-before-restore && sync"
        done = self._containers.execute(self._container, ["sh", "-c", script])
        if done.exit_code != 0:
            raise ExternalToolError(f"the recovery settings could not be cleared: {done.last_words}")
        self._containers.stop(self._container)
        self._containers.start(self._container)
        self._wait_until_open(plan)
