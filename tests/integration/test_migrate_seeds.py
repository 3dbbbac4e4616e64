"""Every migration command of the seeds has its equal here, and each of them runs in the order of the table."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import ok
from tests.integration.test_migrate_commands import ids
from tests.memory_database import Server
from tests.platform_server import KEY, PlatformServer, memory_of
from tests.schema_databases import DIMS, scratch_database

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "seed-migrations.md"


@pytest.fixture
def dsn(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MEMHARBOR_EMBEDDING_DIMS", str(DIMS))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with scratch_database(server) as name:
        yield server.admin_dsn(name)


def test_every_command_runs(dsn: str) -> None:
    commands = [ours for _, ours in re.findall(r"^\| `(.+?)` \| `(memharbor .+?)` \|$", PAGE.read_text(), re.MULTILINE)]
    assert len(commands) == 11
    memories = [memory_of(f"fact {n}", n, user_id=f"user-{n % 4}") for n in range(40)]
    found = {}
    with PlatformServer(memories) as platform:
        for command in commands:
            arguments = shlex.split(command.removeprefix("memharbor "))
            if "platform" in arguments:
                arguments += ["--url", platform.base_url]
            found[command] = ok(dsn, *arguments, MEM0_API_KEY=KEY)
            if "--dry-run" in arguments:
                assert ids(dsn) == set()
    results = list(found.values())
    assert results[0]["items"] == results[1]["items"] == {"memory": 40}
    assert (results[2]["inserted"], results[3]["inserted"]) == (40, 40)
    # Thirty of them are of the users that were asked for, and get their embeddings; the last ten later.
    assert (results[4]["updated"], results[4]["not_chosen"]) == (30, 0)
    assert results[5]["embedded"] == 10
    assert (results[6]["missing"], results[6]["different"]) == (0, 0)
    assert {run["state"] for run in results[7]} == {"complete"}
    assert len(ids(dsn)) == 40
