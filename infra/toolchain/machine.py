"""
Reach the machine: programs, users, processes. Everything that decides takes a `Machine`, so that tests can bring one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from toolchain.report import ToolchainError

# Where Debian keeps dockerd, debootstrap and iptables; not on every user's PATH.
_SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
_HEARTBEAT_SECONDS = 30
_TAIL_LINES = 25


class Machine(Protocol):
    """
    The part of the machine that the set-up uses.
    """

    @property
    def environment(self) -> Mapping[str, str]:
        """Return the variables that the set-up was called with."""

    def is_root(self) -> bool:
        """Tell whether packages may be installed and services started."""

    def is_systemd_running(self) -> bool:
        """Tell whether systemd manages services here: installed is not enough."""

    def find_programs(self, name: str) -> list[Path]:
        """Return every executable of that name, in PATH order."""

    def read_output(self, command: Sequence[str]) -> str | None:
        """Return what a quick command prints, or None where it fails or takes more than ten seconds."""

    def run(
        self,
        command: Sequence[str],
        *,
        purpose: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        hints: Sequence[str] = (),
    ) -> None:
        """Run to the end with output going to `log`; raise ToolchainError, with the log's end, on failure."""

    def start_detached(self, command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> int:
        """Start a process that outlives this one; return its id."""


class LocalMachine:
    """
    The machine that this runs on.
    """

    def __init__(self, heartbeat: Callable[[str], None]) -> None:
        self._heartbeat = heartbeat
        self.environment: Mapping[str, str] = dict(os.environ)

    def is_root(self) -> bool:
        """Tell by the effective user."""
        return os.geteuid() == 0

    def is_systemd_running(self) -> bool:
        """Tell by the folder that `sd_booted(3)` looks for."""
        return Path("/run/systemd/system").is_dir()

    def find_programs(self, name: str) -> list[Path]:
        """Look in PATH, then where Debian keeps system programs."""
        folders = [*self.environment.get("PATH", os.defpath).split(os.pathsep), *_SYSTEM_FOLDERS]
        found = (shutil.which(name, path=folder) for folder in dict.fromkeys(folders) if folder)
        return [Path(path) for path in found if path]

    def read_output(self, command: Sequence[str]) -> str | None:
        """Run without input, output and errors together."""
        try:
            done = subprocess.run(  # noqa: S603 - commands are written in this package
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout + done.stderr if done.returncode == 0 else None

    def run(
        self,
        command: Sequence[str],
        *,
        purpose: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        hints: Sequence[str] = (),
    ) -> None:
        """Run with a word every half minute; a failure carries the end of the output."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"\n$ {' '.join(command)}\n")
            stream.flush()
            offset = stream.tell()
            # Output goes to a file, not to a pipe: a service that a package's script starts would hold a pipe open
            # for ever, and reading to its end would hang.
            try:
                process = subprocess.Popen(  # noqa: S603 - as above
                    command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, cwd=cwd
                )
            except OSError as failure:
                raise ToolchainError(f"cannot {purpose}: {failure}", hints=hints) from failure
            status = self._wait(process, purpose)
        if status != 0:
            written = log.read_bytes()[offset:].decode("utf-8", "replace")
            raise ToolchainError(
                f"cannot {purpose}: `{Path(command[0]).name}` ended with status {status}",
                hints=[*hints, f"the whole output: `cat {log}`"][:2],
                output="\n".join(written.splitlines()[-_TAIL_LINES:]),
            )

    def _wait(self, process: subprocess.Popen[bytes], purpose: str) -> int:
        begin = time.monotonic()
        try:
            while True:
                try:
                    return process.wait(timeout=_HEARTBEAT_SECONDS)
                except subprocess.TimeoutExpired:
                    self._heartbeat(f"still at it after {time.monotonic() - begin:.0f} s: {purpose}")
        except BaseException:
            process.terminate()
            process.wait()
            raise

    def start_detached(self, command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> int:
        """Start in a session of its own: neither Ctrl-C here nor the end of `make` reaches it."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            process = subprocess.Popen(  # noqa: S603 - as above
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment,
                cwd="/",
                start_new_session=True,
            )
        return process.pid
