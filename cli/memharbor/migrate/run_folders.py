"""
Runs as their folders tell of them: which there are, how far each is, and from where it can be rolled back.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memharbor.errors import ConfigError, StateRefusedError
from memharbor.migrate.workfolder import CLEARED, STEPS, WorkFolder

VERIFIED = "verified.json"


def new_folder(folder: Path, kind: str, *, now: datetime) -> WorkFolder:
    """
    Name a new run, after its source and the time.

    >>> new_folder(Path("runs"), "platform", now=datetime(2026, 11, 21, 9, 30, tzinfo=UTC)).path.name
    '20261121T093000Z-platform'
    """
    name = f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{kind}"
    candidates = (folder / name, *(folder / f"{name}-{number}" for number in range(2, 1000)))
    return WorkFolder(next(path for path in candidates if not path.exists()))


def list_runs(folder: Path) -> list[WorkFolder]:
    """List the runs in a folder of runs, oldest first."""
    found = (WorkFolder(path) for path in sorted(folder.glob("*")) if path.is_dir())
    return [run for run in found if run.exists]


def find_run(folder: Path, name: str | None) -> WorkFolder:
    """
    Find a run by its name, or the newest.

    Raises:
        ConfigError: There is none.
    """
    runs = list_runs(folder)
    found = next((run for run in runs if run.path.name == name), None) if name else (runs[-1] if runs else None)
    if found is None and name and WorkFolder(Path(name)).exists:
        return WorkFolder(Path(name))
    if found is None:
        there_are = f"there are {', '.join(run.path.name for run in runs)}" if runs else "there is none yet"
        raise ConfigError(f"there is no run `{name or ''}`; {there_are}", hint="memharbor migrate run --help")
    return found


def describe_run(folder: WorkFolder) -> dict[str, Any]:
    """
    Say how far a run is: segments by step, refusals, and its state.

    The state is `to resume`; `to verify`, all is loaded; `complete`, and compared with the database; `differs`, it was
    found to be another one there; `rolled back`; or `cleared`.
    """
    run = folder.read_run()
    counts = {step: len(folder.segments(step)) for step in STEPS}
    is_done = folder.is_read() and len(set(counts.values())) == 1
    return {
        "name": folder.path.name,
        "source": run["source"]["name"],
        **counts,
        "refused": sum(1 for _ in folder.dead_letters()),
        "state": _state(folder, is_done=is_done),
    }


def _state(folder: WorkFolder, *, is_done: bool) -> str:
    if folder.read_json(CLEARED) is not None:
        return "cleared"
    if folder.read_json("rolled-back.json") is not None:
        return "rolled back"
    verified = folder.read_json(VERIFIED)
    if not is_done:
        return "to resume"
    if verified is None:
        return "to verify"
    return "complete" if verified["same"] else "differs"


def refuse_cleared(folder: WorkFolder) -> None:
    """
    Refuse to work with a run whose files are gone.

    Raises:
        StateRefusedError: A user of the run was erased, and its files with them.
    """
    if folder.read_json(CLEARED) is not None:
        raise StateRefusedError(
            f"the files of run {folder.path.name} went with a user who was erased",
            hint="begin a new one: memharbor migrate run",
        )


def read_checkpoint(folder: WorkFolder) -> str:
    """
    Read which checkpoint was taken before a run.

    Raises:
        StateRefusedError: None was.
    """
    name = folder.read_run()["checkpoint"]
    if name is None:
        raise StateRefusedError("no checkpoint was taken before this run", hint="memharbor checkpoint list")
    return str(name)
