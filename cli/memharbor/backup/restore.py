"""
Carry a restore plan out, in place: pause, keep a way back, restore with delta, replay, verify, resume.

What can be refused was refused in `memharbor.backup.plan`. Until PostgreSQL is stopped every failure, Ctrl-C included,
lets the clients go on as if nothing had been. After that a failure leaves the database down and the pool paused, says
so, and the same command goes on from there: a delta restore only fetches what differs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from memharbor.backup.engine import BackupEngine, percent_reader
from memharbor.backup.plan import RestorePlan
from memharbor.backup.wal import SEGMENT_BYTES, format_lsn, parse_history
from memharbor.containers import Containers
from memharbor.errors import ExternalToolError, MemharborError, StateRefusedError, VerificationError
from memharbor.output import Output
from memharbor.pooler import Pooler
from memharbor.server_files.postgres import DATA_DIRECTORY

RECOVERY_TIMEOUT_SECONDS = 3600
ARCHIVE_TIMEOUT_SECONDS = 120

# Runs in a job that has the stopped server's volumes, and takes the same lock as the server's entrypoint.
# WAL that the archive does not have (the server went down before it was archived) is put back beside the restored files:
# replay takes it from there where the archive has none. The copy is complete once it has its name, and is kept until
# the restore has been verified, so that a restore that is stopped and run again still has it.
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

    def as_data(self) -> dict[str, Any]:
        """Describe the restore for `--output json`."""
        return {
            **self.plan.as_data(),
            "reached_lsn": format_lsn(self.reached_lsn),
            "new_timeline": self.timeline,
            "undo_point": self.undo_point,
            "dropped_clients_of": self.dropped_clients_of,
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
    """

    def __init__(
        self, engine: BackupEngine, containers: Containers, pooler: Pooler, databases: list[str], output: Output
    ) -> None:
        self._engine = engine
        self._container = engine.container
        self._containers = containers
        self._pooler = pooler
        self._databases = databases
        self._output = output
        self._seconds: dict[str, float] = {}
        self._undo_point: str | None = None

    def run(self, plan: RestorePlan) -> RestoreReport:
        """
        Restore in place.

        Raises:
            StateRefusedError: The present state could not be archived; nothing was changed.
            ExternalToolError: pgBackRest or PostgreSQL failed; the database is down and the pool paused.
            VerificationError: Less was reached than asked for; the pool stays paused.
        """
        try:
            dropped = self._timed("Pause the pool", lambda: self._pooler.pause(self._databases))
            has_way_back = self._keep_way_back()
        except BaseException:
            self._pooler.resume(self._databases)
            raise
        try:
            timeline, reached = self._replace(plan, keep_wal=not has_way_back)
        except MemharborError as exc:
            raise self._with_consequences(exc) from exc
        except BaseException:
            self._output.note(f"the database is not open and the pool is paused: {self._next_step()}")
            raise
        self._timed("Resume the pool", lambda: self._pooler.resume(self._databases))
        return RestoreReport(plan, self._undo_point, reached, timeline, dropped, self._seconds)

    def _replace(self, plan: RestorePlan, *, keep_wal: bool) -> tuple[int, int]:
        self._timed("Stop PostgreSQL", lambda: self._containers.stop(self._container))
        self._timed(f"Restore backup {plan.backup.id}", lambda: self._restore_files(plan, keep_wal=keep_wal))
        self._containers.start(self._container)
        self._timed(f"Replay to {plan.target}", self._wait_until_open)
        timeline, reached = self._verify(plan)
        self._tidy_up()
        return timeline, reached

    def _with_consequences(self, exc: MemharborError) -> MemharborError:
        """Say what a failure leaves behind. A refusal in the middle is a failure: files may have been replaced."""
        kind = type(exc) if isinstance(exc, ExternalToolError | VerificationError) else ExternalToolError
        hints = [self._next_step(), *exc.hints[:1]]
        message = f"{exc.message}\nclients wait at the paused pool"
        if isinstance(exc, VerificationError):
            message += "\nthe database is open at what was reached; look at it before clients do"
            hints = [f"to accept what was reached: docker restart {name}" for name in self._pooler.names[:1]]
            if self._undo_point is not None:
                hints.insert(0, self._next_step())
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

    def _query(self, statement: str) -> str:
        command = ["psql", "--no-psqlrc", "--tuples-only", "--no-align", "--dbname=postgres", "--command", statement]
        done = self._containers.execute(self._container, command)
        if done.exit_code != 0:
            raise ExternalToolError(f"PostgreSQL refused `{statement}`: {done.last_words}")
        return done.stdout.strip()

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
        self._query(f"select pg_create_restore_point('{name}')")
        # Recovery to a moment ends at the first commit after it. On a server where nothing was written since there is
        # none, and PostgreSQL would refuse to open: taking a transaction id makes one.
        self._query("select pg_current_xact_id()")
        self._timed("Archive what was written last", self._archive_rest)
        self._undo_point = name
        return True

    def _archive_rest(self) -> None:
        segment = self._query("select pg_walfile_name(pg_switch_wal())")
        # The segment's name is PostgreSQL's own answer.
        is_archived = f"select coalesce(last_archived_wal >= '{segment}', false) from pg_stat_archiver"  # noqa: S608
        deadline = time.monotonic() + ARCHIVE_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if self._query(is_archived) == "t":
                return
            time.sleep(0.2)
        raise StateRefusedError(
            f"WAL segment {segment} did not reach the archive within {ARCHIVE_TIMEOUT_SECONDS} seconds,"
            " so that the restore could not be undone",
            hint=["run `memharbor doctor`", f"to restore all the same: docker stop {self._container}"],
        )

    def _restore_files(self, plan: RestorePlan, *, keep_wal: bool) -> None:
        script = f"KEEP_WAL={'yes' if keep_wal else 'no'}\n{_RESTORE_FILES}"
        command = ["sh", "-c", script, "restore", *self._engine.restore_command(plan.backup, plan.options)]
        with self._output.percent() as on_percent:
            done = self._containers.run_job(
                self._container, command, owns_data=True, on_line=percent_reader(on_percent)
            )
        if done.exit_code != 0:
            raise ExternalToolError(f"`pgbackrest restore` failed with exit code {done.exit_code}:\n{done.last_words}")

    def _wait_until_open(self) -> None:
        deadline = time.monotonic() + RECOVERY_TIMEOUT_SECONDS
        probe = ["psql", "--no-psqlrc", "-tA", "--dbname=postgres", "--command", "select pg_is_in_recovery()"]
        while time.monotonic() < deadline:
            fatal = [
                line
                for line in self._containers.logs_of_this_run(self._container).splitlines()
                if _SERVER_FATAL.search(line)
            ]
            running = self._containers.is_running(self._container)
            if fatal or not running:
                self._containers.stop(self._container)
                raise ExternalToolError(
                    f"PostgreSQL did not recover: {fatal[-1] if fatal else 'its container ended'}",
                    hint="without `--at` and `--name` it recovers to the end of the archive",
                )
            done = self._containers.execute(self._container, probe)
            if done.exit_code == 0 and done.stdout.strip() == "f":
                return
            time.sleep(0.3)
        raise ExternalToolError(f"PostgreSQL is still replaying after {RECOVERY_TIMEOUT_SECONDS} seconds")

    def _verify(self, plan: RestorePlan) -> tuple[int, int]:
        # Right after promotion the control file may still name the old timeline: a checkpoint makes it the new one.
        self._query("checkpoint")
        timeline = int(self._query("select timeline_id from pg_control_checkpoint()"))
        history = parse_history(self._query(f"select pg_read_file('pg_wal/{timeline:08X}.history')"))
        reached = history[max(history)]
        if plan.target_lsn is not None and reached < plan.target_lsn:
            raise VerificationError(
                f"recovery ended at {format_lsn(reached)}, before {plan.target} at {format_lsn(plan.target_lsn)}"
            )
        # To the end may end inside the last segment; before it, WAL is missing or damaged and rows are lost.
        if plan.end is not None and reached < plan.end.number * SEGMENT_BYTES:
            raise VerificationError(
                f"recovery ended at {format_lsn(reached)}, but the archive goes on to segment {plan.end.name}"
            )
        return timeline, reached

    def _tidy_up(self) -> None:
        # pgBackRest leaves the target in postgresql.auto.conf, which no server of ours may carry (docs/adr/0006).
        script = f": > {DATA_DIRECTORY}/postgresql.auto.conf && rm -rf {DATA_DIRECTORY}/../wal-before-restore"
        done = self._containers.execute(self._container, ["sh", "-c", script])
        if done.exit_code != 0:
            raise ExternalToolError(f"the recovery settings could not be cleared: {done.last_words}")
        self._query("select pg_reload_conf()")
