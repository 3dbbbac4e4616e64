"""The comparison of loads: every way loads the same, and nothing of it remains."""

from __future__ import annotations

from contextlib import closing

import psycopg
import pytest

from tests.command_line import ok, refused


def remains(dsn: str) -> list[int]:
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        rows = connection.execute(
            "select count(*) from memharbor.memories union all select count(*) from memharbor.memory_history"
            " union all select count(*) from memharbor.configs union all"
            " select count(*) from pg_namespace where nspname = 'memharbor_bench'"
        ).fetchall()
    return [count for (count,) in rows]


def test_every_way_loads_and_nothing_of_it_remains(dsn: str) -> None:
    before = remains(dsn)
    assert ok(dsn, "bench", "migrate", "--rows", "300", "--dry-run")["rows"] == 300
    found = ok(dsn, "bench", "migrate", "--rows", "300", "--yes")
    assert [each["work"] for each in found] == ["load"] * 6 + ["embed"] * 2
    assert all(each["rows_per_second"] > 0 for each in found)
    assert remains(dsn) == before


def test_whole_migrations_of_several_sizes_find_no_difference(dsn: str) -> None:
    before = remains(dsn)
    found = ok(dsn, "bench", "migrate", "--sizes", "100,1500", "--yes")
    assert [(each["rows"], each["differences"]) for each in found] == [(100, 0), (1500, 0)]
    assert all(each["peak_memory_bytes"] > 1 << 20 for each in found)
    assert remains(dsn) == before


def test_a_database_in_use_is_not_touched(dsn: str) -> None:
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        connection.execute("insert into public.memories (user_id, memory) values ('alice', 'likes tea')")
    before = remains(dsn)
    for arguments in (("--rows", "300"), ("--sizes", "100")):
        refused(9, "holds memories", dsn, "bench", "migrate", *arguments, "--yes")
    assert remains(dsn) == before


@pytest.mark.parametrize("sizes", ["x", "0", "100,-1"])
def test_sizes_that_are_none(dsn: str, sizes: str) -> None:
    refused(2, "no numbers of memories", dsn, "bench", "migrate", "--sizes", sizes, "--yes")
