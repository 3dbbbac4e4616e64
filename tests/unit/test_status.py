"""The status in words: one line a part, an error in the place of what cannot be read."""

from __future__ import annotations

import pytest

from memharbor.status import is_down, status_text

GOOD = {
    "target": "stack dev",
    "database": {"version": "18.6 (Debian)", "size_bytes": 9_437_184, "memories": 1200, "users": 3, "connections": 4},
    "containers": [{"name": "dev-postgres-0", "health": "healthy"}],
    "pools": [{"user": "memharbor_app", "database": "memharbor", "cl_active": "2", "cl_waiting": "0"}],
    "archive": {"last_segment": "000000010000000000000003", "age_seconds": 30, "waiting_segments": 0},
    "backups": {
        "count": 2,
        "last": "20260101-000000F",
        "age_seconds": 7300,
        "last_is_verified": False,
        "last_verified_at": None,
        "drill_schedule": None,
        "is_drill_overdue": False,
    },
    "custodian": {
        "has_offsite_copy": True,
        "copy_age_seconds": 40,
        "is_copy_behind": False,
        "copy_failure": None,
        "purge_failure": None,
    },
}


def test_each_part_is_one_line() -> None:
    assert status_text(GOOD).splitlines() == [
        "stack dev",
        "database    PostgreSQL 18.6, 9.0 MiB, 1,200 memories of 3 users, 4 connections",
        "containers  dev-postgres-0 healthy",
        "pools       memharbor_app@memharbor 2 clients, 0 waiting",
        "archive     000000010000000000000003 30 s ago, 0 segments wait",
        "backups     2, the last one 20260101-000000F 2.0 h ago, unverified",
        "custodian   off-site copy 40 s ago",
    ]


def test_what_is_not_there_yet_is_said() -> None:
    empty = {
        "target": "stack dev",
        "database": {"version": "18.6", "size_bytes": 0, "memories": None, "users": None, "connections": 1},
        "archive": {"last_segment": None, "age_seconds": None, "waiting_segments": 3},
        "backups": {"count": 0, "last": None, "age_seconds": None},
        "pools": [],
    }
    said = status_text(empty)
    assert "no schema yet" in said
    assert "nothing archived yet, 3 segments wait" in said
    assert "memharbor backup create" in said


def test_a_part_that_cannot_be_read_does_not_hide_the_others() -> None:
    said = status_text({**GOOD, "archive": {"error": "cannot connect to x"}})
    assert "archive     cannot connect to x" in said
    assert "backups     2" in said


@pytest.mark.parametrize(
    ("changes", "down"),
    [
        ({}, False),
        ({"archive": {"error": "cannot connect to x"}}, True),
        ({"containers": {"error": "the Docker engine failed"}}, True),
        ({"containers": [{"name": "dev-postgres-0", "health": "healthy"}, {"name": "p", "health": "missing"}]}, True),
        ({"containers": [{"name": "dev-postgres-0", "health": "exited"}]}, True),
        ({"backups": {"count": 0, "last": None, "age_seconds": None}}, False),
    ],
)
def test_it_is_down_where_a_part_cannot_be_read_or_a_container_is_not_well(
    changes: dict[str, object], down: bool
) -> None:
    assert is_down({**GOOD, **changes}) is down
