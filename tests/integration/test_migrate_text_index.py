"""The index of keyword search is kept, or built after the load, and is there in the end whatever happened."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from memharbor.errors import ConnectError
from memharbor.migrate import runs, text_index
from memharbor.migrate.run_folders import find_run
from memharbor.migrate.runs import forget_load
from memharbor.operations import migrations_folder
from memharbor.target import find_target
from tests.command_line import memharbor, ok


@pytest.fixture(autouse=True)
def export(dsn: str) -> None:
    memories = [{"id": f"m{n}", "memory": f"fact {n}", "user_id": "alice"} for n in range(20)]
    Path("export.json").write_text(json.dumps(memories))


def index(dsn: str) -> list[Any]:
    query = "select indexdef from pg_indexes where schemaname = 'memharbor' and indexname = 'memories_text_lemmatized'"
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        return connection.execute(query).fetchall()


def arguments(*more: str) -> list[str]:
    run = ["migrate", "run", "--from", "file", "--input", "export.json", "--no-checkpoint", "--batch-size", "5"]
    return [*run, *more]


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """How often the index was dropped."""
    found = []

    def drop(*given: Any) -> None:
        found.append(True)
        text_index.drop_text_index(*given)

    monkeypatch.setattr(runs, "drop_text_index", drop)
    return found


@pytest.mark.parametrize(("choice", "is_dropped"), [("after", True), ("keep", False), ("auto", False)])
def test_it_is_as_it_was_before(dsn: str, choice: str, is_dropped: bool, dropped: list[bool]) -> None:
    before = index(dsn)
    assert len(before) == 1
    foretold = ok(dsn, *arguments("--text-index", choice, "--dry-run"))
    assert dropped == []
    assert ok(dsn, *arguments("--text-index", choice))["inserted"] == foretold["inserted"] == 20
    assert (index(dsn), dropped == [True]) == (before, is_dropped)
    assert memharbor(dsn, "schema", "verify").exit_code == 0


def test_a_run_that_was_stopped_builds_it_when_it_goes_on(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = index(dsn)
    with monkeypatch.context() as patch:

        def stop(*_: Any) -> None:
            raise ConnectError("the connection was lost")

        patch.setattr(runs, "build_text_index", stop)
        assert memharbor(dsn, *arguments("--text-index", "after")).exception is not None
    assert index(dsn) == []
    assert ok(dsn, "migrate", "resume")["inserted"] == 20
    assert index(dsn) == before


def test_a_rollback_builds_it_too(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = index(dsn)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "build_text_index", lambda *_: None)
        ok(dsn, *arguments("--text-index", "after"))
    assert index(dsn) == []
    folder = find_run(migrations_folder("dev", dsn), None)
    folder.write_json(runs.TEXT_INDEX, {"is_built": False})
    forget_load(folder, find_target("dev", dsn))
    assert index(dsn) == before


def test_it_is_built_after_a_load_that_is_large_beside_what_is_there(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_index, "_ROWS_MIN", 20)
    ok(dsn, *arguments("--text-index", "keep"))
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        sizes = (0, 19, 20, 199, 200, 10_000)
        chosen = [text_index.is_built_after(connection, "auto", items) for items in sizes]
        assert chosen == [False, False, False, False, True, True]
        assert text_index.is_built_after(connection, "keep", 10_000) is False
        assert text_index.is_built_after(connection, "after", 0) is True
