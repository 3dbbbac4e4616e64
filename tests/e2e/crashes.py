"""What crashes a stack, who writes meanwhile, and how it is seen to be well again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import docker
import docker.errors
import psycopg
import pytest

from tests.e2e.conftest import Stack

HEALTHY_SECONDS = 120
# Kills by the name that a process has, inside a container: no image has procps.
_KILL = (
    'for p in /proc/[0-9]*; do read -r n < $p/comm && [ "$n" = "$0" ] && kill -9 "${p#/proc/}"; done 2>/dev/null; true'
)


def containers(stack: Stack) -> dict[str, Any]:
    """The running containers of the stack by name, jobs and throw-away ones among them."""
    client = docker.from_env(timeout=120)
    found = client.containers.list(filters={"label": f"memharbor.stack={stack.name}"})
    return {str(container.name): container for container in found}


def kill_processes(stack: Stack, name: str) -> int:
    """`kill -9` every process of a name in every container of the stack; returns how many containers were asked."""
    asked = 0
    for container in containers(stack).values():
        try:
            container.exec_run(["sh", "-c", _KILL, name])
        except docker.errors.APIError:
            continue  # it ended in between
        asked += 1
    return asked


def kill_everything(stack: Stack) -> datetime:
    """Kill all containers at once, as a host does that loses its power, disk caches excepted; returns when."""
    running = list(containers(stack).values())
    at = datetime.now(UTC)
    with ThreadPoolExecutor(len(running)) as pool:
        list(pool.map(lambda container: container.kill(), running))
    return at


def start_everything(stack: Stack) -> None:
    """Start what serves again, as the engine of a host does that comes back, and wait until all of it is healthy."""
    with closing(docker.from_env(timeout=120)) as client:
        for container in client.containers.list(all=True, filters={"label": f"memharbor.stack={stack.name}"}):
            if container.attrs["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped":
                container.start()
    wait_until_healthy(stack)


def wait_until_healthy(stack: Stack) -> None:
    """Wait until each service of the stack is healthy; fails after `HEALTHY_SECONDS`."""
    deadline = time.monotonic() + HEALTHY_SECONDS
    states: dict[str, str] = {}
    with closing(docker.from_env(timeout=120)) as client:
        while time.monotonic() < deadline:
            found = client.containers.list(all=True, filters={"label": f"memharbor.stack={stack.name}"})
            states = {
                str(container.name): container.attrs["State"].get("Health", {}).get("Status", container.status)
                for container in found
                if container.attrs["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
            }
            if states and set(states.values()) == {"healthy"}:
                return
            time.sleep(0.5)
    pytest.fail(f"not healthy after {HEALTHY_SECONDS} s: {states}")


@dataclass
class Writer:
    """
    One client that commits a row at a time into `public.writes`, for as long as it is let.

    Args:
        acknowledged: When each row's commit was acknowledged, by its number.
    """

    dsn: str
    acknowledged: dict[int, datetime] = field(default_factory=dict)

    def run(self, stop: threading.Event) -> None:
        number = max(self.acknowledged, default=0)
        while not stop.is_set():
            try:
                with psycopg.connect(self.dsn, autocommit=True, connect_timeout=5) as connection:
                    while not stop.is_set():
                        number += 1
                        connection.execute(
                            "insert into public.writes select %s, string_agg(md5(random()::text), '')"
                            " from generate_series(1, 60)",
                            (number,),
                        )
                        self.acknowledged[number] = datetime.now(UTC)
            except psycopg.Error:
                time.sleep(0.2)

    def lost(self) -> dict[int, datetime]:
        """The acknowledged rows that are not there, with when they were acknowledged."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            there = {number for (number,) in connection.execute("select number from public.writes")}
        return {number: at for number, at in self.acknowledged.items() if number not in there}


@contextmanager
def writing(writer: Writer) -> Iterator[Writer]:
    """Let a writer write in the background."""
    stop = threading.Event()
    thread = threading.Thread(target=writer.run, args=(stop,))
    thread.start()
    try:
        yield writer
    finally:
        stop.set()
        thread.join(timeout=60)


def new_writer(stack: Stack) -> Writer:
    """A writer with an empty table of its own."""
    dsn = stack.dsn("admin", "--direct")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("drop table if exists public.writes")
        connection.execute("create table public.writes (number bigint primary key, filler text)")
    return Writer(dsn)
