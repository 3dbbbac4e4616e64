"""
Plan, apply and take back the steps of `memharbor.schema.migrations`.

Each step is one transaction together with its row in the ledger, so a roll-out that is killed at any moment is continued
by the next one. Steps that build indexes CONCURRENTLY cannot be a transaction: they build what is missing, after what an
interrupted build left invalid is dropped. One roll-out at a time holds an advisory lock; locks on tables are waited for
`lock_timeout_ms`, then the step begins again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psycopg
import stamina

from memharbor.database import Connection, as_query, run_statement, transaction, translated_errors
from memharbor.errors import ConfigError, DatabaseError, StateRefusedError
from memharbor.schema import ledger
from memharbor.schema.fingerprint import (
    Catalog,
    Difference,
    describe_catalog,
    differences,
    fingerprint_of,
    with_differences,
)
from memharbor.schema.migrations import LEDGER_COMPONENTS, PREREQUISITES, Step, contract_views, load_steps
from memharbor.settings import Settings
from memharbor.templates import render

LOCK_ATTEMPTS = 5
# lock_not_available, deadlock_detected. Source: PostgreSQL manual, Appendix A.
_LOCK_SQLSTATES = ("55P03", "40P01")

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
    steps = _steps_of(components, load_steps(settings, root=root))
    if connection is None:
        return tuple(PlannedStep(step, "pending", "the database does not exist") for step in steps)
    applied = ledger.read_applied(connection)
    refuse_unknown(applied, load_steps(settings, root=root))
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
        planned = plan(connection, settings, components=components, root=root)
        todo = [item for item in planned if item.state != "applied"]
        _refuse_other_dimensions(connection, settings)
        _refuse_edited(todo)
        missing = _find_missing_prerequisites(connection, settings, planned, root)
        before = describe_catalog(connection)
        names = tuple(item.name for item in todo)
        if dry_run and missing:
            return ApplyReport(names, fingerprint_of(before), fingerprint_of(before), dry_run=True)
        if missing:
            raise missing
        _refuse_taken_names(connection, tuple(item.step for item in planned))
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
                retry_locks(lambda step=item.step: self._apply_in_transaction(step), f"step `{item.name}`")  # type: ignore[misc]
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


def retry_locks(work: Callable[[], None], what: str) -> None:
    """
    Run a transaction again while it cannot get a lock, a bounded number of times.

    Raises:
        StateRefusedError: The lock could not be had; nothing of `work` remains.
    """
    try:
        for attempt in stamina.retry_context(
            on=_is_lock_failure, attempts=LOCK_ATTEMPTS, timeout=None, wait_initial=0.2, wait_max=5.0, wait_jitter=1.0
        ):
            with attempt:
                work()
    except DatabaseError as exc:
        if not _is_lock_failure(exc):
            raise
        raise StateRefusedError(
            f"{what} could not get its locks in {LOCK_ATTEMPTS} attempts: {exc.message}",
            hint="end the long transactions that `select * from pg_stat_activity order by xact_start` shows, then run it again",
        ) from exc


def _is_lock_failure(exc: Exception) -> bool:
    return isinstance(exc.__cause__, psycopg.Error) and exc.__cause__.sqlstate in _LOCK_SQLSTATES


@contextmanager
def concurrent_session(connection: Connection) -> Iterator[None]:
    """
    Act as the owner outside a transaction, with an empty search path, and wait for others as long as it takes.

    CREATE and DROP INDEX CONCURRENTLY wait for old transactions while nobody waits for them: giving up early would only
    leave an invalid index behind.
    """
    present = {"search_path": "", "lock_timeout": "0", "statement_timeout": "0", "role": ledger.OWNER}
    for name, value in present.items():
        connection.execute("select pg_catalog.set_config(%s, %s, false)", (name, value))
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("reset role")
            for name in ("search_path", "lock_timeout", "statement_timeout"):
                connection.execute(as_query(f"reset {name}"))


def drop_invalid_indexes(connection: Connection) -> tuple[str, ...]:
    """Drop what interrupted builds left behind and return the names; what is being built now is left alone."""
    with transaction(connection):
        rows = connection.execute(as_query(render("catalog/invalid_indexes.sql", {}))).fetchall()
    names = tuple(row[0] for row in rows)
    with concurrent_session(connection):
        for name in names:
            with translated_errors(f"drop the invalid index `{name}`"):
                run_statement(connection, render("tenant/drop_index.sql", {"index_name": name}).rstrip().rstrip(";"))
    return names


@contextmanager
def session(connection: Connection) -> Iterator[list[str]]:
    """Collect notices, commit by statement, and refuse a pooled connection; all as before at the end."""
    if connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
        raise ValueError("the connection is inside a transaction")
    autocommit = connection.autocommit
    connection.autocommit = True
    notices: list[str] = []

    def collect(diagnostic: psycopg.errors.Diagnostic) -> None:
        if (diagnostic.message_primary or "").startswith("skipped: "):
            notices.append((diagnostic.message_primary or "").removeprefix("skipped: "))

    connection.add_notice_handler(collect)
    try:
        refuse_pooler(connection)
        yield notices
    finally:
        connection.remove_notice_handler(collect)
        if not connection.closed:
            connection.autocommit = autocommit


def refuse_pooler(connection: Connection) -> None:
    """
    Refuse a transaction pool: session locks and settings would land on somebody else's server session.

    A pooler tells its clients a process id of its own.
    """
    row = connection.execute("select pg_catalog.pg_backend_pid()").fetchone()
    if row is None or row[0] != connection.info.backend_pid:
        raise StateRefusedError(
            "this connection goes through a pooler, and a roll-out needs a session of its own",
            hint="connect straight to PostgreSQL, for instance with `memharbor stack dsn owner --direct`",
        )


def _steps_of(components: Sequence[str] | None, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    if components is None:
        return steps
    unknown = sorted(set(components) - set(LEDGER_COMPONENTS))
    if unknown:
        raise ConfigError(f"`{unknown[0]}` is no component of the schema: choose from {', '.join(LEDGER_COMPONENTS)}")
    return tuple(step for step in steps if step.component in components)


def refuse_unknown(applied: dict[str, ledger.AppliedStep], steps: tuple[Step, ...]) -> None:
    known = {step.name for step in steps}
    unknown = sorted(name for name, step in applied.items() if step.kind == "versioned" and name not in known)
    if unknown:
        raise StateRefusedError(
            f"step `{unknown[-1]}` is applied to this database and unknown to this Memharbor: a newer one was here",
            hint="use the newer Memharbor; to go back, run `memharbor schema downgrade` with it first",
        )


def _refuse_edited(todo: Sequence[PlannedStep]) -> None:
    for item in todo:
        if item.step.kind == "versioned" and item.state == "changed":
            raise StateRefusedError(
                f"the versioned step `{item.name}` was applied with another text than the present one",
                hint=[
                    "restore the template or setting it was applied with; changes belong into a new versioned step",
                    "memharbor schema history",
                ],
            )


def _refuse_other_dimensions(connection: Connection, settings: Settings) -> None:
    with transaction(connection):
        row = connection.execute(
            """
            select t.typname, a.atttypmod from pg_catalog.pg_attribute a
            join pg_catalog.pg_type t on t.oid = a.atttypid
            where a.attrelid = pg_catalog.to_regclass('memharbor.memories') and a.attname = 'embedding'
            """
        ).fetchone()
    if row is not None and (row[0], row[1]) != (settings.embedding_type, settings.embedding_dims):
        raise StateRefusedError(
            f"this database holds embeddings of type {row[0]}({row[1]}), the settings say"
            f" {settings.embedding_type}({settings.embedding_dims}), and dimensions cannot be changed in place",
            hint=[
                f"set embedding_dims to {row[1]}",
                "or embed into a new database: set `database` to another name, roll out, `memharbor migrate embed`",
            ],
        )


def _find_missing_prerequisites(
    connection: Connection, settings: Settings, planned: tuple[PlannedStep, ...], root: Path | None
) -> StateRefusedError | None:
    with transaction(connection):
        row = connection.execute("select pg_catalog.to_regrole(%s) is not null", (ledger.OWNER,)).fetchone()
    if row is None or not row[0]:
        return StateRefusedError(
            f"role {ledger.OWNER} does not exist on this server",
            hint="ansible-playbook ansible/playbooks/roles.yml",
        )
    here = {item.step.component for item in planned}
    applied = ledger.read_applied(connection)
    for component in sorted(here, key=LEDGER_COMPONENTS.index):
        for needed in PREREQUISITES.get(component, ()):
            pending = [
                s.name for s in load_steps(settings, root=root) if s.component == needed and s.name not in applied
            ]
            if needed not in here and pending:
                return StateRefusedError(
                    f"component `{component}` needs `{needed}`, of which step `{pending[0]}` is not applied",
                    hint=f"memharbor schema apply --component {needed}",
                )
    return None


def _refuse_taken_names(connection: Connection, steps: tuple[Step, ...]) -> None:
    with transaction(connection):
        row = connection.execute(
            """
            select c.relname, c.relkind = 'v', pg_catalog.pg_get_userbyid(c.relowner) from pg_catalog.pg_class c
            where c.relnamespace = 'public'::pg_catalog.regnamespace and c.relname = any (%s)
              and not (c.relkind = 'v' and c.relowner = pg_catalog.to_regrole(%s))
            order by c.relname
            """,
            (list(contract_views(steps)), ledger.OWNER),
        ).fetchone()
    if row is not None:
        name, is_view, owner = row
        raise StateRefusedError(
            f"public.{name} is a {'view' if is_view else 'table'} of `{owner}` already, and Memharbor needs the name",
            hint=[
                f"alter {'view' if is_view else 'table'} public.{name} rename to {name}_old",
                "memharbor migrate plan",
            ],
        )
