"""
Restore a stack's database in place: plan, pause, restore with delta, replay, verify, resume.

Everything that can refuse does so in `plan_restore`, before anything is touched. A restore that is stopped in between
leaves the database down and the pool paused; the same command goes on from there, since a delta restore only fetches
what differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from memharbor.backup.engine import Backup, BackupEngine, percent_reader
from memharbor.backup.wal import (
    SEGMENT_BYTES,
    RestorePoint,
    Segment,
    format_lsn,
    newest,
    parse_history,
    parse_restore_points,
)
from memharbor.containers import Containers
from memharbor.errors import ExternalToolError, StateRefusedError, UsageError, VerificationError
from memharbor.output import Output
from memharbor.pooler import Pooler

PGDATA = "/var/lib/postgresql/18/data"
RECOVERY_TIMEOUT_SECONDS = 3600

# Prints the named restore points of segments: of the server's own where it still has them, else from the archive. Runs
# inside the container. pg_waldump fails at the end of the last record that is written, after it has said all the others.
_POINTS_OF_SEGMENTS = """
set -eu
stanza=$1; shift
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for segment in "$@"; do
  file=$PGDATA/pg_wal/$segment
  if [ ! -f "$file" ]; then
    file=$scratch/$segment
    pgbackrest --stanza="$stanza" --no-archive-async archive-get "$segment" "$file" >&2
  fi
  echo "segment $segment"
  pg_waldump --rmgr=XLOG "$file" 2>/dev/null | grep RESTORE_POINT || true
  rm -f "$scratch/$segment"
done
"""
_SEGMENTS_PER_CALL = 16


@dataclass(frozen=True)
class RestorePlan:
    """What a restore will do: from which backup, to where, and the pgBackRest options that say so."""

    backup: Backup
    timeline: int
    target: str
    options: tuple[str, ...]
    target_lsn: int | None
    newest_segment: Segment

    def as_data(self) -> dict[str, Any]:
        """Describe the plan for `--dry-run` and `--output json`."""
        return {
            "backup": self.backup.id,
            "backup_ended_at": self.backup.ended_at,
            "target": self.target,
            "target_lsn": None if self.target_lsn is None else format_lsn(self.target_lsn),
            "timeline": self.timeline,
            "newest_segment": self.newest_segment.name,
        }


def parse_instant(text: str, *, now: datetime) -> datetime:
    """
    Read `--at`: ISO 8601 with an offset, in the past.

    Raises:
        UsageError: It is not a time, has no offset, or lies in the future.

    >>> parse_instant("2026-01-02T03:04:05Z", now=datetime(2027, 1, 1, tzinfo=UTC))
    datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
    """
    try:
        at = datetime.fromisoformat(text)
    except ValueError as exc:
        raise UsageError(f"`{text}` is not a time", hint="write it as 2026-01-31T12:00:00Z") from exc
    if at.tzinfo is None:
        raise UsageError(
            f"`{text}` has no time zone", hint=f"write `{text}Z` for UTC, or an offset like `{text}+02:00`"
        )
    if at > now:
        raise UsageError(f"`{text}` lies in the future")
    return at.astimezone(UTC)


def plan_restore(engine: BackupEngine, containers: Containers, *, at: datetime | None, name: str | None) -> RestorePlan:
    """
    Decide what a restore would do, without touching anything.

    Args:
        engine: The stack's backups.
        containers: The Docker engine that runs the stack.
        at: Instant to recover to, aware UTC.
        name: Named restore point to recover to. Neither: to the end of the archive.

    Raises:
        StateRefusedError: There is nothing to restore, or the target cannot be reached from what there is.
    """
    backups = [backup for backup in engine.list_backups() if not backup.has_error]
    if not backups:
        raise StateRefusedError("there is no backup to restore", hint="run `memharbor backup create`")
    segments = engine.list_segments()
    last = newest(segments)
    if last is None:
        raise StateRefusedError(
            "the archive holds no WAL, so no backup can be made consistent", hint="run `memharbor doctor`"
        )
    if name is not None:
        return _plan_to_name(engine, containers, segments, backups, name, last)
    backup = engine.find_backup_before(timeline=last.timeline, at=at)
    if backup is None:
        first = min(backup.ended_at for backup in backups)
        raise StateRefusedError(
            f"no backup leads to {at.isoformat() if at else 'the end of the archive'}: the first one ended at {first.isoformat()}",
            hint="run `memharbor backup list`",
        )
    if at is None:
        return RestorePlan(backup, last.timeline, "the end of the archive", ("--type=default",), None, last)
    options = ("--type=time", f"--target={at:%Y-%m-%d %H:%M:%S.%f%z}", "--target-action=promote")
    return RestorePlan(backup, last.timeline, at.isoformat(), options, None, last)


def _plan_to_name(
    engine: BackupEngine,
    containers: Containers,
    segments: list[Segment],
    backups: list[Backup],
    name: str,
    last: Segment,
) -> RestorePlan:
    oldest = min(backup.start_lsn for backup in backups)
    live = [segment for segment in engine.list_live_segments() if segment.timeline >= last.timeline]
    point = find_restore_point(engine, containers, sorted({*segments, *live}), name, oldest_lsn=oldest)
    if point is None:
        raise StateRefusedError(
            f"there is no restore point `{name}` in the archive",
            hint="run `memharbor restore --at TIME`, or check the name",
        )
    backup = engine.find_backup_before(timeline=point.timeline, lsn=point.lsn)
    if backup is None:
        raise StateRefusedError(
            f"restore point `{name}` at {format_lsn(point.lsn)} lies before the end of the first backup that leads to it",
            hint="run `memharbor backup list`",
        )
    options = ("--type=name", f"--target={name}", f"--target-timeline={point.timeline}", "--target-action=promote")
    return RestorePlan(backup, point.timeline, f"restore point `{name}`", options, point.lsn, last)


def find_restore_point(
    engine: BackupEngine, containers: Containers, segments: list[Segment], name: str, *, oldest_lsn: int
) -> RestorePoint | None:
    """
    Look a named restore point up in the archived WAL, newest segment first; the newest of that name is meant.

    Reads every segment down to the point, about a tenth of a second each. `None` where there is none.
    """
    wanted = [segment for segment in reversed(segments) if (segment.number + 1) * SEGMENT_BYTES > oldest_lsn]
    for begin in range(0, len(wanted), _SEGMENTS_PER_CALL):
        names = [segment.name for segment in wanted[begin : begin + _SEGMENTS_PER_CALL]]
        command = ["sh", "-c", _POINTS_OF_SEGMENTS, "points", engine.stanza, *names]
        running = containers.is_running(engine.container)
        done = (containers.execute if running else containers.run_job)(engine.container, command)
        if done.exit_code != 0:
            raise ExternalToolError(
                f"the archived WAL cannot be read:\n{done.last_words}", hint="run `memharbor doctor`"
            )
        for part in f"\n{done.stdout}".split("\nsegment ")[1:]:
            segment_name, _, waldump = part.partition("\n")
            points = parse_restore_points(int(segment_name[:8], 16), waldump)
            found = [point for point in points if point.name == name]
            if found:
                return found[-1]
    return None


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
        self,
        engine: BackupEngine,
        containers: Containers,
        pooler: Pooler,
        databases: list[str],
        output: Output,
    ) -> None:
        self._engine = engine
        self._containers = containers
        self._pooler = pooler
        self._databases = databases
        self._output = output
        self._seconds: dict[str, float] = {}

    def run(self, plan: RestorePlan) -> RestoreReport:
        """
        Restore in place.

        Raises:
            ExternalToolError: pgBackRest or PostgreSQL failed; the pool stays paused, and the error says how to go on.
            VerificationError: Less was reached than asked for; the pool stays paused.
        """
        container = self._engine.container
        dropped = self._timed("Pause the pool", lambda: self._pooler.pause(self._databases))
        try:
            undo_point = self._keep_way_back()
        except BaseException:
            self._pooler.resume(self._databases)
            raise
        # From here on the database is down; an error says which command goes on.
        try:
            self._timed("Stop PostgreSQL", lambda: self._stop(container))
            self._timed(f"Restore backup {plan.backup.id}", lambda: self._restore_files(plan))
            begun_at = time.time()
            self._containers.start(container)
            self._timed(f"Replay to {plan.target}", lambda: self._wait_until_open(begun_at))
            timeline, reached = self._verify(plan)
            self._clear_recovery_settings()
        except (ExternalToolError, VerificationError, StateRefusedError) as exc:
            raise type(exc)(
                f"{exc.message}\nthe pool is still paused, clients wait",
                hint=["run `memharbor restore` again; it goes on from here", *exc.hints[:1]],
            ) from exc
        self._timed("Resume the pool", lambda: self._pooler.resume(self._databases))
        return RestoreReport(plan, undo_point, reached, timeline, dropped, self._seconds)

    def _timed(self, text: str, work: Callable[[], Any]) -> Any:
        begun_at = time.monotonic()
        with self._output.step(text):
            result = work()
        self._seconds[text] = time.monotonic() - begun_at
        return result

    def _query(self, statement: str) -> str:
        done = self._containers.execute(
            self._engine.container,
            ["psql", "--no-psqlrc", "--tuples-only", "--no-align", "--dbname=postgres", "--command", statement],
        )
        if done.exit_code != 0:
            raise ExternalToolError(f"PostgreSQL refused `{statement}`: {done.last_words}")
        return done.stdout.strip()

    def _keep_way_back(self) -> str | None:
        """Name the last moment before the restore and archive all of it; `None` where the database is down."""
        running = self._containers.is_running(self._engine.container)
        if not running or self._query("select pg_is_in_recovery()") == "t":
            return None
        name = f"memharbor-before-restore-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        self._query(f"select pg_create_restore_point('{name}')")
        # Recovery to a moment ends at the first commit after it. On a server where nothing was written since there is
        # none, and PostgreSQL would refuse to open: taking a transaction id makes one.
        self._query("select pg_current_xact_id()")
        self._timed("Archive what was written last", self._archive_rest)
        return name

    def _archive_rest(self) -> None:
        segment = self._query("select pg_walfile_name(pg_switch_wal())")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            # The segment's name is PostgreSQL's own answer.
            is_archived = f"select coalesce(last_archived_wal >= '{segment}', false) from pg_stat_archiver"  # noqa: S608
            if self._query(is_archived) == "t":
                return
            time.sleep(0.2)
        raise StateRefusedError(
            f"WAL segment {segment} did not reach the archive within two minutes, so the restore could not be undone",
            hint="run `memharbor doctor`",
        )

    def _stop(self, container: str) -> None:
        if self._containers.is_running(container):
            self._containers.stop(container)

    def _restore_files(self, plan: RestorePlan) -> None:
        # A container that was killed leaves its pid file, and pgBackRest then takes PostgreSQL for running. No server
        # can run here: the container is stopped, and jobs of the same name cannot exist twice.
        script = f'rm -f {PGDATA}/postmaster.pid && mkdir -p -m 0700 {PGDATA} && exec "$@"'
        command = ["sh", "-c", script, "restore", *self._engine.restore_command(plan.backup, plan.options)]
        with self._output.percent() as on_percent:
            done = self._containers.run_job(self._engine.container, command, on_line=percent_reader(on_percent))
        if done.exit_code != 0:
            raise ExternalToolError(f"`pgbackrest restore` failed with exit code {done.exit_code}:\n{done.last_words}")

    def _wait_until_open(self, begun_at: float) -> None:
        container = self._engine.container
        deadline = time.monotonic() + RECOVERY_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            said = self._containers.logs_since(container, begun_at)
            fatal = [
                line
                for line in said.splitlines()
                if "FATAL:" in line and "starting up" not in line and "not yet accepting" not in line
            ]
            if fatal:
                self._stop(container)
                raise ExternalToolError(
                    f"PostgreSQL did not recover: {fatal[-1]}",
                    hint="without `--at` and `--name` it recovers to the end of the archive",
                )
            probe = self._containers.execute(
                container,
                ["psql", "--no-psqlrc", "-tA", "--dbname=postgres", "--command", "select pg_is_in_recovery()"],
            )
            if probe.exit_code == 0 and probe.stdout.strip() == "f":
                return
            time.sleep(0.3)
        raise ExternalToolError(f"PostgreSQL is still replaying after {RECOVERY_TIMEOUT_SECONDS} seconds")

    def _verify(self, plan: RestorePlan) -> tuple[int, int]:
        timeline = int(self._query("select timeline_id from pg_control_checkpoint()"))
        # Right after promotion the control file may still name the old timeline: a checkpoint makes it the new one.
        if timeline <= plan.timeline:
            self._query("checkpoint")
            timeline = int(self._query("select timeline_id from pg_control_checkpoint()"))
        history = parse_history(self._query(f"select pg_read_file('pg_wal/{timeline:08X}.history')"))
        reached = history[max(history)]
        if plan.target_lsn is not None and reached < plan.target_lsn:
            raise VerificationError(
                f"recovery ended at {format_lsn(reached)}, before {plan.target} at {format_lsn(plan.target_lsn)}"
            )
        # "To the end" may end inside the newest segment; before it, WAL is missing or damaged and rows are lost.
        if plan.target == "the end of the archive" and reached < plan.newest_segment.number * SEGMENT_BYTES:
            raise VerificationError(
                f"recovery ended at {format_lsn(reached)}, but the archive goes on to segment {plan.newest_segment.name}"
            )
        return timeline, reached

    def _clear_recovery_settings(self) -> None:
        # pgBackRest leaves the target in postgresql.auto.conf, which no server of ours may carry (docs/adr/0006).
        done = self._containers.execute(self._engine.container, ["sh", "-c", f": > {PGDATA}/postgresql.auto.conf"])
        if done.exit_code != 0:
            raise ExternalToolError(f"the recovery settings could not be cleared: {done.last_words}")
        self._query("select pg_reload_conf()")
