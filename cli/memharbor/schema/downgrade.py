"""
Take versioned steps back, and with them the views, functions and policies that stand on them.

One transaction: either all of it happens or nothing. Rows are not thrown away unless that is asked for by name. Roles,
settings, pgvector and the ledger stay.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psycopg import sql

from memharbor.database import Connection, run_statement, transaction, translated_errors
from memharbor.errors import StateRefusedError, UsageError
from memharbor.names import ROLES
from memharbor.schema import ledger, refusals
from memharbor.schema.fingerprint import describe_catalog, differences, with_differences
from memharbor.schema.migrations import Step, load_steps
from memharbor.schema.sessions import retry_locks, session
from memharbor.schema.statements import split_statements
from memharbor.settings import Settings

BASE = "base"
SERVICE = ROLES["service"]
_DROPPED_TABLE = re.compile(r"^drop table memharbor\.(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class DowngradeReport:
    """What was taken back, newest first, and how many rows went with it."""

    reverted: tuple[str, ...]
    rows_lost: dict[str, int]
    dry_run: bool = False


def downgrade(
    connection: Connection,
    settings: Settings,
    *,
    to: str | None = None,
    steps: int | None = None,
    allow_data_loss: bool = False,
    dry_run: bool = False,
    root: Path | None = None,
) -> DowngradeReport:
    """
    Take versioned steps back, newest first.

    Args:
        connection: Straight to the database, as its administrator.
        settings: The configuration that is rolled out.
        to: The last step that stays, for instance `0003_graph`; `base` for none.
        steps: How many steps to take back, instead of `to`.
        allow_data_loss: Drop tables that hold rows.
        dry_run: Say what would be done and change nothing.
        root: Where the templates are.

    Raises:
        UsageError: Neither or both of `to` and `steps` are given, or `to` is not applied.
        StateRefusedError: Rows would be lost, or another roll-out is running.
    """
    with session(connection), ledger.advisory_lock(connection):
        every = load_steps(settings, root=root)
        applied = ledger.read_applied(connection)
        refusals.refuse_unknown(applied, every)
        versioned = sorted((s for s in every if s.kind == "versioned" and s.name in applied), key=lambda s: s.name)
        todo = _choose(versioned, to, steps)
        if not todo:
            return DowngradeReport((), {}, dry_run)
        standing = [s for s in reversed(every) if s.kind == "repeatable" and s.name in applied and s.down_sql]
        rows = _count_rows(connection, todo)
        if rows and not (allow_data_loss or dry_run):
            lost = ", ".join(f"memharbor.{table} ({count:,} rows)" for table, count in rows.items())
            raise StateRefusedError(
                f"taking back `{todo[-1].name}` would drop {lost}",
                hint=["memharbor backup create", "pass `--allow-data-loss` to drop the rows"],
            )
        if not dry_run:
            _revert(connection, settings, [*standing, *todo])
        return DowngradeReport(tuple(step.name for step in todo), rows, dry_run)


def _choose(versioned: Sequence[Step], to: str | None, steps: int | None) -> list[Step]:
    if (to is None) == (steps is None):
        raise UsageError("say either the last step that stays or how many to take back")
    if steps is not None:
        if steps < 1:
            raise UsageError(f"cannot take back {steps} steps")
        return list(reversed(versioned[-steps:]))
    names = [step.name for step in versioned]
    if to != BASE and to not in names:
        raise UsageError(f"step `{to}` is not applied", hint="memharbor schema history")
    return list(reversed(versioned[names.index(str(to)) + 1 if to != BASE else 0 :]))


def _count_rows(connection: Connection, todo: Sequence[Step]) -> dict[str, int]:
    tables = [table for step in todo for table in _DROPPED_TABLE.findall(step.down_sql or "")]
    counts: dict[str, int] = {}
    with translated_errors("count the rows that would be lost"), transaction(connection):
        # Row level security must not hide any: where the administrator is subject to it, the service role is not.
        row = connection.execute(
            "select rolsuper or rolbypassrls from pg_catalog.pg_roles where rolname = current_user"
        ).fetchone()
        ledger.act_as(connection, "none" if row and row[0] else SERVICE)
        for table in tables:
            query = sql.SQL("select count(*) from memharbor.{}").format(sql.Identifier(table))
            count = connection.execute(query).fetchone()
            if count and count[0]:
                counts[table] = count[0]
    return counts


def _revert(connection: Connection, settings: Settings, todo: Sequence[Step]) -> None:
    def work() -> None:
        with transaction(connection, role=ledger.OWNER, lock_timeout_ms=settings.lock_timeout_ms):
            for step in todo:
                statements = split_statements(step.down_sql or "")
                for number, statement in enumerate(statements, start=1):
                    with translated_errors(f"take back `{step.name}`, statement {number} of {len(statements)}"):
                        run_statement(connection, statement)
                ledger.write_row(connection, step, "down", 0)

    before = describe_catalog(connection)
    retry_locks(work, "the downgrade")
    recorded = ledger.read_recorded_catalog(connection)
    after = describe_catalog(connection)
    ledger.record_catalog(
        connection, after if recorded is None else with_differences(recorded, differences(before, after))
    )
