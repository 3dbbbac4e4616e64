"""
Restore into a folder of this machine: the files of a PostgreSQL data directory at the target, shut down cleanly.

The restore itself happens in a throw-away container, so that what arrives was replayed, verified and cleared of what
must not come back; the running database is not touched.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from memharbor.backup.plan import RestorePlan
from memharbor.backup.restore import OnOpen
from memharbor.backup.sandbox import Opened, Sandbox, restored
from memharbor.backup.wal import format_lsn
from memharbor.errors import SourceDataError, StateRefusedError
from memharbor.output import Output, size_text
from memharbor.server_files.postgres import DATA_DIRECTORY


@dataclass(frozen=True)
class FolderReport:
    """What was restored into a folder. Sizes in bytes."""

    plan: RestorePlan
    folder: Path
    reached_lsn: int
    size_bytes: int
    erasures_replayed: int

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        return {
            **self.plan.as_data(),
            "reached_lsn": format_lsn(self.reached_lsn),
            "folder": str(self.folder),
            "bytes": self.size_bytes,
            "erasures_replayed": self.erasures_replayed,
        }


def refuse_folder(folder: Path, plan: RestorePlan, *, replace: bool) -> None:
    """
    Refuse a folder that cannot be restored into.

    Args:
        folder: Where to.
        plan: What is restored.
        replace: Whether a data directory that is there may be replaced; anything else never is.

    Raises:
        StateRefusedError: It is no folder, its parent does not exist, it is not empty, or its disk is too small.
    """
    if not folder.parent.is_dir():
        raise StateRefusedError(f"`{folder.parent}` does not exist", hint=f"mkdir -p {folder.parent}")
    if folder.exists() and not folder.is_dir():
        raise StateRefusedError(f"`{folder}` is a file", hint="name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / "PG_VERSION").is_file():
            raise StateRefusedError(f"`{folder}` is not empty and no data directory", hint="name an empty folder")
        if (folder / "postmaster.pid").exists():
            raise StateRefusedError(f"a server runs in `{folder}`, or was killed there", hint="stop it first")
        if not replace:
            raise StateRefusedError(
                f"`{folder}` holds a data directory", hint="pass `--replace` to delete it, or name an empty folder"
            )
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < plan.backup.database_bytes:
        raise StateRefusedError(
            f"the disk of `{folder}` has {size_text(free_bytes)} left, and the restored database needs"
            f" {size_text(plan.backup.database_bytes)}",
            hint="name a folder on another disk",
        )


def restore_into_folder(
    opened: Opened, plan: RestorePlan, folder: Path, output: Output, *, replace: bool, on_open: OnOpen
) -> FolderReport:
    """
    Restore a plan into a folder.

    The files arrive under another name beside it; the folder is there with all of them or not at all.

    Args:
        opened: The stack.
        plan: What to restore.
        folder: Where to.
        output: Where progress is said.
        replace: Whether a data directory that is there is replaced.
        on_open: Called with the restored database before it is shut down and copied.

    Raises:
        StateRefusedError: See `refuse_folder`.
        ExternalToolError: pgBackRest, PostgreSQL or the copy failed; the folder is as it was.
        VerificationError: Less was reached than the plan asks for; the folder is as it was.
    """
    folder = folder.absolute()
    refuse_folder(folder, plan, replace=replace)
    incoming = folder.with_name(f".{folder.name}.memharbor-incoming")
    shutil.rmtree(incoming, ignore_errors=True)  # of one that was killed
    incoming.mkdir(mode=0o700)
    try:
        with restored(opened, plan, output) as sandbox:
            replayed = len(on_open(sandbox.rows()))
            sandbox.stop()
            with output.step(f"Copy the files into {folder}"):
                size_bytes = _copy_out(opened, sandbox, incoming)
        _move(incoming, folder)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return FolderReport(plan, folder, sandbox.reached_lsn, size_bytes, replayed)


def _copy_out(opened: Opened, sandbox: Sandbox, incoming: Path) -> int:
    sandbox.clear_recovery_settings()
    pieces = opened.containers.stream(sandbox.container, ["tar", "-C", DATA_DIRECTORY, "-cf", "-", "."])
    reader = _Reader(pieces)
    with tarfile.open(fileobj=io.BufferedReader(reader, 1024 * 1024), mode="r|") as archive:
        archive.extraction_filter = lambda member, _: member  # since Python 3.11.4 one is asked for
        for member in archive:
            archive.extract(_tamed(member), incoming)
    for _ in pieces:  # the end, where a failure is said
        pass
    incoming.chmod(0o700)  # PostgreSQL refuses anything wider
    os.sync()
    return reader.size_bytes


def _tamed(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """
    Let a file stay in its folder and belong to who extracts it.

    What `tarfile.data_filter` does for a server's files; Python 3.11.2, which Debian 12 has, does not know it.

    Raises:
        SourceDataError: It is no file of a server.
    """
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or not (member.isreg() or member.isdir()):
        raise SourceDataError(
            f"the data directory has `{member.name}`, which is neither a file nor a folder of its own"
        )
    member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
    member.mode = (member.mode | (0o700 if member.isdir() else 0o600)) & 0o755
    return member


def _move(incoming: Path, folder: Path) -> None:
    outgoing = folder.with_name(f".{folder.name}.memharbor-outgoing")
    shutil.rmtree(outgoing, ignore_errors=True)
    if folder.is_dir() and any(folder.iterdir()):
        folder.replace(outgoing)
    incoming.replace(folder)
    shutil.rmtree(outgoing, ignore_errors=True)


class _Reader(io.RawIOBase):
    """What comes in pieces, as a file; counts its bytes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        super().__init__()
        self._pieces = pieces
        self._rest = b""
        self.size_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = piece
        taken = min(len(buffer), len(self._rest))
        buffer[:taken], self._rest = self._rest[:taken], self._rest[taken:]
        self.size_bytes += taken
        return taken
