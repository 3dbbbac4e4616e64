"""
A restore into a throw-away container: no network, an empty volume, gone with this process.

The backup store's volume is mounted read-only and read as a posix repository, so that nothing can be written to the
store, nothing can be reached from inside, and it also works while the store's gateway is down. The server never
archives and knows no stanza. Source: docs/adr/0013-drills-in-throw-away-containers.md.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from memharbor.backup.container_rows import ContainerRows
from memharbor.backup.engine import BackupEngine, percent_reader
from memharbor.backup.plan import RestorePlan, check_reached, share_replayed
from memharbor.backup.server import archive_present_state, ask_server, read_reached, refuse_small_disk
from memharbor.backup.wal import SEGMENT_BYTES, Segment, parse_lsn
from memharbor.containers import Containers, Finished
from memharbor.errors import ExternalToolError, StateRefusedError
from memharbor.output import Output, size_text
from memharbor.server_files.postgres import DATA_DIRECTORY, DATA_ROOT, FILES_ROOT

RECOVERY_TIMEOUT_SECONDS = 3600
STORE_ROOT = "/store"
# May read the store's volume: its gateway runs as this group and lets it. Source: docker/backup-store/Dockerfile.
STORE_GROUP = "10001"
_START = """
set -eu
setsid postgres -D "$PGDATA" -c config_file="$0/postgres/postgresql.conf" -c hba_file="$0/postgres/pg_hba.conf" \
  -c archive_mode=off -c listen_addresses= -c fsync=off -c full_page_writes=off -c autovacuum=off \
  > "${PGDATA%/*}/log" 2>&1 < /dev/null &
echo $! > "${PGDATA%/*}/pid"
"""
_STATE = """
grep '\\] FATAL: ' "${PGDATA%/*}/log"
kill -0 "$(cat "${PGDATA%/*}/pid")" && echo alive
psql --no-psqlrc -tA --dbname=postgres --command "select 'state', pg_is_in_recovery(), pg_last_wal_replay_lsn()"
true
"""
_LOG_END = 'tail -n 20 "${PGDATA%/*}/log"'
_SERVER_FATAL = re.compile(r"\[\d+\] FATAL: ")


class _Store(Protocol):
    @property
    def volume(self) -> str: ...
    @property
    def bucket(self) -> str: ...
    @property
    def repository_path(self) -> str: ...


class _Outputs(Protocol):
    @property
    def database(self) -> str: ...
    @property
    def store(self) -> _Store: ...


class Opened(Protocol):
    """What a sandbox needs of a stack; `memharbor.operations.OpenStack` is one."""

    @property
    def engine(self) -> BackupEngine:
        """The stack's backups."""

    @property
    def containers(self) -> Containers:
        """The Docker engine that runs the stack."""

    @property
    def outputs(self) -> Any:
        """The stack's outputs, of which `database` and `store` matter here."""


@dataclass
class Sandbox:
    """
    A restored database in a throw-away container.

    Args:
        container: The container's name.
        plan: What was restored.
        database: The stack's database.
        reached_lsn: Where the replay ended.
        timeline: The timeline on which the restored server writes.
        seconds: How long each step took, by its name.
    """

    container: str
    plan: RestorePlan
    database: str
    _containers: Containers = field(repr=False)
    reached_lsn: int = 0
    timeline: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def rows(self, database: str | None = None, *, prelude: str = "") -> ContainerRows:
        """Read rows of a database, the stack's own by default; `prelude` comes before each statement."""
        return ContainerRows(self._containers, self.container, database or self.database, prelude)

    def execute(self, command: Sequence[str], *, stdin: bytes = b"") -> Finished:
        """Run a command in the container."""
        return self._containers.execute(self.container, command, stdin=stdin)

    def query(self, statement: str, database: str = "postgres") -> str:
        """Ask for one value, as text; empty where it is null or there is no row."""
        rows = self.rows(database).query(statement)
        return (rows[0][0] or "") if rows else ""

    def clear_recovery_settings(self) -> None:
        """
        Clear what the restore left in the settings: it names a repository that only the throw-away container has.

        Raises:
            ExternalToolError: The file could not be written.
        """
        done = self.execute(["sh", "-c", ': > "$PGDATA/postgresql.auto.conf"'])
        if done.exit_code != 0:
            raise ExternalToolError(f"the recovery settings could not be cleared: {done.last_words}")

    def stop(self) -> None:
        """
        Shut the server down cleanly, so that its files can be checked.

        Raises:
            ExternalToolError: It did not stop.
        """
        command = ["pg_ctl", "stop", "--pgdata", DATA_DIRECTORY, "--mode=fast", "--timeout=300", "--silent"]
        done = self.execute(command)
        if done.exit_code != 0:
            raise ExternalToolError(f"the restored server did not stop: {done.last_words}")


@contextmanager
def restored(
    opened: Opened,
    plan: RestorePlan,
    output: Output,
    *,
    writable: Mapping[str, str] | None = None,
    above_timeline: int = 0,
) -> Iterator[Sandbox]:
    """
    Restore a plan into a throw-away container, replay it to its target, check that it was reached, and keep it open.

    The container and its volume are removed at the end of the block; the engine removes them where this process is
    killed.

    Args:
        opened: The stack.
        plan: What to restore, see `memharbor.backup.plan.plan_restore`.
        output: Where progress is said.
        writable: Volumes to mount besides, so that they can be written to, with their places.
        above_timeline: The restored server goes on on a timeline above this one.

    Raises:
        StateRefusedError: There is not enough disk, or what is to be replayed did not reach the archive.
        ExternalToolError: pgBackRest or PostgreSQL failed.
        VerificationError: Less was reached than the plan asks for.
    """
    bring_to_archive(opened, plan)
    mounts = {opened.outputs.store.volume: STORE_ROOT}
    with opened.containers.throw_away(
        opened.engine.container, data=DATA_ROOT, mounts=mounts, groups=[STORE_GROUP], writable=writable
    ) as name:
        sandbox = Sandbox(name, plan, opened.outputs.database, opened.containers)
        opening = _Opening(opened, sandbox, output)
        opening.timed("disk", f"Look for {size_text(plan.backup.database_bytes)} of disk", opening.refuse_small_disk)
        opening.timed("restore", f"Restore backup {plan.backup.id}", opening.restore_files)
        opening.reserve_timelines(above_timeline)
        opening.timed("replay", f"Replay to {plan.target}", opening.replay)
        sandbox.timeline, sandbox.reached_lsn = read_reached(sandbox.query)
        opening.release_timelines()
        check_reached(plan, sandbox.reached_lsn)
        yield sandbox


def bring_to_archive(opened: Opened, plan: RestorePlan) -> None:
    """
    See to it that the archive holds all that a plan replays, since a sandbox has nothing else.

    Raises:
        StateRefusedError: It does not, and the server that has the rest is down or cannot archive it.
    """
    if plan.kind in ("end", "immediate"):
        return
    if plan.target_lsn is not None:
        needed = Segment(plan.timeline, plan.target_lsn // SEGMENT_BYTES)
        if needed in opened.engine.list_segments():
            return
    engine, containers = opened.engine, opened.containers
    query = ask_server(containers, engine.container)
    is_writing = containers.is_running(engine.container) and query("select pg_is_in_recovery()") == "f"
    if is_writing and engine.foreign_system_id() is None:
        archive_present_state(query, f"memharbor-sandbox-{secrets.token_hex(4)}")
    elif plan.target_lsn is not None:
        raise StateRefusedError(
            f"WAL segment {needed.name}, which holds {plan.target}, is not in the archive, and the server is down",
            hint="run `memharbor status`",
        )


class _Opening:
    """The steps that bring a sandbox to its target."""

    def __init__(self, opened: Opened, sandbox: Sandbox, output: Output) -> None:
        self._opened = opened
        self._sandbox = sandbox
        self._output = output

    def timed(self, step: str, text: str, work: Callable[[], None]) -> None:
        begun_at = time.monotonic()
        with self._output.step(text):
            work()
        self._sandbox.seconds[step] = time.monotonic() - begun_at

    def refuse_small_disk(self) -> None:
        refuse_small_disk(self._sandbox.execute, self._sandbox.plan.backup.database_bytes)

    def restore_files(self) -> None:
        plan, store = self._sandbox.plan, self._opened.outputs.store
        repository = (
            "--repo=1",
            "--repo1-type=posix",
            f"--repo1-path={STORE_ROOT}/buckets/{store.bucket}{store.repository_path}",
            "--archive-mode=off",
        )
        pgbackrest = self._opened.engine.restore_command(plan.backup, (*plan.options, *repository))
        command = ["sh", "-c", 'mkdir -p "${PGDATA%/*}" && mkdir -m 0700 "$PGDATA" && exec "$@"', "sh", *pgbackrest]
        with self._output.percent(plan.backup.database_bytes) as on_percent:
            done = self._opened.containers.execute(self._sandbox.container, command, on_line=percent_reader(on_percent))
        if done.exit_code != 0:
            raise ExternalToolError(f"`pgbackrest restore` failed with exit code {done.exit_code}:\n{done.last_words}")

    def reserve_timelines(self, last: int) -> None:
        """
        Let PostgreSQL pass over the numbers of timelines up to one: it takes the first that has no history file.

        Source: PostgreSQL 18, findNewestTimeLine in timeline.c, which looks at nothing but the existence.
        """
        numbers = [f"{number:08X}" for number in range(self._sandbox.plan.timeline + 1, last + 1)]
        script = 'for number; do : > "$PGDATA/pg_wal/$number.history"; echo "$number" >> "${PGDATA%/*}/reserved"; done'
        done = self._sandbox.execute(["sh", "-c", script, "sh", *numbers])
        if done.exit_code != 0:
            raise ExternalToolError(f"the timelines could not be reserved: {done.last_words}")

    def release_timelines(self) -> None:
        """Remove what `reserve_timelines` wrote."""
        script = """
            [ ! -f "${PGDATA%/*}/reserved" ] || while read -r number; do
              [ -s "$PGDATA/pg_wal/$number.history" ] || rm -f "$PGDATA/pg_wal/$number.history"
            done < "${PGDATA%/*}/reserved"
        """
        self._sandbox.execute(["sh", "-c", script])

    def replay(self) -> None:
        started = self._sandbox.execute(["sh", "-c", _START, FILES_ROOT])
        if started.exit_code != 0:
            raise ExternalToolError(f"the restored server could not be started: {started.last_words}")
        deadline = time.monotonic() + RECOVERY_TIMEOUT_SECONDS
        with self._output.percent() as on_percent:
            while not self._is_open(on_percent):
                if time.monotonic() > deadline:
                    raise ExternalToolError(f"PostgreSQL is still replaying after {RECOVERY_TIMEOUT_SECONDS} seconds")
                time.sleep(0.2)

    def _is_open(self, on_percent: Callable[[float], None]) -> bool:
        """Tell whether the server has been promoted; say how far it is."""
        lines = self._sandbox.execute(["sh", "-c", _STATE]).stdout.splitlines()
        fatal = [line for line in lines if _SERVER_FATAL.search(line)]
        if fatal or "alive" not in lines:
            said = fatal[-1] if fatal else self._sandbox.execute(["sh", "-c", _LOG_END]).stdout
            raise ExternalToolError(f"PostgreSQL did not recover: {said}")
        state = next((line.split("|") for line in lines if line.startswith("state|")), None)
        if state is None:
            return False
        if state[2]:
            on_percent(share_replayed(self._sandbox.plan, parse_lsn(state[2])))
        return state[1] == "f"
