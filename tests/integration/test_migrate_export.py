"""Out of a real database to the services: what is there with other contents, whatever the database was called."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from memharbor.stack import provisioner
from memharbor.target import identify_database
from tests.command_line import memharbor, ok, refused
from tests.platform_server import KEY, Fault, PlatformServer
from tests.zep_server import KEY as ZEP_KEY
from tests.zep_server import ZepServer


@pytest.fixture
def dsn(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One with memories."""
    monkeypatch.setattr(provisioner, "find_checkout", lambda: tmp_path / "checkout")
    monkeypatch.setenv("MEM0_API_KEY", KEY)
    monkeypatch.setenv("ZEP_API_KEY", ZEP_KEY)
    lines = [
        {
            "id": identity(n),
            "memory": f"fact {n}",
            "user_id": ("alice", "bob")[n % 2],
            "run_id": f"talk-{n % 3}",
            "created_at": "2026-01-15T10:30:00+00:00",
            "metadata": {"role": "user", "mood": n / 3},
        }
        for n in range(12)
    ]
    Path("memories.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    ok(dsn, "migrate", "run", "--from", "file", "--input", "memories.jsonl", "--no-checkpoint")
    return dsn


def identity(number: int) -> str:
    return str(uuid.UUID(int=number + 1))


def change(dsn: str, number: int, text: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("update memharbor.memories set memory = %s where id = %s", (text, identity(number)))


def export(platform: PlatformServer, *more: str) -> tuple[str, ...]:
    return ("migrate", "export", "--to", "platform", "--url", platform.base_url, *more)


def test_what_is_there_with_other_contents_is_written_for_review(dsn: str) -> None:
    with PlatformServer() as platform:
        assert ok(dsn, *export(platform))["review"] is None
        change(dsn, 3, "another text")
        platform.memories[5]["memory"] = "edited in the dashboard"
        done = ok(dsn, *export(platform, "--review", "changed.jsonl"))
        assert done["counts"] == {"inserted": 0, "same": 10, "changed": 2, "refused": 0}
        assert done["review"] == "changed.jsonl"
        found = [json.loads(line) for line in Path("changed.jsonl").read_text(encoding="utf-8").splitlines()]
        assert {each["record"]["id"]: each["status"] for each in found} == {
            identity(3): "changed_existing",
            platform.memories[5]["metadata"]["mem0_migration_local_id"]: "changed_there",
        }
        assert {each["platform_memory_id"] for each in found} <= {each["id"] for each in platform.memories}
        assert "another text" in {each["record"]["data"]["data"] for each in found}
        assert Path("changed.jsonl").stat().st_mode & 0o077 == 0
        platform.requests.clear()
        refused(9, "is there already", dsn, *export(platform, "--review", "changed.jsonl"))
        refused(2, "is no folder", dsn, *export(platform, "--review", "none/changed.jsonl"))
        assert platform.requests == []
        assert (
            "2 that are there with other contents are in changed.jsonl"
            in memharbor(dsn, *export(platform, "--review", "changed.jsonl", "--replace")).output
        )


def test_a_review_is_written_whole_or_not_at_all(dsn: str) -> None:
    with PlatformServer() as platform:
        ok(dsn, *export(platform))
        for number in range(12):
            change(dsn, number, f"another text {number}")
        platform.faults = [Fault("status", "/v3/memories/", skip=2, status=401)]  # at the second user
        refused(3, "refuses the key", dsn, *export(platform, "--review", "changed.jsonl"))
        assert [path.name for path in Path().iterdir() if "changed" in path.name] == []
        Path("changed.jsonl").write_text("of an earlier run\n", encoding="utf-8")
        platform.faults = [Fault("status", "/v3/memories/", skip=2, status=401)]
        refused(3, "refuses the key", dsn, *export(platform, "--review", "changed.jsonl", "--replace"))
        assert Path("changed.jsonl").read_text(encoding="utf-8") == "of an earlier run\n"
        assert ok(dsn, *export(platform, "--review", "changed.jsonl", "--replace"))["counts"]["changed"] == 12
        assert len(Path("changed.jsonl").read_text(encoding="utf-8").splitlines()) == 12
        assert ok(dsn, *export(platform, "--review", "other.jsonl", "--dry-run"))["memories"] == 12
        assert not Path("other.jsonl").exists()


def test_another_name_of_the_database_doubles_nothing(dsn: str) -> None:
    parts: dict[str, Any] = conninfo_to_dict(dsn)
    other = make_conninfo(
        "", **{**parts, "host": "another-name.example", "hostaddr": "127.0.0.1", "sslmode": "verify-ca"}
    )
    assert identify_database(other) != identify_database(dsn)
    with PlatformServer(one_of_a_text=False) as platform:
        assert ok(dsn, *export(platform))["counts"]["inserted"] == 12
        assert ok(other, *export(platform))["counts"] == {"inserted": 0, "same": 12, "changed": 0, "refused": 0}
        assert len(platform.memories) == 12
    with ZepServer() as zep:
        to_zep = ("migrate", "export", "--to", "zep", "--url", zep.base_url)
        assert ok(dsn, *to_zep)["inserted"] == 12
        assert ok(other, *to_zep)["same"] == 12
        assert len(zep.episodes) == 12


def test_one_conversation_goes_to_zep_and_is_checked_alone(dsn: str, tmp_path: Path) -> None:
    with ZepServer() as zep:
        to_zep = ("migrate", "export", "--to", "zep", "--url", zep.base_url, "--users", "alice", "--session", "talk-1")
        assert ok(dsn, *to_zep, "--dry-run") == {"dry_run": True, "memories": 2, "refused": 0, "unreadable": {}}
        assert zep.requests == []
        done = ok(dsn, *to_zep, "--validate")
        assert (done["inserted"], done["validation"]["is_complete"]) == (2, True)
        assert sorted(zep.texts()) == ["fact 10", "fact 4"]
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        assert ok(dsn, *to_zep, "--validate-only")["validation"]["there"] == 2
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files


def test_what_was_exported_to_a_file_goes_to_zep_as_the_same_memories(dsn: str) -> None:
    ok(dsn, "migrate", "export", "--output-file", "out.jsonl.gz")
    with ZepServer() as zep:
        to_zep = ("migrate", "export", "--to", "zep", "--url", zep.base_url)
        assert ok("", *to_zep, "--input", "out.jsonl.gz", "--stack", "unborn")["inserted"] == 12
        done = ok(dsn, *to_zep, "--validate")
        assert (done["same"], done["validation"]["is_complete"]) == (12, True)
        assert len(zep.episodes) == 12
