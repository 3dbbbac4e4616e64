"""
Ask the server that is backed up or was restored, from inside its container.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from memharbor.backup.wal import parse_history
from memharbor.containers import Containers, Finished
from memharbor.errors import ExternalToolError, StateRefusedError
from memharbor.output import size_text

ARCHIVE_TIMEOUT_SECONDS = 120
# WAL that is replayed comes on top of the backup.
_SPARE_BYTES = 512 * 1024 * 1024

# Prints the bytes that are free on the data volume's disk, and those that its data directory takes now.
_DISK = """
df --block-size=1 --output=avail "$(dirname "$(dirname "$PGDATA")")" | tail -n 1
[ ! -d "$PGDATA" ] || du --summarize --bytes "$PGDATA" 2> /dev/null | cut -f 1
"""


def ask_server(containers: Containers, container: str, *, database: str = "postgres") -> Callable[[str], str]:
    """
    Make a function that asks the server in a container for one value, as its superuser.

    The function raises `ExternalToolError` where PostgreSQL refuses, and `StateRefusedError` where the container is down.
    """

    def query(statement: str) -> str:
        command = ["psql", "--no-psqlrc", "--tuples-only", "--no-align", f"--dbname={database}", "--command", statement]
        done = containers.execute(container, command)
        if done.exit_code != 0:
            raise ExternalToolError(f"PostgreSQL refused `{statement}`: {done.last_words}")
        return done.stdout.strip()

    return query


def archive_present_state(query: Callable[[str], str], point: str) -> None:
    """
    Name the present state and wait until the archive has all of it.

    Args:
        query: Asks the server, see `ask_server`.
        point: Name of the restore point.

    Raises:
        StateRefusedError: The archive did not take it in time.
    """
    query(f"select pg_create_restore_point('{point}')")
    # Recovery to a moment ends at the first commit after it. On a server where nothing was written since there is
    # none, and PostgreSQL would refuse to open: taking a transaction id makes one.
    query("select pg_current_xact_id()")
    segment = query("select pg_walfile_name(pg_switch_wal())")
    # The segment's name is PostgreSQL's own answer.
    is_archived = f"select coalesce(last_archived_wal >= '{segment}', false) from pg_stat_archiver"  # noqa: S608
    deadline = time.monotonic() + ARCHIVE_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if query(is_archived) == "t":
            return
        time.sleep(0.2)
    raise StateRefusedError(
        f"WAL segment {segment} did not reach the archive within {ARCHIVE_TIMEOUT_SECONDS} seconds",
        hint="run `memharbor doctor`",
    )


def read_reached(query: Callable[[str], str]) -> tuple[int, int]:
    """
    Read which timeline a promoted server writes, and where it left the one before.

    Args:
        query: Asks the server for one value.
    """
    # Right after promotion the control file may still name the old timeline: a checkpoint makes it the new one.
    query("checkpoint")
    timeline = int(query("select timeline_id from pg_control_checkpoint()"))
    history = parse_history(query(f"select pg_read_file('pg_wal/{timeline:08X}.history')"))
    return timeline, history[max(history)]


def refuse_small_disk(execute: Callable[[Sequence[str]], Finished], database_bytes: int) -> None:
    """
    Refuse a restore that would fill the disk; what the data directory takes now is taken back.

    Args:
        execute: Runs a command where the data volume is.
        database_bytes: Size of the database in the backup.

    Raises:
        StateRefusedError: There is not enough disk.
    """
    done = execute(["sh", "-c", _DISK])
    sizes = [int(word) for word in done.stdout.split() if word.isdigit()]
    if done.exit_code != 0 or not sizes:
        raise ExternalToolError(f"the disk of the data volume cannot be looked at: {done.last_words}")
    if sum(sizes) < database_bytes + _SPARE_BYTES:
        raise StateRefusedError(
            f"the disk of the data volume has {size_text(sum(sizes))} for a restore, and it needs"
            f" {size_text(database_bytes + _SPARE_BYTES)}",
            hint="free some of it, for instance with `docker system prune`",
        )
