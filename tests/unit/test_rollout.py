"""The roll-out refuses an inventory that is not the target's own, before it connects anywhere."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from memharbor.errors import ConfigError, ConnectError
from memharbor.rollout import roll_out
from memharbor.settings import Settings, environment_name

CONNECTING = ("roles", "apply", "tenant_indexes", "verify")
OF_THE_TARGET = Settings(database="elsewhere", embedding_dims=384).model_dump()


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A database of 384 dimensions where nobody listens: whoever gets as far as connecting fails with ConnectError."""
    for name in Settings.model_fields:
        monkeypatch.delenv(environment_name(name), raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"postgresql://nobody@127.0.0.1:{taken.getsockname()[1]}/elsewhere?sslmode=disable&connect_timeout=2"
        monkeypatch.setenv("MEMHARBOR_DSN", uri)
        monkeypatch.setenv("MEMHARBOR_EMBEDDING_DIMS", "384")
        yield


def run(action: str, **changes: Any) -> dict[str, Any]:
    settings = OF_THE_TARGET | changes
    return roll_out(action=action, component="tables", stack="", settings=settings, dry_run=True)


@pytest.mark.parametrize("action", [*CONNECTING, "database"])
def test_other_settings_are_refused_by_their_names_before_anything_is_connected(action: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(action, embedding_dims=1536, leakproof=False)
    assert caught.value.message.endswith(" differ in embedding_dims, leakproof")
    assert "the database of MEMHARBOR_DSN" in caught.value.message
    assert caught.value.hints


@pytest.mark.parametrize("name", ["database", "embedding_dims", "pool_size"])
def test_one_setting_is_enough_whatever_it_is_for(name: str) -> None:
    other = "other" if name == "database" else OF_THE_TARGET[name] + 1
    with pytest.raises(ConfigError, match=rf" differ in {name}$"):
        run("verify", **{name: other})


@pytest.mark.parametrize("action", CONNECTING)
def test_with_the_targets_own_settings_it_goes_on_to_the_database(action: str) -> None:
    with pytest.raises(ConnectError):
        run(action)


def test_the_same_value_in_another_spelling_is_no_difference() -> None:
    with pytest.raises(ConnectError):
        run("verify", embedding_dims="384", leakproof="true")


@pytest.mark.parametrize("wrong", [{"embedding_dims": 0}, {"no_such_setting": 1}])
def test_an_inventory_that_is_wrong_in_itself_is_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        run("verify", **wrong)


def test_a_foreign_database_is_taken_as_it_is() -> None:
    assert run("database")["changed"] is False


def test_apply_needs_a_component() -> None:
    with pytest.raises(ConfigError, match="needs a component"):
        roll_out(action="apply", component=None, stack="", settings=OF_THE_TARGET, dry_run=True)
