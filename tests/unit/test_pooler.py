"""Pause, kill and resume: what is decided from what PgBouncer answers, against a console that behaves like its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from memharbor.containers import Finished
from memharbor.errors import ExternalToolError, StateRefusedError
from memharbor.pooler import Pooler

DATABASES = ("memharbor", "memharbor_ro")


@dataclass
class Console:
    """One PgBouncer: its databases, and whether a transaction of theirs outlasts every patience."""

    paused: dict[str, bool] = field(default_factory=lambda: dict.fromkeys((*DATABASES, "other"), False))
    busy: set[str] = field(default_factory=set)
    is_running: bool = True
    broken: str = ""
    said: list[str] = field(default_factory=list)

    def answer(self, statement: str) -> Finished:
        self.said.append(statement)
        if self.broken:
            return Finished(2, "", f"psql: error: {self.broken}\n")
        if statement == "show databases":
            rows = "".join(f"{name},{int(paused)}\n" for name, paused in self.paused.items())
            return Finished(0, f"name,paused\n{rows}", "")
        if statement == "show pools":
            return Finished(0, 'database,user\n"odd, name",app\n', "")
        verb, database = re.fullmatch(r"(pause|kill|resume) \"?([^\"]+)\"?", statement).groups()  # type: ignore[union-attr]
        if database not in self.paused:
            return Finished(1, "", f'ERROR:  no such database: "{database}"\n')
        if verb == "resume":
            if not self.paused[database]:
                return Finished(1, "", f"ERROR:  database {database} is not paused\n")
            self.paused[database] = False
            return Finished(0, "RESUME\n", "")
        if verb == "pause" and self.paused[database]:
            return Finished(1, "", "ERROR:  already suspended/paused\n")
        if verb == "pause" and database in self.busy:
            return Finished(124, "", "")  # `timeout` ended psql; PgBouncer takes the pause back with its connection
        self.paused[database] = True
        return Finished(0, f"{verb.upper()}\n", "")


class Engine:
    """A Docker engine that knows nothing but PgBouncers."""

    def __init__(self, **consoles: Console) -> None:
        self.consoles = consoles
        self.commands: list[list[str]] = []

    def is_running(self, name: str) -> bool:
        return self.consoles[name].is_running

    def execute(self, name: str, command: Sequence[str], **_: Any) -> Finished:
        if not self.consoles[name].is_running:
            raise StateRefusedError(f"container `{name}` is not running")
        self.commands.append(list(command))
        return self.consoles[name].answer(command[command.index("--command") + 1])


def pooler(**consoles: Console) -> tuple[Pooler, Engine]:
    engine = Engine(**consoles)
    return Pooler(cast(Any, engine), list(consoles)), engine


def test_pausing_waits_for_transactions_and_drops_nobody() -> None:
    console = Console()
    steered, engine = pooler(one=console)
    assert steered.pause(DATABASES, timeout_seconds=7) == []
    assert console.paused == {"memharbor": True, "memharbor_ro": True, "other": False}
    assert [statement.split()[0] for statement in console.said] == ["pause", "pause"]
    assert all(command[:2] == ["timeout", "7"] for command in engine.commands)


def test_who_does_not_end_in_time_is_dropped_and_said() -> None:
    console = Console(busy={"memharbor"})
    steered, _ = pooler(one=console)
    assert steered.pause(DATABASES) == ["memharbor"]
    # Dropped or not: nobody gets in before the end.
    assert console.paused["memharbor"]
    assert console.paused["memharbor_ro"]
    assert [statement.split()[0] for statement in console.said] == ["pause", "kill", "pause"]


def test_a_database_that_is_paused_already_is_left_so_and_nobody_is_dropped() -> None:
    console = Console()
    console.paused["memharbor"] = True
    steered, _ = pooler(one=console)
    assert steered.pause(DATABASES) == []
    assert not any(statement.startswith("kill") for statement in console.said)
    assert console.paused["memharbor_ro"]


def test_a_database_is_named_once_however_many_poolers_dropped_it() -> None:
    steered, _ = pooler(one=Console(busy={"memharbor"}), two=Console(busy=set(DATABASES)))
    assert steered.pause(DATABASES) == ["memharbor", "memharbor_ro"]


def test_a_pooler_that_refuses_to_pause_and_to_kill_stops_the_restore_in_its_own_words() -> None:
    steered, _ = pooler(one=Console(broken="no pgbouncer here"))
    with pytest.raises(ExternalToolError, match="no pgbouncer here") as caught:
        steered.pause(DATABASES)
    assert caught.value.hints == ("run `docker logs one`",)


def test_an_unknown_database_is_an_error_and_not_taken_for_paused() -> None:
    steered, _ = pooler(one=Console())
    with pytest.raises(ExternalToolError, match="no such database"):
        steered.pause(["nowhere"])


def test_resuming_touches_only_what_is_paused_and_asked_for() -> None:
    console = Console(paused={"memharbor": True, "memharbor_ro": False, "other": True})
    steered, _ = pooler(one=console)
    steered.resume(DATABASES)
    assert console.paused == {"memharbor": False, "memharbor_ro": False, "other": True}
    steered.resume(DATABASES)
    assert [statement for statement in console.said if statement.startswith("resume")] == [console.said[1]]


def test_a_pooler_that_does_not_run_is_left_alone() -> None:
    stopped, running = Console(is_running=False), Console()
    steered, _ = pooler(one=stopped, two=running)
    assert steered.pause(DATABASES) == []
    steered.resume(DATABASES)
    assert stopped.said == []
    assert not any(running.paused.values())


def test_pausing_and_resuming_come_back_to_where_they_began() -> None:
    one, two = Console(busy={"memharbor"}), Console()
    steered, _ = pooler(one=one, two=two)
    steered.pause(DATABASES)
    steered.resume(DATABASES)
    assert not any((*one.paused.values(), *two.paused.values()))


def test_tables_are_read_as_csv_from_every_pooler() -> None:
    steered, _ = pooler(one=Console(), two=Console())
    assert steered.show("pools") == [
        {"pooler": name, "database": "odd, name", "user": "app"} for name in ("one", "two")
    ]


def test_names_are_quoted() -> None:
    console = Console(paused={"we ird": False})
    steered, _ = pooler(one=console)
    steered.pause(["we ird"])
    assert console.said == ['pause "we ird"']
