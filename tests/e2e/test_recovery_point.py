"""
What a dead host costs: all containers are killed at once under write load.

Where the data volume survives, no acknowledged row is lost. From the store alone only what was acknowledged within the
last minute may be: `archive_timeout` is 60 seconds.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta

import docker
import psycopg
import pytest

from tests.e2e.conftest import Stack
from tests.e2e.crashes import (
    Writer,
    kill_everything,
    new_writer,
    start_everything,
    wait_until_healthy,
    writing,
)

pytestmark = pytest.mark.timeout(1800)

LOSS = timedelta(seconds=60)
figures: list[dict[str, object]] = []


@pytest.fixture(scope="module", autouse=True)
def table(stack: Stack) -> Iterator[None]:
    yield
    with psycopg.connect(stack.dsn("admin", "--direct"), autocommit=True) as connection:
        connection.execute("drop table if exists public.writes")


def lose_the_volume(stack: Stack) -> None:
    """Delete everything on the data volume, while the server is down."""
    with closing(docker.from_env(timeout=120)) as client:
        node = client.containers.get(f"{stack.name}-postgres-0")
        client.containers.run(
            node.attrs["Image"],
            entrypoint=["sh", "-c", "rm -rf /var/lib/postgresql/* && sync"],
            user="0:0",
            volumes={f"{stack.name}-postgres-0": {"bind": "/var/lib/postgresql", "mode": "rw"}},
            network_mode="none",
            remove=True,
        )


def crash(stack: Stack, seconds: float, *, survives: bool) -> dict[str, object]:
    writer: Writer = new_writer(stack)
    if not survives:
        stack.memharbor("backup", "create", "--type", "incr")
    with writing(writer):
        time.sleep(seconds)
        killed_at = kill_everything(stack)
    if survives:
        start_everything(stack)
    else:
        lose_the_volume(stack)
        start_everything(stack)
        stack.memharbor("restore", "--yes")
        wait_until_healthy(stack)
    lost = writer.lost()
    ages = [(killed_at - at).total_seconds() for at in lost.values()]
    result = {
        "volume": "survived" if survives else "lost",
        "acknowledged": len(writer.acknowledged),
        "lost": len(lost),
        "oldest_lost_seconds": round(max(ages, default=0), 1),
    }
    figures.append(result)
    if survives:
        assert lost == {}
    else:
        before = [at for at in writer.acknowledged.values() if at < killed_at - LOSS]
        assert before, "the load was too short to say anything"
        assert max(ages, default=0) <= LOSS.total_seconds(), result
    return result


def test_no_acknowledged_row_is_lost_where_the_volume_survives(stack: Stack) -> None:
    crash(stack, random.Random(1).uniform(3, 8), survives=True)


@pytest.mark.soak
def test_the_store_alone_loses_the_last_minute_at_most(stack: Stack) -> None:
    crash(stack, random.Random(2).uniform(65, 75), survives=False)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
def test_ten_crashes(stack: Stack, seed: int) -> None:
    dice = random.Random(f"crash {seed}")
    crash(stack, dice.uniform(2, 20), survives=True)
    crash(stack, dice.uniform(65, 130), survives=False)


@pytest.fixture(scope="session", autouse=True)
def figures_are_said(record_testsuite_property: Callable[[str, object], None]) -> Iterator[None]:
    """In the report of the run, whichever of the tests were chosen."""
    yield
    if figures:
        record_testsuite_property("recovery_point", json.dumps(figures))
