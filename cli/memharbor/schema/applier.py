"""
Plan, apply and take back the steps of `memharbor.schema.migrations`.

Each step is one transaction together with its row in the ledger, so a roll-out that is killed at any moment is continued
by the next one. Steps that build indexes CONCURRENTLY cannot be a transaction: they build what is missing, after what an
interrupted build left invalid is dropped. One roll-out at a time holds an advisory lock; locks on tables are waited for
`lock_timeout_ms`, then the step begins again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from memharbor.database import Connection, run_statement, transaction, translated_errors
from memharbor.errors import ConfigError
from memharbor.schema import ledger, refusals
from memharbor.schema.fingerprint import (
    Catalog,
    Difference,
    describe_catalog,
    differences,
    fingerprint_of,
    with_differences,
)
from memharbor.schema.migrations import LEDGER_COMPONENTS, Step, load_steps
from memharbor.schema.sessions import concurrent_session, drop_invalid_indexes, retry_locks, session
from memharbor.settings import Settings

State = Literal["pending", "changed", "applied"]
OnStatement = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PlannedStep:
    """A step and what there is to do: `pending` is new, `changed` runs again, `applied` is done."""

    step: Step
    state: State
    reason: str

    @property
    def name(self) -> str:
        """The name of the step."""
        return self.step.name


Progress = Callable[[PlannedStep, int, int], None]


@dataclass(frozen=True)
class ApplyReport:
    """
    What a run did, or would do.

    `differences` is what changed in the catalog; in a dry run of a database where a step's prerequisites are missing it
    is empty, and `applied` is what there is to say.
    """

    applied: tuple[str, ...]
    fingerprint_before: str
    fingerprint_after: str
    differences: tuple[Difference, ...] = ()
    notices: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def changed(self) -> bool:
        """Whether the catalog is another one; in a dry run, whether anything is left to do."""
        return self.fingerprint_before != self.fingerprint_after or (self.dry_run and bool(self.applied))


def plan(
    connection: Connection | None,
    settings: Settings,
    *,
    components: Sequence[str] | None = None,
    root: Path | None = None,
) -> tuple[PlannedStep, ...]:
    """
    Compare the steps with a database, and write nothing.

    Args:
        connection: To the database; None where it does not exist yet.
        settings: The configuration to roll out.
        components: Which components to look at; all by default.
        root: Where the templates are; `memharbor.templates.template_root()` by default.

    Raises:
        ConfigError: A component is unknown.
        StateRefusedError: The database was rolled out by a newer Memharbor.
    """
    return _plan(connection, components, load_steps(settings, root=root))


def _plan(
    connection: Connection | None, components: Sequence[str] | None, every: tuple[Step, ...]
) -> tuple[PlannedStep, ...]:
    steps = _steps_of(components, every)
    if connection is None:
        return tuple(PlannedStep(step, "pending", "the database does not exist") for step in steps)
    applied = ledger.read_applied(connection)
    refusals.refuse_unknown(applied, every)
    recorded = ledger.read_recorded_catalog(connection)
    drift = differences(recorded, describe_catalog(connection)) if recorded is not None else ()
    return tuple(_plan_step(step, applied.get(step.name), drift) for step in steps)


def _plan_step(step: Step, applied: ledger.AppliedStep | None, drift: tuple[Difference, ...]) -> PlannedStep:
    if applied is None:
        return PlannedStep(step, "pending", "not applied yet")
    if applied.checksum != step.checksum:
        return PlannedStep(step, "changed", "its rendered text is another one")
    if drift and step.kind == "repeatable":
        more = f" and {len(drift) - 1} more" if len(drift) > 1 else ""
        return PlannedStep(step, "changed", f"changed outside Memharbor: {drift[0]}{more}")
    return PlannedStep(step, "applied", "")


def apply(
    connection: Connection,
    settings: Settings,
    *,
    components: Sequence[str] | None = None,
    dry_run: bool = False,
    adopt_drift: bool = False,
    progress: Progress | None = None,
    on_statement: OnStatement | None = None,
    root: Path | None = None,
) -> ApplyReport:
    """
    Apply every step that is missing or changed. A second run does nothing.

    Args:
        connection: Straight to the database (not through a transaction pool), as its administrator.
        settings: The configuration to roll out.
        components: Which components to apply; all by default.
        dry_run: Run the steps in one transaction and take it back, to report the true difference; what cannot run in
            a transaction is only named. Takes the locks that the steps take, for as long as they run.
        adopt_drift: Accept what was changed outside Memharbor and cannot be repaired as the new state.
        progress: Called before each step with the step, its number and how many there are.
        on_statement: Called after each statement with the step's name, its number and how many it has.
        root: Where the templates are.

    Raises:
        StateRefusedError: A versioned step was edited, a prerequisite is missing, another roll-out is running, a contract
            view's name is taken, or a lock could not be had.
        DatabaseError: A statement was refused; the message names it.
    """
    with session(connection) as notices, ledger.advisory_lock(connection):
        every = load_steps(settings, root=root)
        planned = _plan(connection, components, every)
        todo = [item for item in planned if item.state != "applied"]
        refusals.refuse_other_dimensions(connection, settings)
        refusals.refuse_edited(item.step for item in todo if item.state == "changed")
        missing = refusals.find_missing_prerequisite(connection, {item.step.component for item in planned}, every)
        before = describe_catalog(connection)
        names = tuple(item.name for item in todo)
        if dry_run and missing:
            return ApplyReport(names, fingerprint_of(before), fingerprint_of(before), dry_run=True)
        if missing:
            raise missing
        refusals.refuse_taken_names(connection, (item.step for item in planned))
        run = _Run(connection, settings, progress or _ignore, on_statement or _ignore)
        if dry_run:
            after = run.rehearse(todo)
        else:
            run.apply(todo)
            after = describe_catalog(connection)
            _record(connection, before, after, adopt_drift=adopt_drift)
        return ApplyReport(
            names,
            fingerprint_of(before),
            fingerprint_of(after),
            differences(before, after),
            tuple(dict.fromkeys(notices)),
            dry_run,
        )


def _ignore(*_: object) -> None:
    pass


def _record(connection: Connection, before: Catalog, after: Catalog, *, adopt_drift: bool) -> None:
    recorded = ledger.read_recorded_catalog(connection)
    if recorded is None or adopt_drift:
        ledger.record_catalog(connection, after)
    else:
        # Only what this run changed: what something else changed stays a difference, until it is repaired or adopted.
        ledger.record_catalog(connection, with_differences(recorded, differences(before, after)))


@dataclass(frozen=True)
class _Run:
    connection: Connection
    settings: Settings
    progress: Progress
    on_statement: OnStatement

    def apply(self, todo: Sequence[PlannedStep]) -> None:
        if todo and not ledger.ledger_exists(self.connection):
            with transaction(self.connection):
                ledger.create_ledger(self.connection)
        for number, item in enumerate(todo, start=1):
            self.progress(item, number, len(todo))
            if item.step.transactional:
                retry_locks(partial(self._apply_in_transaction, item.step), f"step `{item.name}`")
            else:
                self._apply_concurrently(item.step)

    def rehearse(self, todo: Sequence[PlannedStep]) -> Catalog:
        with transaction(self.connection, rollback=True):
            if todo:
                ledger.create_ledger(self.connection)
            for item in todo:
                if item.step.transactional:
                    self._apply_in_transaction(item.step)
            ledger.act_as(self.connection, "none")
            return describe_catalog(self.connection)

    def _apply_in_transaction(self, step: Step) -> None:
        begun_at = time.monotonic()
        role = ledger.OWNER if step.runs_as == "owner" else "none"
        with transaction(self.connection, role=role, lock_timeout_ms=self.settings.lock_timeout_ms):
            self._run_statements(step)
            ledger.write_row(self.connection, step, "up", _milliseconds_since(begun_at))

    def _apply_concurrently(self, step: Step) -> None:
        begun_at = time.monotonic()
        drop_invalid_indexes(self.connection)
        with concurrent_session(self.connection):
            self._run_statements(step)
        with transaction(self.connection):
            ledger.write_row(self.connection, step, "up", _milliseconds_since(begun_at))

    def _run_statements(self, step: Step) -> None:
        total = len(step.statements)
        for number, statement in enumerate(step.statements, start=1):
            with translated_errors(f"step `{step.name}`, statement {number} of {total}"):
                run_statement(self.connection, statement)
            self.on_statement(step.name, number, total)


def _milliseconds_since(begun_at: float) -> int:
    return int((time.monotonic() - begun_at) * 1000)


def _steps_of(components: Sequence[str] | None, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    if components is None:
        return steps
    unknown = sorted(set(components) - set(LEDGER_COMPONENTS))
    if unknown:
        raise ConfigError(f"`{unknown[0]}` is no component of the schema: choose from {', '.join(LEDGER_COMPONENTS)}")
    return tuple(step for step in steps if step.component in components)
