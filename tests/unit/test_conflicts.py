"""What keeps a config from being deployed here: decided without looking, and the looking itself on real sockets."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from memharbor.errors import ConfigError
from memharbor.settings import load_settings
from memharbor.stack.conflicts import dims_conflicts, is_local_engine, is_taken, port_conflicts

DEPLOYED = {"embedding_dims": 384, "database": "memharbor"}


def held(ports: dict[int, tuple[str, str]]) -> Callable[[str, int], tuple[str, str] | None]:
    return lambda address, port: ports.get(port)


def test_every_port_of_somebody_else_is_named_with_its_setting_and_a_free_one() -> None:
    holders = held({7000: ("", ""), 7001: ("other", "other-pgbouncer-0"), 7002: ("", "")})
    assert port_conflicts("dev", {"postgres_port": "7000", "pool_port": "7001"}, holders) == [
        "postgres_port: 7000 is in use by another program; run `pulumi config set postgres_port 7003 --stack dev`",
        "pool_port: 7001 is in use by `other-pgbouncer-0` of stack `other`;"
        " run `pulumi config set pool_port 7003 --stack dev`",
    ]


def test_the_stacks_own_container_may_have_its_port() -> None:
    assert port_conflicts("dev", {}, held({15432: ("dev", "dev-postgres-0"), 6432: ("dev", "dev-pgbouncer-0")})) == []


@pytest.mark.parametrize("wrong", ["", "x", "-1", "0", "99999", "²"])
def test_what_is_no_port_is_left_to_the_settings(wrong: str) -> None:
    settings = {"postgres_port": wrong}
    assert port_conflicts("dev", settings, lambda address, port: None if port == 6432 else ("", "")) == []
    with pytest.raises(ConfigError, match="postgres_port"):
        load_settings(("stack dev", settings))


def test_the_address_to_be_published_on_is_what_is_asked_for() -> None:
    asked = set()

    def find(address: str, port: int) -> None:
        asked.add(address)

    port_conflicts("dev", {"bind_address": "0.0.0.0"}, find)
    assert asked == {"0.0.0.0"}


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("listener", ["127.0.0.1", "0.0.0.0"])
def test_a_port_is_taken_while_somebody_listens(address: str, listener: str) -> None:
    with socket.create_server((listener, 0)) as server:
        port = server.getsockname()[1]
        assert is_taken(address, port)
    assert not is_taken(address, port)


def test_an_address_that_this_machine_has_not_is_not_taken() -> None:
    assert not is_taken("192.0.2.1", 5432)


@pytest.mark.parametrize(
    ("host", "local"),
    [("", True), ("unix:///run/user/1000/docker.sock", True), ("ssh://me@db", False), ("tcp://127.0.0.1:2376", False)],
)
def test_ports_are_only_looked_at_where_the_engine_publishes_here(host: str, local: bool) -> None:
    assert is_local_engine(host) is local


def test_other_dimensions_than_those_of_the_memories_are_refused_with_the_way_back() -> None:
    (problem,) = dims_conflicts("dev", {"embedding_dims": "768"}, DEPLOYED, lambda: True)
    assert "embedding_dims: 768" in problem
    assert "pulumi config set embedding_dims 384 --stack dev" in problem


@pytest.mark.parametrize(
    ("settings", "deployed", "has_memories"),
    [
        ({"embedding_dims": "384"}, DEPLOYED, True),
        ({"embedding_dims": "768"}, DEPLOYED, False),
        ({"embedding_dims": "768", "database": "other"}, DEPLOYED, True),
        ({"embedding_dims": "many"}, DEPLOYED, True),
        ({"embedding_dims": "768"}, {}, True),
    ],
)
def test_other_dimensions_are_allowed_where_nothing_has_any(
    settings: dict[str, str], deployed: dict[str, object], has_memories: bool
) -> None:
    assert dims_conflicts("dev", settings, deployed, lambda: has_memories) == []


def test_conflicts_are_told_with_all_other_problems() -> None:
    with pytest.raises(ConfigError, match="2 wrong settings") as caught:
        load_settings(("stack dev", {"pool_size": "0"}), conflicts=["pool_port: 6432 is in use"])
    assert "pool_size" in caught.value.message
    assert "pool_port: 6432 is in use" in caught.value.message
    with pytest.raises(ConfigError, match="1 wrong setting:\n  pool_port: 6432 is in use"):
        load_settings(conflicts=["pool_port: 6432 is in use"])
