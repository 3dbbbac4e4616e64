"""
Large imports load without the index of keyword search, and build it when all rows are there.

Meanwhile a keyword search reads the table, and finds the same. A run that was stopped builds it when it goes on, and so
does `memharbor schema apply`. Figures: docs/concepts/figures.md.
"""

from __future__ import annotations

from typing import Literal

from memharbor.backup.access import run_script
from memharbor.database import Connection, transaction, translated_errors
from memharbor.names import ROLES
from memharbor.schema.sessions import concurrent_session, drop_invalid_indexes
from memharbor.settings import Settings
from memharbor.templates import render

TextIndex = Literal["auto", "keep", "after"]
# So many rows are worth it, where the database has few beside them whose keyword search would wait.
_ROWS_MIN = 100_000
_TIMES = 10


def is_built_after(connection: Connection, choice: TextIndex, items: int) -> bool:
    """
    Decide when the index is built.

    Args:
        connection: Straight to the database, as its administrator; in autocommit.
        choice: `auto` decides by the number of rows.
        items: That the source has; 0 where it does not know.
    """
    if choice != "auto":
        return choice == "after"
    if items < _ROWS_MIN:
        return False
    with translated_errors("counting the memories"), transaction(connection, role=ROLES["service"]):
        query = "select count(*) from (select from memharbor.memories limit %s) as few"
        row = connection.execute(query, (items // _TIMES + 1,)).fetchone()
    return row is not None and int(row[0]) * _TIMES <= items


def drop_text_index(connection: Connection, settings: Settings) -> None:
    """
    Drop the index.

    Raises:
        DatabaseError: Somebody held the table for longer than `lock_timeout_ms`.
    """
    with (
        translated_errors("dropping the index of keyword search"),
        transaction(connection, role=ROLES["owner"], lock_timeout_ms=settings.lock_timeout_ms),
    ):
        run_script(connection, render("migrate/drop_text_index.sql", {}))


def build_text_index(connection: Connection) -> None:
    """
    Build the index, as the schema's own step does; writers go on meanwhile.

    Raises:
        DatabaseError: It could not be built; the same call begins anew.
    """
    with translated_errors("building the index of keyword search"):
        drop_invalid_indexes(connection)
        with concurrent_session(connection):
            run_script(connection, render("versioned/0006_search_indexes.up.sql", {}))
