from __future__ import annotations

import copy
import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from memharbor import versions
from memharbor.errors import ConfigError
from memharbor.mem0 import UserPool, user_pool


class FakeConnection:
    def __init__(self, *, autocommit: bool = False) -> None:
        self.autocommit = autocommit
        self.executed: list[tuple[str, Any]] = []

    def execute(self, statement: str, parameters: Any = None) -> None:
        self.executed.append((statement, parameters))


class FakePool:
    """What psycopg_pool.ConnectionPool promises, as far as `user_pool` uses it."""

    def __init__(self, *, autocommit: bool = False) -> None:
        self.lent = FakeConnection(autocommit=autocommit)
        self.timeouts: list[float | None] = []
        self.events: list[str] = []

    @contextmanager
    def connection(self, timeout: float | None = None) -> Iterator[FakeConnection]:
        self.timeouts.append(timeout)
        self.events.append("lent")
        try:
            yield self.lent
        except BaseException:
            self.events.append("rolled back")
            raise
        self.events.append("committed")

    def close(self) -> None:
        self.events.append("closed")


def bind(pool: FakePool, user_id: str) -> UserPool:
    return user_pool(pool, user_id)  # type: ignore[arg-type]  # a fake with the methods that are used


def test_the_identity_is_set_before_anything_else_in_the_transaction() -> None:
    pool = FakePool()
    with bind(pool, "alice").connection() as connection:
        connection.execute("select 1")
    assert pool.lent.executed == [
        ("select set_config('app.user_id', %s, true)", ("alice",)),
        ("select 1", None),
    ]
    assert pool.events == ["lent", "committed"]


def test_an_error_in_the_block_reaches_the_pool() -> None:
    pool = FakePool()
    with pytest.raises(KeyError), bind(pool, "alice").connection():
        raise KeyError("x")
    assert pool.events == ["lent", "rolled back"]


def test_a_timeout_reaches_the_pool() -> None:
    pool = FakePool()
    with bind(pool, "alice").connection(timeout=2.5):
        pass
    with bind(pool, "alice").connection():
        pass
    assert pool.timeouts == [2.5, None]


def test_closing_leaves_the_shared_pool_open() -> None:
    pool = FakePool()
    bound = bind(pool, "alice")
    bound.close()
    del bound
    assert pool.events == []


def test_a_deep_copy_is_the_same_object() -> None:
    bound = bind(FakePool(), "alice")
    assert copy.deepcopy({"config": [bound]})["config"][0] is bound


def test_a_pool_in_autocommit_is_refused_when_it_is_used() -> None:
    pool = FakePool(autocommit=True)
    with pytest.raises(ConfigError, match="autocommit"), bind(pool, "alice").connection():
        pass
    assert pool.lent.executed == []


@pytest.mark.parametrize("user_id", [None, 7, b"alice", ["alice"]])
def test_a_user_that_is_no_text_is_refused(user_id: Any) -> None:
    with pytest.raises(TypeError, match="must be a str"):
        bind(FakePool(), user_id)


@pytest.mark.parametrize("user_id", ["", " ", " alice", "alice\n", "ali\0ce"])
def test_a_user_that_cannot_be_an_identity_is_refused(user_id: str) -> None:
    with pytest.raises(ValueError, match="user_id"):
        bind(FakePool(), user_id)


@pytest.mark.parametrize("user_id", ["alice", "o'brien", 'quo"te', "名前", "a" * 10_000, "'; drop table memories; --"])
def test_any_other_user_is_passed_on_as_a_parameter(user_id: str) -> None:
    pool = FakePool()
    with bind(pool, user_id).connection():
        pass
    assert pool.lent.executed == [("select set_config('app.user_id', %s, true)", (user_id,))]


def test_the_representation_names_the_user_and_no_connection() -> None:
    assert repr(bind(FakePool(), "alice")) == "UserPool(user_id='alice')"


def test_mem0_is_the_pinned_release_and_unmodified() -> None:
    installed = distribution("mem0ai")
    assert installed.version == versions.MEM0AI
    sources = [file for file in installed.files or [] if file.suffix == ".py" and file.hash is not None]
    assert len(sources) > 100
    for file in sources:
        assert file.hash is not None
        digest = urlsafe_b64encode(hashlib.new(file.hash.mode, Path(file.locate()).read_bytes()).digest())
        assert digest.rstrip(b"=").decode() == file.hash.value, f"{file} was changed after it was installed"
