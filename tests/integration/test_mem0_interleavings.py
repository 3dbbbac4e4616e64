"""
Two users' transactions in every order over a few server connections of the pooler: no order shows a foreign row.

`make test` runs a seeded sample, `make soak` a million.
"""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from psycopg_pool import ConnectionPool

from memharbor.mem0 import user_pool
from tests.containers import Server
from tests.memory_database import memory_database

SAMPLE = 2_000
SOAK = 1_000_000
SEED = int(os.environ.get("MEMHARBOR_TEST_SEED", "20261121"))
CLIENTS_PER_USER = 2


class ForeignRowError(AssertionError):
    """A row of somebody else was seen or touched."""


def act(pool: ConnectionPool[Any], user_id: str, other_id: str, chance: random.Random) -> Iterator[None]:
    """One transaction of a user, pausing wherever another one's statement may come between."""
    with user_pool(pool, user_id).connection() as connection:
        yield
        for action in chance.sample(("write", "read", "search", "trespass"), chance.randint(1, 3)):
            if action == "write":
                payload = {"data": "x", "user_id": user_id, "at": chance.randint(0, 9)}
                connection.execute(
                    "insert into mem0 (id, payload) values (%s, %s)", (uuid.uuid4(), psycopg.types.json.Jsonb(payload))
                )
            elif action == "trespass":
                touched = connection.execute(
                    "update memories set memory = 'taken' where user_id = %s", (other_id,)
                ).rowcount
                if touched:
                    raise ForeignRowError(f"{user_id} changed {touched} rows of {other_id}")
            else:
                where = " where payload ->> 'user_id' = %s" if action == "search" else ""
                seen = connection.execute(
                    "select distinct user_id from memories" + where, (other_id,) if where else ()
                ).fetchall()
                if not {row[0] for row in seen} <= {user_id}:
                    raise ForeignRowError(f"{user_id} saw rows of {seen}")
            yield
        if chance.random() < 0.4:
            connection.rollback()
            yield


def look_as_nobody(pool: ConnectionPool[Any]) -> Iterator[None]:
    """A client that never says who it is: it must see nothing, whoever used the server connection before."""
    with pool.connection() as connection:
        yield
        seen = connection.execute("select count(*), memharbor.current_user_id() from memories").fetchone()
        if seen != (0, None):
            raise ForeignRowError(f"nobody saw {seen}")
        yield


def set_for_the_session(pool: ConnectionPool[Any], user_id: str) -> Iterator[None]:
    """A careless client that sets its identity for the session, outside of our code."""
    with pool.connection() as connection:
        connection.execute("select set_config('app.user_id', %s, false)", (user_id,))
        yield
        connection.execute("select count(*) from memories")
        yield


def interleave(count: int, dsn: str, seed: int) -> int:
    """Run so many interleavings; returns how many different orders there were."""
    chance = random.Random(seed)
    users = [f"{name}-{uuid.UUID(int=chance.getrandbits(128))}" for name in ("alice", "bob")]
    orders: set[tuple[int, ...]] = set()
    with ExitStack() as stack:
        pools = [
            stack.enter_context(ConnectionPool(dsn, min_size=CLIENTS_PER_USER, max_size=CLIENTS_PER_USER, open=True))
            for _ in (*users, "nobody")
        ]
        for _ in range(count):
            running: dict[int, Iterator[None]] = {
                0: act(pools[0], users[0], users[1], chance),
                1: act(pools[1], users[1], users[0], chance),
            }
            if chance.random() < 0.3:
                running[2] = look_as_nobody(pools[2])
            if chance.random() < 0.1:
                running[3] = set_for_the_session(pools[2], chance.choice(users))
            order = []
            while running:
                turn = chance.choice(list(running))
                order.append(turn)
                if next(running[turn], "ended") == "ended":
                    del running[turn]
            orders.add(tuple(order))
        for user_id, pool in zip(users, pools, strict=False):
            with user_pool(pool, user_id).connection() as connection:
                connection.execute("delete from memories")
    return len(orders)


@pytest.fixture(scope="module")
def dsn(server: Server) -> str:
    return server.pool_dsn(memory_database(server, "mem0_384", 384), "app")


def test_no_sampled_interleaving_shows_a_foreign_row(dsn: str) -> None:
    assert interleave(SAMPLE, dsn, SEED) > SAMPLE // 2


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_a_million_interleavings_show_no_foreign_row(dsn: str) -> None:
    for chunk in range(SOAK // SAMPLE):
        interleave(SAMPLE, dsn, SEED + chunk)
