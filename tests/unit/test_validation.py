from __future__ import annotations

import sys

import psycopg
import pytest

from memharbor.errors import StateRefusedError
from memharbor.settings import Settings
from memharbor.validation import CHECKS, CheckResult, ValidationContext, run_checks, runner
from memharbor.validation.probe import Probe
from memharbor.validation.results import CheckError, NotApplicableError, require
from memharbor.validation.runner import run_check

NOBODY_LISTENS = "postgresql://app:s3cret@127.0.0.1:1/memharbor"  # pragma: allowlist secret
CONTEXT = ValidationContext(Settings(), NOBODY_LISTENS, NOBODY_LISTENS, NOBODY_LISTENS, is_pooled=True)


def test_the_checks_are_the_nine_of_the_validation_suite() -> None:
    assert [name for name, _ in CHECKS] == [
        "pgvector",
        "tables",
        "indexes",
        "row level security",
        "connection pooling",
        "backup",
        "memory CRUD",
        "vector search",
        "graph",
    ]


def test_a_database_out_of_reach_is_told_once_with_the_next_command_and_without_the_password() -> None:
    told: list[CheckResult] = []
    results = run_checks(CONTEXT, on_result=told.append)
    assert told == results
    assert [result.name for result in results] == [*(name for name, _ in CHECKS), "clean-up"]
    first, *others = results
    assert first.state == "failed"
    assert "cannot connect to postgresql://app@127.0.0.1:1/memharbor" in first.detail
    assert first.hint == "memharbor doctor"
    assert {(result.state, result.detail) for result in others} == {("not run", "`pgvector` could not connect")}
    assert not any("s3cret" in result.detail + result.hint for result in results)


def test_a_server_that_is_lost_on_the_way_ends_the_checks_but_not_the_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(probe: Probe) -> str:
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    def refuse(probe: Probe) -> str:
        raise psycopg.errors.InsufficientPrivilege("permission denied")

    checks = (("one", refuse), ("two", lose), ("three", lambda probe: "never made"))
    monkeypatch.setattr(runner, "CHECKS", checks)
    monkeypatch.setattr(runner, "remove_probes", lambda probe: "0 memories removed")
    results = run_checks(CONTEXT)
    assert [(result.name, result.state, result.hint) for result in results] == [
        ("one", "failed", ""),
        ("two", "failed", "memharbor doctor"),
        ("three", "not run", ""),
        ("clean-up", "ok", ""),
    ]


def fail(error: Exception) -> CheckResult:
    def check(probe: Probe) -> str:
        raise error

    return run_check("name", check, Probe(CONTEXT))


def test_a_check_that_passes_keeps_what_it_found() -> None:
    result = run_check("name", lambda probe: "all is well", Probe(CONTEXT))
    assert (result.name, result.state, result.ok, result.detail, result.hint) == ("name", "ok", True, "all is well", "")
    assert result.seconds >= 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (CheckError("wrong", "do this"), ("failed", "wrong", "do this")),
        (NotApplicableError("not here"), ("not applicable", "not here", "")),
        (StateRefusedError("refused", hint=("one", "two")), ("failed", "refused", "one; two")),
        (KeyError("broken"), ("failed", "KeyError: 'broken'", "")),
    ],
)
def test_whatever_a_check_raises_is_its_result(error: Exception, expected: tuple[str, str, str]) -> None:
    result = fail(error)
    assert (result.state, result.detail, result.hint) == expected
    assert not result.ok


def test_an_interrupt_ends_the_run_after_the_clean_up() -> None:
    told: list[str] = []

    def interrupt(result: CheckResult) -> None:
        told.append(result.name)
        if len(told) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_checks(CONTEXT, on_result=interrupt)
    assert told == ["pgvector", "clean-up"]


def test_mem0_that_is_not_installed_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mem0", None)
    with Probe(CONTEXT) as probe, pytest.raises(CheckError, match="Mem0 is not installed") as caught:
        probe.mem0(None)  # type: ignore[arg-type]  # never reached
    assert caught.value.hint == "pip install 'memharbor[mem0]'"


def test_require_fails_with_its_hint() -> None:
    require(True, "not raised")
    with pytest.raises(CheckError, match="wrong") as caught:
        require(False, "wrong", "do this")
    assert caught.value.hint == "do this"


def test_two_runs_have_different_users() -> None:
    one, other = Probe(CONTEXT), Probe(CONTEXT)
    assert len({one.alice, one.bob, other.alice, other.bob}) == 4
    assert one.alice.startswith("memharbor-validate-")
