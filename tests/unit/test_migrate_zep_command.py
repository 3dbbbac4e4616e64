"""`migrate export --to zep` of an export file: no database, one user, one conversation, and a check that writes nothing."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from memharbor.commands import cli
from memharbor.stack import provisioner
from tests import zep_server
from tests.command_line import memharbor, ok, refused
from tests.zep_server import ZepServer

EXPORT = ("migrate", "export", "--to", "zep")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("ZEP_API_KEY", zep_server.KEY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(provisioner, "find_checkout", lambda: tmp_path / "checkout")


@pytest.fixture
def zep(monkeypatch: pytest.MonkeyPatch) -> Iterator[ZepServer]:
    with ZepServer() as server:
        monkeypatch.setenv("ZEP_API_URL", server.base_url)
        yield server


def lines() -> list[dict[str, Any]]:
    """Two users, two conversations each, as the Platform exports them (`session_id` is its name of `run_id`)."""
    return [
        {
            "id": f"00000000-0000-4000-8000-{number:012}",
            "memory": f"fact {number}",
            "user_id": f"u{number % 2}",
            "session_id": f"talk-{number % 4}",
            "metadata": {"role": "user", "memory_type": "insights"},
            "created_at": "2026-01-15T10:30:00Z",
        }
        for number in range(16)
    ]


def exported(*more: Any) -> str:
    Path("mem0-export.json").write_text(json.dumps({"results": [*lines(), *more]}), encoding="utf-8")
    return "mem0-export.json"


def texts(*numbers: int) -> list[str]:
    return sorted(f"fact {number}" for number in numbers)


def checked_with(code: int, *arguments: str) -> str:
    """Run a command whose exit code is what it found, and not an error."""
    done = CliRunner().invoke(cli, list(arguments), standalone_mode=False)
    assert done.exception is None
    assert done.return_value == code
    return done.stdout


def test_an_export_goes_to_zep_without_a_database(zep: ZepServer) -> None:
    path = exported({"id": "x", "user_id": "u1"})
    done = ok("", *EXPORT, "--input", path, "--validate")
    assert (done["inserted"], done["unreadable"], done["validation"]["is_complete"]) == (16, {"no-text": 1}, True)
    assert sorted(zep.texts()) == texts(*range(16))
    again = ok("", *EXPORT, "--input", path)
    assert (again["inserted"], again["same"], again["validation"]) == (0, 16, None)
    assert len(zep.episodes) == 16
    said = memharbor("", *EXPORT, "--input", path).output
    assert "16 same" in said
    assert "1 unreadable: no-text" in said


@pytest.mark.parametrize(
    ("chosen", "numbers"),
    [
        (("--users", "u1"), (1, 3, 5, 7, 9, 11, 13, 15)),
        (("--users", "u1", "--session", "talk-3"), (3, 7, 11, 15)),
        (("--session", "talk-2, talk-3"), (2, 3, 6, 7, 10, 11, 14, 15)),
        (("--users", "u0", "--session", "talk-3"), ()),
    ],
)
def test_one_user_and_one_conversation_go_alone(zep: ZepServer, chosen: tuple[str, ...], numbers: tuple[int]) -> None:
    path = exported()
    assert ok("", *EXPORT, "--input", path, *chosen, "--dry-run")["memories"] == len(numbers)
    done = ok("", *EXPORT, "--input", path, *chosen, "--validate")
    assert sorted(zep.texts()) == texts(*numbers)
    assert (done["inserted"], done["validation"]["memories"]) == (len(numbers), len(numbers))


def test_a_conversation_becomes_a_thread(zep: ZepServer) -> None:
    done = ok("", *EXPORT, "--input", exported(), "--users", "u1", "--session", "talk-1", "--threads", "--validate")
    assert (done["inserted"], done["validation"]["is_complete"]) == (4, True)
    assert [each["content"] for each in zep.episodes if "thread_uuid" in each] == [
        "fact 1",
        "fact 5",
        "fact 9",
        "fact 13",
    ]
    assert len(zep.threads) == 1


def test_a_file_in_another_shape_and_packed_goes_as_well(zep: ZepServer) -> None:
    with gzip.open("export.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines())
    assert ok("", *EXPORT, "--input", "export.jsonl.gz")["inserted"] == 16
    assert ok("", *EXPORT, "--input", exported())["same"] == 16


def test_a_dry_run_says_what_would_go_and_asks_nobody(zep: ZepServer, tmp_path: Path) -> None:
    path = exported({"id": "a", "user_id": "u1"}, {"id": "b", "memory": "of an agent", "agent_id": "bot"})
    done = ok("", *EXPORT, "--input", path, "--dry-run")
    assert done == {"dry_run": True, "memories": 16, "refused": 1, "unreadable": {"no-text": 1}}
    assert zep.requests == []
    assert [each.name for each in tmp_path.iterdir()] == [path]


def test_a_check_alone_writes_nothing_and_exits_with_10(zep: ZepServer, tmp_path: Path) -> None:
    path = exported()
    check = (*EXPORT, "--input", path, "--validate-only")
    assert "16 are missing" in checked_with(10, *check)
    assert [each.name for each in tmp_path.iterdir()] == [path]  # no state either
    assert (zep.users, zep.episodes) == ({}, [])
    ok("", *EXPORT, "--input", path)
    state = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    zep.requests.clear()
    assert ok("", *check)["validation"]["is_complete"]
    assert {request.path.split("/")[-1] for request in zep.requests} == {"lookup", "list"}
    assert {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()} == state
    zep.episodes[3]["content"] = "altered there"
    said = checked_with(10, *check)
    assert "1 are there with other contents" in said
    assert f"{zep.episodes[3]['metadata']['memharbor_id']}, part 1: content" in said
    checked_with(10, *EXPORT, "--input", path, "--validate")


def test_an_interrupted_export_goes_on(zep: ZepServer) -> None:
    path = exported()
    zep.faults = [zep_server.Fault("status", "/batches/*/items", status=401)]
    refused(3, "refuses the key", "", *EXPORT, "--input", path)
    assert ok("", *EXPORT, "--input", path, "--validate")["validation"]["is_complete"]
    assert len(zep.keys()) == len(set(zep.keys())) == 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "platform", "--input", "mem0-export.json"), "`--input` is for `--to zep`"),
        (("--to", "file", "--session", "talk-1"), "`--session` is for `--to zep`"),
        (("--to", "sqlite", "--validate-only"), "`--validate-only` is for `--to zep`"),
        (("--to", "zep", "--review", "changed.jsonl"), "`--review` is for `--to platform`"),
        (("--to", "zep", "--session", " , "), "`--session` names nothing"),
        (("--to", "zep", "--input", "none.json"), "does not exist"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments: tuple[str, ...], said: str) -> None:
    exported()
    done = memharbor("postgresql://nobody@127.0.0.1:1/none", "migrate", "export", *arguments)
    assert getattr(done.exception, "exit_code", done.exit_code) == 2
    assert said in getattr(done.exception, "message", done.output)


def test_a_file_that_is_no_export_is_said(zep: ZepServer) -> None:
    Path("notes.json").write_text('{"a": 1}', encoding="utf-8")
    refused(7, "holds no memories", "", *EXPORT, "--input", "notes.json")
    assert zep.texts() == []
