"""
Carry a rollback out, whichever way it goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from memharbor.backup.changes import Change
from memharbor.backup.engine import BackupEngine
from memharbor.backup.erasure import replay_erasures
from memharbor.backup.records import Records
from memharbor.backup.restore import Restore
from memharbor.backup.rollback import RollbackPlan, drop_fetched, fetch_copies, put_rows_back, refuse_other_rows
from memharbor.backup.rows import RowSource
from memharbor.backup.sandbox import restored
from memharbor.containers import Containers
from memharbor.database import Connection
from memharbor.errors import StateRefusedError
from memharbor.output import Output
from memharbor.pooler import Pooler


class Stack(Protocol):
    """What a restore needs of a stack; `memharbor.operations.OpenStack` is one."""

    @property
    def engine(self) -> BackupEngine:
        """The stack's backups."""

    @property
    def containers(self) -> Containers:
        """The Docker engine that runs the stack."""

    @property
    def pooler(self) -> Pooler:
        """The stack's PgBouncers."""

    @property
    def pool_databases(self) -> list[str]:
        """PgBouncer's names for the database."""

    @property
    def outputs(self) -> Any:
        """The stack's outputs."""


@dataclass(frozen=True)
class RollbackReport:
    """What a rollback did; `changes` are the rows that were put back, `None` where everything was restored."""

    plan: RollbackPlan
    changes: dict[str, Change] | None
    undo_point: str | None
    seconds: float

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        changes = self.changes
        return {
            **self.plan.as_data(),
            "changes": None if changes is None else {table: vars(change) for table, change in changes.items()},
            "undo_point": self.undo_point,
            "seconds": round(self.seconds, 1),
        }


def roll_back(
    plan: RollbackPlan, connect: Callable[[], Connection], stack: Stack | None, output: Output
) -> RollbackReport:
    """
    Carry a rollback out.

    Args:
        plan: What to do.
        connect: Connects to the database as its administrator, committing by statement.
        stack: The stack; `None` for a database that no stack of ours made.
        output: Where the steps are told.

    Raises:
        StateRefusedError: Something came in between; nothing was changed.
        VerificationError: The result would not be, or is not, what was recorded.
        ExternalToolError: pgBackRest or PostgreSQL failed.
    """
    begun_at = time.monotonic()
    if plan.way == "copies":
        with closing(connect()) as connection, output.step("Put the copied rows back"):
            changes, point = put_rows_back(connection, plan.checkpoint)
        return RollbackReport(plan, changes, point, time.monotonic() - begun_at)
    if stack is None or plan.restore is None:
        raise StateRefusedError("there are no backups of this database that Memharbor could restore")
    if plan.way == "restored-copy":
        changes, point = _by_restored_copy(plan, connect, stack, output)
        return RollbackReport(plan, changes, point, time.monotonic() - begun_at)
    records = Records(stack.engine)

    def on_open(rows: RowSource) -> list[dict[str, Any]]:
        refuse_other_rows(rows, plan.checkpoint)
        return replay_erasures(records, rows)

    restore = Restore(
        stack.engine, stack.containers, stack.pooler, stack.pool_databases, output, database=stack.outputs.database
    )
    report = restore.run(plan.restore, on_open=on_open)
    return RollbackReport(plan, None, report.undo_point, time.monotonic() - begun_at)


def _by_restored_copy(
    plan: RollbackPlan, connect: Callable[[], Connection], stack: Stack, output: Output
) -> tuple[dict[str, Change], str | None]:
    if plan.restore is None:
        raise StateRefusedError("there is no restore to fetch rows from")
    with closing(connect()) as connection:
        with restored(stack, plan.restore, output) as sandbox, output.step("Fetch its rows"):
            fetched = fetch_copies(connection, plan.checkpoint, sandbox.rows())
        try:
            with output.step("Put the rows back"):
                return put_rows_back(connection, fetched)
        finally:
            if not connection.closed:
                drop_fetched(connection, fetched)
