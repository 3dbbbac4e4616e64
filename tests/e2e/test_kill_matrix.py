"""
`kill -9` at any moment of a backup, a restore, a rollback and a drill.

Whoever dies (the command, pgBackRest, PostgreSQL, the backup store): nothing acknowledged is lost, and what helps is the
same command once more, never a repair by hand. `make test` runs a seeded sample, `make soak` the whole.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from tests.e2e.conftest import ROOT, Stack
from tests.e2e.crashes import containers, kill_processes, wait_until_healthy

pytestmark = pytest.mark.timeout(1800)

OPERATIONS = ("backup", "restore", "rollback", "drill")
VICTIMS = {"command": "", "pgbackrest": "pgbackrest", "postgres": "postgres", "store": "versitygw"}
ENDS_SECONDS = 300
POINT = "kill-matrix"

outcomes: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Case:
    """One kill: of whom, under what, and after which share of the time that the command takes undisturbed."""

    operation: str
    victim: str
    share: float

    def __str__(self) -> str:
        return f"{self.operation}-{self.victim}-{self.share:.2f}"


def draw(seed: int) -> list[Case]:
    """Every operation with every victim once, each at a moment of the seed's."""
    dice = random.Random(f"kill {seed}")
    return [Case(operation, victim, dice.uniform(0.02, 0.98)) for operation in OPERATIONS for victim in VICTIMS]


# Every operation and every victim once.
SAMPLE = [case for place, case in enumerate(draw(0)) if place % 5 == 0]
WHOLE = [case for seed in (1, 2) for case in draw(seed)]


@pytest.fixture(scope="module", autouse=True)
def prepared(stack: Stack) -> Iterator[dict[str, float]]:
    """A backup, a point, a checkpoint and rows on either side; yields the seconds of each undisturbed command."""
    with connect(stack) as connection:
        connection.execute("drop table if exists public.kills")
        connection.execute("create table public.kills (mark text primary key)")
        connection.execute("insert into public.kills values ('before the point')")
    stack.memharbor("backup", "create", "--type", "full")
    stack.memharbor("checkpoint", "create", POINT)
    with connect(stack) as connection:
        connection.execute("select pg_create_restore_point(%s)", (POINT,))
        connection.execute("insert into public.kills values ('after the point')")
    seconds = {}
    for operation in OPERATIONS:
        begun_at = time.monotonic()
        stack.memharbor(*command(operation))
        seconds[operation] = time.monotonic() - begun_at
    yield seconds
    stack.memharbor("checkpoint", "delete", POINT, "--yes", check=False)
    with connect(stack) as connection:
        connection.execute("drop table if exists public.kills")


def connect(stack: Stack) -> psycopg.Connection[Any]:
    return psycopg.connect(stack.dsn("admin", "--direct"), autocommit=True)


def command(operation: str) -> tuple[str, ...]:
    return {
        "backup": ("backup", "create", "--type", "incr"),
        "restore": ("restore", "--name", POINT, "--yes"),
        "rollback": ("rollback", "--to", POINT, "--yes"),
        "drill": ("drill",),
    }[operation]


def kill_under(stack: Stack, case: Case, seconds: float) -> tuple[int, str]:
    """Run the case's command, kill its victim in the middle, and wait for the command's own end."""
    with subprocess.Popen(
        ["memharbor", *command(case.operation)],
        cwd=ROOT,
        env=stack.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        time.sleep(case.share * seconds)
        if case.victim == "command":
            process.send_signal(signal.SIGKILL)
        else:
            kill_processes(stack, VICTIMS[case.victim])
        _, said = process.communicate(timeout=ENDS_SECONDS)
    return process.returncode, said


def survive(stack: Stack, case: Case, seconds: float) -> None:
    with connect(stack) as connection:
        mark = f"acknowledged before {case} {time.monotonic_ns()}"
        connection.execute("insert into public.kills values (%s)", (mark,))
    fingerprints = memories(stack)
    code, said = kill_under(stack, case, seconds)
    outcomes.append({"case": str(case), "exit_code": code})
    # What helps is the same command, and nothing else.
    if code != 0:
        assert code in (-signal.SIGKILL, 4, 6, 9, 10), said
        again = stack.memharbor(*command(case.operation), check=False)
        if again.returncode != 0 and case.victim in ("postgres", "store"):
            wait_until_healthy(stack)  # it was still starting
            again = stack.memharbor(*command(case.operation), check=False)
        assert again.returncode == 0, f"{said}\nand again:\n{again.stderr}"
    wait_until_healthy(stack)
    with psycopg.connect(stack.dsn("service"), autocommit=True, connect_timeout=20) as connection:
        assert connection.execute("select 1").fetchone() == (1,), "clients of the pool are served"
    with connect(stack) as connection:
        marks = {found for (found,) in connection.execute("select mark from public.kills")}
    if case.operation == "restore":
        assert marks == {"before the point"}
    elif case.operation in ("backup", "drill"):
        assert {"before the point", mark} <= marks, "an acknowledged row is lost"
    assert memories(stack) == fingerprints
    stack.memharbor("backup", "create", "--type", "incr")
    stack.memharbor("backup", "verify")
    left = {name for name, container in containers(stack).items() if is_throw_away(container)}
    assert left == set(), "throw-away containers are left"


def memories(stack: Stack) -> list[tuple[Any, ...]]:
    with connect(stack) as connection:
        return connection.execute(
            "select * from memharbor.fingerprint_users() where table_name <> 'memory_history' order by 1, 2"
        ).fetchall()


def is_throw_away(container: Any) -> bool:
    return str(container.attrs["HostConfig"]["RestartPolicy"]["Name"]) != "unless-stopped"


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_a_sample_of_kills(stack: Stack, case: Case, prepared: dict[str, float]) -> None:
    survive(stack, case, prepared[case.operation])


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_every_kill(stack: Stack, case: Case, prepared: dict[str, float]) -> None:
    survive(stack, case, prepared[case.operation])


@pytest.fixture(scope="session", autouse=True)
def outcomes_are_said(record_testsuite_property: Callable[[str, object], None]) -> Iterator[None]:
    """In the report of the run, whichever of the tests were chosen."""
    yield
    if outcomes:
        record_testsuite_property("kills", json.dumps(outcomes))


def test_the_sample_and_the_whole_cover_every_operation_and_victim() -> None:
    assert {case.operation for case in SAMPLE} == set(OPERATIONS)
    assert {case.victim for case in SAMPLE} == set(VICTIMS)
    assert len(WHOLE) >= 30
    assert {(case.operation, case.victim) for case in WHOLE} == {(o, v) for o in OPERATIONS for v in VICTIMS}
