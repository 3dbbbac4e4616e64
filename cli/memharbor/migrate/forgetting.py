"""
Forget an erased user in the work folders of migrations: their staged rows and dead letters are copies, too.

A run that carried rows of the user is cleared whole: what it loaded is in the database, where the erasure has deleted the
user's part, and its segments are of no further use but for `compare`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memharbor.migrate.run_folders import list_runs
from memharbor.migrate.transform import names_user
from memharbor.migrate.workfolder import CLEARED, STEPS, WorkFolder


def forget_user(folder: Path, user_id: str, *, dry_run: bool = False) -> list[str]:
    """
    Clear every run that carried rows of a user.

    Args:
        folder: Of the runs.
        user_id: As the database names the user, or as a source did.
        dry_run: Only look.

    Returns:
        The names of the runs that were, or would be, cleared.

    Raises:
        SourceDataError: A segment is damaged, so that nobody knows whose rows it has.
    """
    found = [run for run in list_runs(folder) if _carries(run, user_id)]
    if not dry_run:
        for run in found:
            _clear(run)
        _remove_cut_off(folder)
    return [run.path.name for run in found]


def _carries(run: WorkFolder, user_id: str) -> bool:
    # A user may have another name here than in the source.
    names = run.read_run()["settings"]["remap_users"]
    wanted = {user_id, *(old for old, new in names.items() if new == user_id)}
    return any(names_user(data, name) or _may_name(data, name) for data in _data(run) for name in wanted)


def _may_name(data: Any, name: str) -> bool:
    """Tell whether an item that could not be read has a user's name in it."""
    return isinstance(data, dict) and name in str(data.get("raw", ""))


def _remove_cut_off(folder: Path) -> None:
    """Remove what processes that were killed wrote of a file: nobody reads it, and it may have anybody's text."""
    for path in folder.rglob(".*"):
        process = path.suffix[1:]
        if path.is_file() and process.isdigit() and not Path("/proc", process).exists():
            path.unlink()


def _data(run: WorkFolder) -> Iterator[Any]:
    for step in STEPS[:-1]:
        for number in run.segments(step):
            for line in run.read_segment(step, number):
                yield line.get("item", line.get("record", line)).get("data", {})


def _clear(run: WorkFolder) -> None:
    # First what says so: a clearing that was cut off is repeated, and nobody goes on with half a run.
    run.write_json(CLEARED, {"at": datetime.now(UTC).isoformat()})
    for path in run.path.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("run.json", "rolled-back.json", CLEARED):
            path.unlink()
