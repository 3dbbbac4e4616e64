"""
`kill -9` at any moment of any step of a migration, from any source, and going on: the result is that of a run that was
left alone, to the last row of the audit trail.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from memharbor.migrate.workfolder import STEPS
from tests.integration.migrate_kill_cases import BATCH, CASES, COUNT, Case, make_case
from tests.integration.test_migrate_sources import SOURCES
from tests.killing import BEGIN, END, KILLED, ROOT, STEP_OF, Ended, Moment, draw_moment, live
from tests.memory_database import Server
from tests.schema_databases import DIMS, scratch_database

SEED = os.environ.get("MEMHARBOR_TEST_SEED", "20261121")
KILLS = 50
# How often the process that goes on is killed, too.
AGAIN = 0.4
# What the database itself makes anew in each run.
OWN = {"memory_history": ["id"], "configs": ["id"], "migration_ledger": ["run_id"]}
_INSTANT = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?([+-]\d\d:\d\d|Z)")


@dataclass(frozen=True)
class Outcome:
    """What is there in the end: rows by table, files by name, what was said; and how many moments it took."""

    tables: Mapping[str, list[str]]
    files: Mapping[str, Any]
    report: Any
    moments: Mapping[str, Mapping[str, int]]


def timeless(value: Any, since: datetime) -> Any:
    """Replace the instants of this run: no two runs have the same."""
    if isinstance(value, dict):
        return {name: timeless(each, since) for name, each in value.items()}
    if isinstance(value, list):
        return [timeless(each, since) for each in value]
    if isinstance(value, str):
        return _INSTANT.sub(lambda found: "now" if datetime.fromisoformat(found[0]) >= since else found[0], value)
    return value


def files_of(folder: Path, since: datetime) -> dict[str, Any]:
    """What a command leaves beside the database: its files, and the refusals of the runs."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).parts[0]
        if path.name == "dead-letters.jsonl":
            # A run's name has its moment, and a number where there is another one of the same.
            kind = re.sub(r"^[0-9TZ]+-|-\d+$", "", path.parent.name)
            found[kind] = sorted([*found.get(kind, []), path.read_text()])
        elif name in ("cache", "memharbor-migrations") or name.startswith(".") or path.is_dir():
            # What a process had in the making when it was killed is dotted.
            continue
        elif path.suffix == ".db":
            with closing(sqlite3.connect(path)) as connection:
                found[path.name] = timeless(list(connection.iterdump()), since)
        else:
            found[path.name] = path.read_bytes()
    return found


class Attempt:
    """
    A case in a database and a folder of its own.

    Args:
        case: What is carried out.
        dsn: Of the database.
        folder: To work in.
    """

    def __init__(self, case: Case, dsn: str, folder: Path) -> None:
        self.case, self.dsn, self.folder = case, dsn, folder
        self.kills: list[Moment] = []
        self._since = datetime.now(UTC)
        self._environ = {**case.environ, "MEMHARBOR_DSN": dsn, "XDG_CACHE_HOME": str(folder / "cache")}
        folder.mkdir()
        for command in case.before:
            self.run(command)
        self._there = self._runs()
        self.before = self.tables()

    def tables(self) -> dict[str, list[str]]:
        """Every row of every table, embeddings to the bit, as text."""
        found = {}
        with closing(psycopg.connect(self.dsn, autocommit=True)) as connection:
            connection.execute("set timezone = 'UTC'")
            names = connection.execute("select tablename from pg_tables where schemaname = 'memharbor'").fetchall()
            for (name,) in names:
                query = sql.SQL("select to_jsonb(t) - %s::text[] from memharbor.{} t").format(sql.Identifier(name))
                rows = connection.execute(query, (OWN.get(name, []),)).fetchall()
                found[name] = sorted(json.dumps(timeless(row, self._since), sort_keys=True) for (row,) in rows)
        return found

    def run(self, command: Sequence[str]) -> Ended:
        """Carry a command out to its end."""
        ended = live([*command, "--output", "json"], self.folder, self._environ)
        assert ended.code == 0, f"{command} after {self.kills}: {ended.code}: {ended.complained}"
        return ended

    def next_command(self) -> Sequence[str]:
        """What a person does now: goes on with the run where there is one, else does the same again."""
        begun = self._runs() - self._there
        assert len(begun) <= 1
        return ["migrate", "resume", *begun] if begun and self.case.goes_on else self.case.command

    def carry_out(self, moments: Sequence[Moment] = ()) -> Outcome:
        """Go on to the end, killed at the moments one after the other."""
        for moment in moments:
            command = self.next_command()
            ended = live([*command, "--output", "json"], self.folder, self._environ, moment)
            if ended.code == 0:
                return self._outcome(ended)
            assert ended.code == KILLED, f"{command} after {self.kills}: {ended.code}: {ended.complained}"
            self.kills.append(moment)
            if self.case.result and (self.folder / self.case.result).exists():
                return self._outcome(ended)
        return self._outcome(self.run(self.next_command()))

    def kill(self, is_time: Callable[[Attempt], bool]) -> bool:
        """Carry the command out in a process that Python begins anew, and kill it from outside; whether it was."""
        process = subprocess.Popen(
            [sys.executable, "-m", "memharbor", *self.next_command()],
            env={**os.environ, **self._environ, "PYTHONPATH": str(ROOT / "cli")},
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while process.poll() is None and not is_time(self):
            pass
        process.send_signal(signal.SIGKILL)
        _, complained = process.communicate()
        assert process.returncode in (0, KILLED), complained.decode()
        return process.returncode == KILLED

    def count_segments(self, step: str) -> int:
        """Count the segments that a step of the new run has completed."""
        paths = self.folder.glob(f"memharbor-migrations/**/{step}/[0-9]*")
        return sum(path.parent.parent.name not in self._there for path in paths)

    def roll_back(self) -> None:
        """Take the run back."""
        (begun,) = self._runs() - self._there
        self.run(["migrate", "rollback", begun, "--yes"])

    def _runs(self) -> set[str]:
        return {path.parent.name for path in self.folder.glob("memharbor-migrations/**/run.json")}

    def _outcome(self, ended: Ended) -> Outcome:
        report = None
        if self.case.goes_on:
            report = {name: value for name, value in ended.report.items() if name not in ("run", "checkpoint")}
        return Outcome(self.tables(), files_of(self.folder, self._since), report, ended.moments)


@contextmanager
def attempted(case: Case, server: Server, folder: Path) -> Iterator[Attempt]:
    with scratch_database(server) as name:
        yield Attempt(case, server.admin_dsn(name), folder)


@contextmanager
def prepared(name: str, server: Server, tmp_path: Path) -> Iterator[tuple[Case, Outcome]]:
    """A case, and what comes of it when nobody disturbs it."""
    with ExitStack() as stack:
        (tmp_path / "source").mkdir()
        case = make_case(name, tmp_path / "source", stack, server)
        with attempted(case, server, tmp_path / "undisturbed") as attempt:
            expected = attempt.carry_out()
        assert expected.tables["memories"] or name.startswith("read-")
        yield case, expected


def refuse_other(found: Outcome, expected: Outcome, told: str) -> None:
    assert found.tables == expected.tables, told
    assert found.files == expected.files, told
    assert found.report == expected.report, told


def draw_moments(draw: random.Random, moments: Mapping[str, Mapping[str, int]], step: str) -> list[Moment]:
    """Draw a moment of a step, and some for those that go on."""
    drawn = [draw_moment(draw, moments, step)]
    while len(drawn) < 4 and draw.random() < AGAIN:
        drawn.append(draw_moment(draw, moments))
    return drawn


def kill_and_compare(name: str, server: Server, tmp_path: Path, draw: random.Random, count: int) -> None:
    kills = Counter[str]()
    with prepared(name, server, tmp_path) as (case, expected):
        steps = sorted(expected.moments)
        assert case.is_one_step or set(steps) == {BEGIN, END, *STEP_OF.values()}
        # Each case begins with another step, so that a sample meets all of them.
        begin = CASES.index(name)
        for number in range(count):
            moments = draw_moments(draw, expected.moments, steps[(begin + number) % len(steps)])
            with attempted(case, server, tmp_path / f"{number:03}") as attempt:
                found = attempt.carry_out(moments)
            told = f"{name}, seed {SEED}, killed at {attempt.kills}"
            assert attempt.kills, told
            refuse_other(found, expected, told)
            shutil.rmtree(attempt.folder)
            kills.update(f"{moment.step} {moment.kind}" for moment in attempt.kills)
    print(f"{name}: seed {SEED}, {kills.total()} kills, {dict(sorted(kills.items()))}")  # noqa: T201


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMHARBOR_EMBEDDING_DIMS", str(DIMS))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_every_source_is_killed() -> None:
    assert set(SOURCES) <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_killed_once_nothing_is_lost_and_nothing_doubled(name: str, server: Server, tmp_path: Path) -> None:
    kill_and_compare(name, server, tmp_path, random.Random(f"{SEED}:{name}:once"), 1)


@pytest.mark.soak
@pytest.mark.parametrize("name", CASES)
def test_killed_at_fifty_moments_nothing_is_lost_and_nothing_doubled(name: str, server: Server, tmp_path: Path) -> None:
    kill_and_compare(name, server, tmp_path, random.Random(f"{SEED}:{name}"), KILLS)


OUTSIDE = [(name, step) for name in SOURCES for step in STEPS]
SAMPLE = random.Random(SEED).sample(OUTSIDE, 2)


@pytest.mark.parametrize(
    ("name", "step"), [pytest.param(*each, marks=() if each in SAMPLE else pytest.mark.soak) for each in OUTSIDE]
)
def test_killed_from_outside_when_a_segment_appears(name: str, step: str, server: Server, tmp_path: Path) -> None:
    draw = random.Random(f"{SEED}:{name}:{step}")
    with prepared(name, server, tmp_path) as (case, expected):
        with attempted(case, server, tmp_path / "killed") as attempt:
            number = draw.randint(1, COUNT // BATCH - 1)
            assert attempt.kill(lambda attempt: attempt.count_segments(step) >= number)
            assert attempt.count_segments(step) >= number
            found = attempt.carry_out()
        refuse_other(found, expected, f"{name}, killed when {step} {number} was there")


def roll_back_and_compare(name: str, server: Server, tmp_path: Path, draw: random.Random, count: int) -> None:
    with ExitStack() as stack:
        (tmp_path / "source").mkdir()
        case = make_case(name, tmp_path / "source", stack, server).with_checkpoint
        with attempted(case, server, tmp_path / "undisturbed") as attempt:
            moments = attempt.carry_out().moments
        for number in range(count):
            with attempted(case, server, tmp_path / f"{number:03}") as attempt:
                attempt.carry_out(draw_moments(draw, moments, BEGIN if number % 2 == 0 else draw.choice([*moments])))
                assert attempt.kills
                assert attempt.tables() != attempt.before
                attempt.roll_back()
                assert attempt.tables() == attempt.before, f"{name}, seed {SEED}, killed at {attempt.kills}"


def test_what_was_killed_and_resumed_is_rolled_back_exactly(server: Server, tmp_path: Path) -> None:
    roll_back_and_compare("conflict-overwrite", server, tmp_path, random.Random(f"{SEED}:back:once"), 1)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["conflict-overwrite", "everything", "history"])
def test_what_was_killed_anywhere_is_rolled_back_exactly(name: str, server: Server, tmp_path: Path) -> None:
    roll_back_and_compare(name, server, tmp_path, random.Random(f"{SEED}:back:{name}"), 20)


# The commit of a segment waits for a lock, as it does for a standby or a busy disk.
LATE = """
create function public.commit_late() returns trigger language plpgsql as
  'begin if new.position = ''6'' then perform pg_catalog.pg_advisory_xact_lock_shared(6); end if; return null; end';
create constraint trigger commit_late after insert or update on memharbor.migration_ledger
  deferrable initially deferred for each row execute function public.commit_late();
select pg_catalog.pg_advisory_lock(6);
"""


@pytest.mark.parametrize(
    "name",
    ["history", *(pytest.param(name, marks=pytest.mark.soak) for name in ("lines", "everything", "conflict-new-id"))],
)
def test_a_commit_that_outlives_its_process_is_waited_for(name: str, server: Server, tmp_path: Path) -> None:
    """The process is killed and the server commits, later than another process begins to go on."""
    with (
        prepared(name, server, tmp_path) as (case, expected),
        attempted(case, server, tmp_path / "killed") as attempt,
        closing(psycopg.connect(attempt.dsn, autocommit=True)) as connection,
        ThreadPoolExecutor(max_workers=1) as executor,
    ):
        connection.execute(LATE)

        def count_waiting(_: Attempt = attempt) -> int:
            query = (
                "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
            )
            row = connection.execute(query).fetchone()
            return row[0] if row else 0

        assert attempt.kill(lambda _: count_waiting() > 0)
        going_on = executor.submit(attempt.carry_out)
        while count_waiting() < 2 and not going_on.done():
            pass
        connection.execute("select pg_catalog.pg_advisory_unlock(6)")
        refuse_other(going_on.result(), expected, name)
