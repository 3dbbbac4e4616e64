"""A run from a file that `migrate read` wrote does what a run from the source itself does, row for row."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.command_line import ok
from tests.integration.test_migrate_commands import rows_of
from tests.integration.test_migrate_sources import SOURCES, counts
from tests.memory_database import Server


@pytest.mark.parametrize("name", SOURCES)
def test_a_run_from_the_file_meets_the_rows_of_a_run_from_the_source(
    name: str,
    dsn: str,
    server: Server,
    tmp_path: Path,
) -> None:
    make, expected = SOURCES[name]
    with ExitStack() as stack:
        arguments, environ = make(tmp_path, stack, server)
        manifest = ok(dsn, "migrate", "read", *arguments, "--output-file", "read.jsonl", **environ)
        done = ok(dsn, "migrate", "run", *arguments, "--no-checkpoint", **environ)
    assert counts(done) == expected
    rows = rows_of(dsn)
    run = ("migrate", "run", "--from", "file", "--input", "read.jsonl", "--no-checkpoint")
    again = ok(dsn, *run)
    early = sum(manifest["refused"].values())
    assert sum(manifest["items"].values()) + early == expected["read"]
    assert again["read"] == expected["read"] - early
    assert again["refused"] == expected.get("refused", 0) - early
    assert again["same"] == expected.get("inserted", 0), "an id is another one"
    assert rows_of(dsn) == rows
    assert ok(dsn, "migrate", "compare") == {"missing": 0, "extra": 0, "different": 0, "rows": []}
