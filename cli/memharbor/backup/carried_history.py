"""
Mem0's own history inside a physical backup: a file in the data directory while the backup is made.

pgBackRest takes every file there along, so that the history is encrypted, checked, copied off-site and expired with the
backup. The server's entrypoint and `docker/postgres/backup` remove the file again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from memharbor.backup.engine import Backup
from memharbor.backup.mem0_history import copied_history
from memharbor.containers import Containers
from memharbor.errors import SourceDataError, StateRefusedError
from memharbor.server_files.postgres import CARRIED_HISTORY, DATA_DIRECTORY, INCOMING_HISTORY

# Of the backup, as `pgbackrest info` shows it: how many rows the history has.
ANNOTATION = "memharbor-mem0-history"


def hand_in(containers: Containers, container: str, path: Path) -> int:
    """
    Put a copy of a history where the next backup takes it along; returns the number of its rows.

    Args:
        containers: The Docker engine that runs the stack.
        container: The leader's container.
        path: Mem0's history, which may be in use.

    Raises:
        SourceDataError: It is not there, or no history of Mem0's.
        StateRefusedError: The container does not run.
        ExternalToolError: There is no room for it.
    """
    script = f"umask 077 && cat > {INCOMING_HISTORY}.new && mv {INCOMING_HISTORY}.new {INCOMING_HISTORY}"
    with copied_history(path) as (copy, row_count):
        for _ in containers.stream(container, ["sh", "-c", script], stdin=copy.read_bytes()):
            pass
    return row_count


def refuse_without_history(backup: Backup, path: Path) -> None:
    """
    Refuse to put back what a backup does not have, or where it cannot be put.

    Raises:
        StateRefusedError: The backup has no history.
        SourceDataError: The folder of the path is not there.
    """
    if ANNOTATION not in backup.annotations:
        raise StateRefusedError(
            f"backup {backup.id} has no history of Mem0's",
            hint="choose one with `--backup ID`: `memharbor backup show ID` says how many rows of it there are",
        )
    if not path.absolute().parent.is_dir():
        raise SourceDataError(f"`{path.absolute().parent}` is no folder", hint="make it, or name another place")


@contextmanager
def scratch_file() -> Iterator[Path]:
    """Lend the path of a file that only its owner reads, and that is gone afterwards."""
    with TemporaryDirectory(prefix="memharbor-") as folder:
        yield Path(folder) / "history.db"


def fetch(containers: Containers, container: str, target: Path) -> None:
    """
    Copy the history out of a data directory that was just restored, before its server is started for clients.

    Raises:
        ExternalToolError: It is not there.
    """
    with target.open("wb") as sink:
        for part in containers.stream(container, ["cat", f"{DATA_DIRECTORY}/{CARRIED_HISTORY}"]):
            sink.write(part)
