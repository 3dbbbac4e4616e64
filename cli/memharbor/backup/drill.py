"""
Prove a backup: restore it into a throw-away container, examine what came out, and write down what was found.

Nothing of the running stack changes but the mark on the backup that it was restored. Source: docs/how-to/drill.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from memharbor.backup.drill_checks import (
    DrillCheckError,
    NotComparableError,
    Probe,
    check_checksums,
    check_erasures,
    check_indexes,
    check_mem0,
    check_policies,
    check_reached,
    check_recall,
    check_rows,
)
from memharbor.backup.drill_report import CheckResult, DrillReport, StepResult
from memharbor.backup.engine import Backup
from memharbor.backup.plan import RestorePlan, plan_backup, plan_restore
from memharbor.backup.records import Records
from memharbor.backup.rows import RowSource
from memharbor.backup.sandbox import Opened, Sandbox, restored
from memharbor.backup.wal import format_lsn, parse_lsn
from memharbor.errors import (
    DatabaseError,
    ExternalToolError,
    MemharborError,
    SourceDataError,
    StateRefusedError,
    VerificationError,
)
from memharbor.output import Output

VERIFIED_ANNOTATION = "memharbor-verified-at"
_FOLDER = "drills"
_MANIFESTS = "manifests"
_LAST_WORDS = 1000

Replay = Callable[[RowSource], Sequence[Mapping[str, Any]]]

# In this order: what the erasures and the amcheck extension change was compared before, and the checksums need the
# server to be down. Mem0's statements write, and are rolled back.
CHECKS: tuple[tuple[str, Callable[[Probe], str]], ...] = (
    ("target", check_reached),
    ("rows", check_rows),
    ("row level security", check_policies),
    ("recall", check_recall),
    ("Mem0's SQL", check_mem0),
    ("erase ledger", check_erasures),
    ("indexes", check_indexes),
    ("checksums", check_checksums),
)


def verified_at(backup: Backup) -> datetime | None:
    """Tell when a drill restored this backup and found nothing wrong, aware UTC; `None` where none has."""
    text = backup.annotations.get(VERIFIED_ANNOTATION)
    return datetime.fromisoformat(text) if text else None


def choose_plan(
    opened: Opened, records: Records, *, backup_id: str | None, at: datetime | None
) -> tuple[RestorePlan, Mapping[str, Any] | None]:
    """
    Decide what a drill restores: one backup with what was recorded about it, or a moment.

    Args:
        opened: The stack.
        records: The records beside its backups.
        backup_id: The backup; the newest by default.
        at: A moment instead, aware UTC.

    Raises:
        StateRefusedError: There is no such backup, or nothing leads to the moment.
    """
    if at is not None:
        return plan_restore(opened.engine, at=at, backup_id=backup_id), None
    if backup_id is not None:
        backup = opened.engine.get_backup(backup_id)
    else:
        usable = [each for each in opened.engine.list_backups() if each.is_of_present_cluster]
        if not usable:
            raise StateRefusedError("there is no backup to restore", hint="run `memharbor backup create`")
        backup = usable[-1]
    manifest = records.get(f"{_MANIFESTS}/{backup.id}.json")
    if manifest is None:
        return plan_backup(backup), None
    try:
        lsn, timeline = parse_lsn(manifest["lsn"]), int(manifest["timeline"])
        return plan_backup(backup, point=str(manifest["point"]), lsn=lsn, timeline=timeline), manifest
    except (KeyError, ValueError) as exc:
        raise SourceDataError(f"the record of backup `{backup.id}` has an unknown shape: {exc}") from exc


def run_drill(
    opened: Opened,
    plan: RestorePlan,
    manifest: Mapping[str, Any] | None,
    output: Output,
    *,
    stack: str,
    replay: Replay,
) -> DrillReport:
    """
    Restore a plan and examine it.

    Args:
        opened: The stack.
        plan: What to restore, see `choose_plan`.
        manifest: What was recorded of that state.
        output: Where progress is said.
        stack: The stack's name, for the report.
        replay: Erases again whom the backup brings back, and returns the records of those.

    Returns:
        The report; a backup that cannot be restored is one whose drill failed, not an error of the drill.

    Raises:
        StateRefusedError: There is not enough disk, or the stack is not in a state for it.
        ConnectError: The engine does not answer.
    """
    begun_at, clock = datetime.now(UTC), time.monotonic()
    checks: list[CheckResult] = []
    sandbox: Sandbox | None = None
    try:
        with restored(opened, plan, output) as sandbox:
            probe = Probe(sandbox, manifest)
            for name, check in CHECKS:
                checks.append(_timed(output, name, partial(_examine, probe, check, replay)))
    except (ExternalToolError, VerificationError, SourceDataError, DatabaseError) as exc:
        done = sandbox is not None and bool(checks)
        name = "examination" if done else "restore"
        checks.append(CheckResult(name, False, exc.message[-_LAST_WORDS:], 0.0))
    steps = [StepResult(step, seconds) for step, seconds in (sandbox.seconds if sandbox else {}).items()]
    return DrillReport(
        stack=stack,
        backup=plan.backup.id,
        backup_ended_at=plan.backup.ended_at,
        target=plan.target,
        reached_lsn=format_lsn(sandbox.reached_lsn) if sandbox and sandbox.reached_lsn else None,
        begun_at=begun_at,
        seconds=time.monotonic() - clock,
        database_bytes=plan.backup.database_bytes,
        steps=tuple(steps),
        checks=tuple(checks),
    )


def _examine(probe: Probe, check: Callable[[Probe], str], replay: Replay) -> str:
    if check is check_erasures:
        probe.erasures = list(replay(probe.sandbox.rows()))
    return check(probe)


def _timed(output: Output, name: str, work: Callable[[], str]) -> CheckResult:
    begun_at = time.monotonic()
    is_good: bool | None = True
    try:
        detail = work()
    except NotComparableError as exc:
        is_good, detail = None, str(exc)
    except DrillCheckError as exc:
        is_good, detail = False, str(exc)
    except MemharborError as exc:
        is_good, detail = False, exc.message[-_LAST_WORDS:]
    result = CheckResult(name, is_good, detail, time.monotonic() - begun_at)
    output.note(f"{result.mark} {name}: {detail}")
    return result


def record_drill(opened: Opened, records: Records, report: DrillReport) -> None:
    """
    Write a drill down beside the backups, and mark its backup as verified where nothing was wrong.

    Raises:
        ExternalToolError: The store did not take it.
    """
    records.put(f"{_FOLDER}/{report.id}.json", report.as_data())
    if report.is_good:
        opened.engine.annotate(report.backup, VERIFIED_ANNOTATION, report.ended_at.isoformat(timespec="seconds"))


__all__ = ["CHECKS", "DrillReport", "choose_plan", "record_drill", "run_drill", "verified_at"]
