"""The first program that a developer copies, run as they would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.containers import Server
from tests.memory_database import memory_database

ROOT = Path(__file__).resolve().parents[2]


def run(**environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENAI", "OPENROUTER", "MEMHARBOR", "MEM0"))
    }
    return subprocess.run(
        [sys.executable, "examples/quickstart.py"],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT / "cli"), **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_quickstart_runs_without_a_key_and_again(server: Server) -> None:
    database = memory_database(server, "mem0_384", 384)
    environ = {
        "MEMHARBOR_SERVICE_DSN": server.pool_dsn(database, "service"),
        "MEMHARBOR_APP_DSN": server.pool_dsn(database, "app"),
        "MEMHARBOR_EMBEDDING_DIMS": "384",
    }
    first, second = run(**environ), run(**environ)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == second.stdout
    assert "memharbor-hash-v1, 384 dimensions" in first.stdout
    assert first.stdout.count("Bob is allergic to cats") == 2
    assert "quickstart-alice asks for everything of quickstart-bob: 0 memories" in first.stdout
    for password in server.passwords.values():
        assert password not in first.stdout


def test_the_quickstart_fails_when_isolation_does(server: Server) -> None:
    database = memory_database(server, "mem0_384", 384)
    everything = server.pool_dsn(database, "service")
    done = run(MEMHARBOR_SERVICE_DSN=everything, MEMHARBOR_APP_DSN=everything, MEMHARBOR_EMBEDDING_DIMS="384")
    assert done.returncode == 1
    assert "isolation failed" in done.stderr


def test_the_quickstart_says_what_is_missing() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stderr == "'MEMHARBOR_SERVICE_DSN' is not set; run this first: eval \"$(memharbor stack env)\"\n"
