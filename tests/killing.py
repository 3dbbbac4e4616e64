"""
Processes that kill themselves at a chosen moment, for tests of what is left then, and of going on from there.

A moment is where a process touches what outlives it: before it opens, renames, links, cuts or removes a file, while it
writes one (then as much of it is there as chance has it), before a statement of SQLite that writes, before and after each
exchange with PostgreSQL, and after a commit of either. They are counted by the step of the migration in which they come
and by their kind, so that step, kind and number name the same moment in each run; and what is rare is drawn as often as
what is frequent. Memharbor knows nothing of it: Python's audit events say it, and a few functions of libraries are
wrapped, in the process that is to die.

Processes are forked from one that has imported everything, since there are thousands of them.
Source: Python manual, sys.addaudithook, Audit events table; multiprocessing, Contexts and start methods.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import random
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from stat import S_ISREG
from types import FrameType
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

import memharbor.migrate
from memharbor.commands import main

ROOT = Path(__file__).parents[1]
KILLED = -signal.SIGKILL
# The step of a migration by the function of its pipeline that does it.
STEP_OF = {
    "_numbers": "read",
    "_write_read": "read",
    "_transform": "transform",
    "_note": "transform",
    "_embed": "embed",
    "_load": "load",
    "_verify": "verify",
    "_verify_segment": "verify",
}
# What comes before the first step and after the last one, and commands that have no steps.
BEGIN, END = "begin", "end"
_CHANGES = ("open", "os.rename", "os.link", "os.remove", "os.truncate", "os.mkdir", "os.rmdir")

_forks = get_context("forkserver")
_forks.set_forkserver_preload(["pytest", "tests.killing"])


@dataclass(frozen=True)
class Ended:
    """
    How a process ended.

    Args:
        code: Its exit code; `KILLED` where it was.
        said: What it wrote to stdout.
        complained: What it wrote to stderr.
        moments: How many there were, by step and kind; of one that ended by itself.
    """

    code: int
    said: str
    complained: str
    moments: Mapping[str, Mapping[str, int]]

    @property
    def report(self) -> Any:
        """What a command said with `--output json`."""
        return json.loads(self.said)


@dataclass(frozen=True)
class Moment:
    """
    A moment.

    Args:
        step: In which it comes.
        kind: What is done then.
        number: Of its kind in the step, from 1 on.
        share: How much of a file that is written then is there.
    """

    step: str
    kind: str
    number: int
    share: float


def draw_moment(draw: random.Random, moments: Mapping[str, Mapping[str, int]], step: str | None = None) -> Moment:
    """Draw a moment of an undisturbed run, each step as likely as another, and each kind in it."""
    step = step or draw.choice(sorted(moments))
    kind = draw.choice(sorted(moments[step]))
    return Moment(step, kind, draw.randint(1, moments[step][kind]), draw.random())


def live(arguments: Sequence[str], folder: Path, environ: Mapping[str, str], moment: Moment | None = None) -> Ended:
    """
    Run the command line in a folder, until it ends by itself or a moment has come.

    Args:
        arguments: The words after `memharbor`.
        folder: To work in; all that the process writes is in it.
        environ: Variables besides those of this process.
        moment: At which it kills itself; never without it.
    """
    last = folder.with_name(f"{folder.name}.last")
    last.mkdir(exist_ok=True)
    for path in last.iterdir():
        path.unlink()
    with _importable():
        process = _forks.Process(target=_live, args=(list(arguments), folder, {**os.environ, **environ}, moment, last))
        process.start()
    process.join()
    code = process.exitcode
    process.close()
    moments = last / "moments.json"
    return Ended(
        -1 if code is None else code,
        (last / "stdout").read_text(),
        (last / "stderr").read_text(),
        json.loads(moments.read_text()) if moments.exists() else {},
    )


class _importable:  # noqa: N801 - reads as a function where it is used
    """Lets the process that forks find our modules when it begins."""

    def __enter__(self) -> None:
        self._before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "cli"), *filter(None, [self._before])])

    def __exit__(self, *_: object) -> None:
        del os.environ["PYTHONPATH"]
        if self._before is not None:
            os.environ["PYTHONPATH"] = self._before


def _live(arguments: list[str], folder: Path, environ: Mapping[str, str], moment: Moment | None, last: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(last / name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    moments = _Moments(folder, moment)
    try:
        main(arguments)
    finally:
        (last / "moments.json").write_text(json.dumps(moments.counts))


class _Moments:
    """Counts moments by step and kind, and ends the process at one."""

    def __init__(self, folder: Path, fatal: Moment | None) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self._folder, self._fatal = str(folder), fatal
        sys.addaudithook(self._hear)
        self._watch_database()
        self._watch_sqlite()
        self._watch_writing()

    def come(self, kind: str, written: int | None = None) -> None:
        """
        Come to a moment.

        Args:
            kind: What is done now.
            written: A file that is being written.
        """
        step = self._step()
        counts = self.counts.setdefault(step, Counter())
        counts[kind] += 1
        fatal = self._fatal
        if fatal is None or (step, kind, counts[kind]) != (fatal.step, fatal.kind, fatal.number):
            return
        if written is not None:
            # Not written to its end: nothing may be made of a file before it is known to be on the disk.
            os.truncate(f"/proc/self/fd/{written}", int(fatal.share * os.fstat(written).st_size))
        os.kill(os.getpid(), signal.SIGKILL)

    def _watch_database(self) -> None:
        wait = psycopg.Connection.wait

        def waited(connection: Any, *arguments: Any, **options: Any) -> Any:
            self.come("database")
            was_open = connection.pgconn.transaction_status != TransactionStatus.IDLE
            found = wait(connection, *arguments, **options)
            is_open = connection.pgconn.transaction_status != TransactionStatus.IDLE
            self.come("committed" if was_open and not is_open else "database")
            return found

        psycopg.Connection.wait = waited  # type: ignore[assignment, method-assign]

    def _watch_sqlite(self) -> None:
        come, connect = self.come, sqlite3.connect

        class Connection(sqlite3.Connection):
            def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
                if statement.lstrip().startswith("select"):
                    return super().execute(statement, *parameters)
                come("sqlite")
                found = super().execute(statement, *parameters)
                if statement == "commit":
                    come("sqlite-committed")
                return found

            def executemany(self, *arguments: Any) -> sqlite3.Cursor:
                come("sqlite")
                return super().executemany(*arguments)

            def commit(self) -> None:
                come("sqlite")
                super().commit()
                come("sqlite-committed")

        sqlite3.connect = lambda *arguments, **options: connect(*arguments, **{"factory": Connection, **options})

    def _watch_writing(self) -> None:
        fsync = os.fsync

        def synced(file: int) -> None:
            found = os.fstat(file)
            # Neither a folder nor another name of a file that is whole is written piece by piece.
            if S_ISREG(found.st_mode) and found.st_nlink == 1:
                self.come("write", file)
            fsync(file)

        os.fsync = synced  # type: ignore[assignment]

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES and any(self._is_ours(each) for each in arguments[:2]):
            self.come(event.rpartition(".")[2])

    def _is_ours(self, path: Any) -> bool:
        if not isinstance(path, str | os.PathLike):
            return False
        text = os.fspath(path)
        # A relative one is in the folder, too.
        return isinstance(text, str) and (text.startswith(self._folder) or not text.startswith("/"))

    def _step(self) -> str:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_name in STEP_OF and code.co_filename.endswith("migrate/pipeline.py"):
                return STEP_OF[code.co_name]
            frame = frame.f_back
        return END if self.counts.keys() - {BEGIN} else BEGIN


def _import_everything() -> None:
    """What a command imports when it is called; the processes that are forked have it already."""
    for found in pkgutil.walk_packages(memharbor.migrate.__path__, "memharbor.migrate."):
        importlib.import_module(found.name)
    for name in ("memharbor.target", "memharbor.operations", "memharbor.backup.roll_back", "encodings.idna"):
        importlib.import_module(name)


_import_everything()
