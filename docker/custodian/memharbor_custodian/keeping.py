"""
Purge and undelete: what the custodian's key is for.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from memharbor_custodian.errors import RefusedError
from memharbor_custodian.places import Place
from memharbor_custodian.versions import UndeletePlan, group, plan_purge, plan_undelete, plan_undelete_at

_INFO_FILES = ("backup.info", "backup.info.copy", "archive.info", "archive.info.copy")
# Longer than any single file takes.
_UPLOAD_MAXIMUM = timedelta(days=2)


def is_info(key: str) -> bool:
    """
    Tell whether a key is one of pgBackRest's lists of what there is, which are written after it and change.

    >>> is_info("pgbackrest/dev/backup/main/backup.info"), is_info("pgbackrest/dev/backup/main/latest")
    (True, False)
    """
    return key.rsplit("/", 1)[-1] in _INFO_FILES


def purge(
    store: Place,
    offsite: Place | None,
    *,
    now: datetime,
    keep: timedelta,
    dry_run: bool = False,
    check_copy: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """
    Delete for good what was deleted or overwritten longer ago than the promise.

    A key that ends with it is deleted from the off-site copy first. While that cannot be reached the key's delete
    marker stays, and with it the order to delete the copy: the next purge carries it out.

    Args:
        store: The first store.
        offsite: Its copy; `None` where there is none.
        now: Aware.
        keep: The promise.
        dry_run: Only count.
        check_copy: Called before anything is deleted from the copy; it raises where that is of another store.

    Raises:
        RefusedError: The clock cannot be right, the copy is of another store, or somebody deletes backups.
        CustodianError: A store failed; what is left is left for the next purge.
    """
    entries = store.entries()
    history = group(entries)
    lost = sorted(key for key, (newest, *_) in history.items() if newest.is_marker and is_info(key))
    if lost:
        # What is to be brought back must not be purged.
        raise RefusedError(f"`{lost[0]}` is deleted: somebody deletes backups", hint="memharbor backup undelete")
    plan = plan_purge(history, now=now, keep=keep)
    report: dict[str, Any] = {
        "entries": len(entries),
        "versions": len(plan.versions),
        "keys": len(plan.tombstones),
        "bytes": sum(entry.size_bytes for entry in plan.versions),
        "unfinished_uploads": store.abort_uploads(begun_before=now - _UPLOAD_MAXIMUM, dry_run=dry_run),
    }
    if not dry_run:
        store.delete_entries(plan.versions)
        if offsite is not None and plan.tombstones:
            check_copy()
            offsite.delete(entry.key for entry in plan.tombstones)
        # The marker last: as long as it is there, the copy has not been told.
        store.delete_entries(plan.tombstones)
    if offsite is not None:
        check_copy()
        report["offsite_versions"] = _purge_copy(offsite, now=now, keep=keep, dry_run=dry_run)
    return report


def _purge_copy(offsite: Place, *, now: datetime, keep: timedelta, dry_run: bool) -> int:
    """Purge the copy as well, where its bucket keeps versions; returns how many were deleted."""
    offsite.abort_uploads(begun_before=now - _UPLOAD_MAXIMUM, dry_run=dry_run)
    if not offsite.is_versioned():
        return 0
    plan = plan_purge(group(offsite.entries()), now=now, keep=keep)
    if not dry_run:
        offsite.delete_entries((*plan.versions, *plan.tombstones))
    return len(plan.versions) + len(plan.tombstones)


def undelete(
    store: Place,
    *,
    now: datetime,
    keep: timedelta,
    since: datetime | None = None,
    at: datetime | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """
    Bring back what was deleted, or with `at` the state of a moment, from the versions that the store keeps.

    pgBackRest's lists come last, so that they never name what is not there yet.

    Args:
        store: The first store.
        now: Aware.
        keep: The promise; what is older is not brought back, for a part of it may be purged.
        since: What was deleted before stays so; the promise by default.
        at: Bring back also what was overwritten: the version that was current then is written once more.
        dry_run: Only count.

    Raises:
        RefusedError: The moment is in the future, or older than the promise.
    """
    moment = at or since or now - keep
    if moment > now:
        raise RefusedError(f"{moment.isoformat()} is in the future")
    if moment < now - keep:
        raise RefusedError(
            f"the store keeps versions for {keep.days} days, and {moment.isoformat()} is longer ago",
            hint=f"name a moment after {(now - keep).isoformat(timespec='seconds')}",
        )
    history = group(store.entries())
    plan = plan_undelete_at(history, at=moment) if at is not None else plan_undelete(history, since=moment)
    if not dry_run:
        _bring_back(store, plan)
    return {
        "brought_back": plan.brought_back,
        "delete_markers": len(plan.markers),
        "copies": len(plan.copies),
        "gone": plan.gone,
    }


def _bring_back(store: Place, plan: UndeletePlan) -> None:
    for wanted in (False, True):
        store.delete_entries(entry for entry in plan.markers if is_info(entry.key) is wanted)
        for entry in plan.copies:
            if is_info(entry.key) is wanted:
                store.copy_from(store, entry.key, version_id=entry.version_id)
