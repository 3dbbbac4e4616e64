"""
The custodian's work, asked for from outside: purge, undelete, off-site copy.

It runs in the custodian's own container, which alone has the keys; nothing of them passes through here. Its answers are
JSON lines. Source: docker/custodian/memharbor_custodian/__main__.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from memharbor.backup.engine import BackupEngine
from memharbor.containers import Containers
from memharbor.errors import (
    ConfigError,
    ConnectError,
    ExternalToolError,
    MemharborError,
    StateRefusedError,
)
from memharbor.output import age_text, size_text

OnPercent = Callable[[float], None]

_PROGRAM = "/usr/local/lib/memharbor/custodian"
_ERRORS: Mapping[int, type[MemharborError]] = {
    error.exit_code: error for error in (ConfigError, ConnectError, StateRefusedError)
}
# For a segment that pgBackRest was sending when it was stopped.
_SETTLE_SECONDS = 3
# So many intervals without a good copy, and something holds it up.
_LATE_INTERVALS = 3


class Custodian:
    """
    The custodian of a stack.

    Args:
        containers: The Docker engine that runs the stack.
        names: The stack's containers by service.
        engine: The stack's backups, whose archiving rests while the store is filled.

    Raises:
        StateRefusedError: The stack has none yet (from the constructor).
    """

    def __init__(self, containers: Containers, names: Mapping[str, Sequence[str]], engine: BackupEngine) -> None:
        if not names.get("custodian"):
            raise StateRefusedError("the stack has no custodian yet", hint="run `pulumi up`")
        self._containers, self._name, self._engine = containers, names["custodian"][0], engine

    def purge(self, *, dry_run: bool = False) -> dict[str, Any]:
        """Delete for good what was deleted or overwritten longer ago than `version_retention_days`."""
        return self._run("purge", *_flag("--dry-run", dry_run))

    def undelete(
        self, *, since: datetime | None = None, at: datetime | None = None, dry_run: bool = False
    ) -> dict[str, Any]:
        """
        Bring back what was deleted in the store, or with `at` what was overwritten as well.

        Raises:
            StateRefusedError: The moment is older than what the store promises, or in the future.
        """
        moments = [("--since", since), ("--at", at)]
        options = [part for name, moment in moments if moment for part in (name, moment.isoformat())]
        return self._run("undelete", *options, *_flag("--dry-run", dry_run))

    def copy(
        self, *, accept_changes: bool = False, dry_run: bool = False, on_percent: OnPercent | None = None
    ) -> dict[str, Any]:
        """
        Bring the off-site copy in step.

        Raises:
            ConfigError: The stack has none.
            ConnectError: A store does not answer.
            StateRefusedError: The first store is not the one that was copied, or somebody deletes or overwrites backups.
        """
        flags = (*_flag("--accept-changes", accept_changes), *_flag("--dry-run", dry_run))
        return self._run("copy", *flags, on_percent=on_percent)

    def fetch(
        self, *, replace: bool = False, dry_run: bool = False, on_percent: OnPercent | None = None
    ) -> dict[str, Any]:
        """
        Fill a backup store that was lost from the off-site copy, while archiving rests.

        Raises:
            StateRefusedError: The store has backups, and `replace` is not given; or there is no complete copy.
            ConnectError: A store does not answer; the same call goes on from there.
        """
        flags = (*_flag("--replace", replace), *_flag("--dry-run", dry_run))
        if dry_run:
            return self._run("fetch", *flags)
        # Refusals first: archiving need not rest for them.
        self._run("fetch", *flags, "--dry-run")
        with self._archiving_rests():
            return self._run("fetch", *flags, "--settle-seconds", str(_SETTLE_SECONDS), on_percent=on_percent)

    def status(self) -> dict[str, Any]:
        """Tell how the last works went and how far behind the copy is; `offsite` is `None` where there is none."""
        return self._run("status")

    def works(self, *, now: datetime) -> dict[str, Any]:
        """
        Tell how the last works went, without looking at either place.

        Returns:
            What `summarise_works` gives.
        """
        return summarise_works(self._run("status", "--works-only"), now=now)

    @contextmanager
    def _archiving_rests(self) -> Iterator[None]:
        """Let PostgreSQL keep its segments meanwhile; pgBackRest's stop file goes with the container, too."""
        stanza = f"--stanza={self._engine.stanza}"
        self._engine.run_beside(["pgbackrest", stanza, "stop"])
        try:
            yield
        finally:
            self._engine.run_beside(["pgbackrest", stanza, "start"])

    def _run(self, *command: str, on_percent: OnPercent | None = None) -> dict[str, Any]:
        done = self._containers.execute(self._name, [_PROGRAM, *command], on_line=_progress_reader(on_percent))
        said = _last_object(done.stdout)
        if "result" in said:
            result: dict[str, Any] = said["result"]
            return result
        if "error" not in said:
            raise ExternalToolError(
                f"the custodian failed with exit code {done.exit_code}:\n{done.last_words}",
                hint=f"run `docker logs {self._name}`",
            )
        error = _ERRORS.get(done.exit_code, ExternalToolError)
        raise error(said["error"]["message"], hint=said["error"]["hint"] or "run `memharbor doctor`")


def _flag(name: str, wanted: bool) -> tuple[str, ...]:
    return (name,) if wanted else ()


def _last_object(text: str) -> dict[str, Any]:
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def _progress_reader(on_percent: OnPercent | None) -> Callable[[str], None] | None:
    if on_percent is None:
        return None

    def read(line: str) -> None:
        progress = _last_object(line).get("progress")
        if progress:
            on_percent(100 * progress["done"] / max(progress["of"], 1))

    return read


def summarise_works(said: Mapping[str, Any], *, now: datetime) -> dict[str, Any]:
    """
    Say whether the custodian keeps its promises. Pure.

    Args:
        said: What its `status --works-only` gives.
        now: The present moment.

    Returns:
        `has_offsite_copy`; `last_copy_at`, ISO 8601 in UTC, of the last good copy since the custodian started, and its age
        in seconds; `is_copy_behind`, where that is more than three intervals ago; `copy_failure` and `purge_failure`, the
        message of the last one where it failed. All `None` or false where there is nothing to say.

    >>> nothing = {"offsite": None, "copy": None, "purge": None}
    >>> summarise_works(nothing, now=datetime.fromisoformat("2026-01-01T00:00:00+00:00"))["has_offsite_copy"]
    False
    """
    copy, purge, offsite = said["copy"] or {}, said["purge"] or {}, said["offsite"]
    last_copy_at = copy.get("last_good_at") if offsite is not None else None
    age = None if last_copy_at is None else age_seconds(last_copy_at, now=now)
    return {
        "has_offsite_copy": offsite is not None,
        "last_copy_at": last_copy_at,
        "copy_age_seconds": None if age is None else round(age),
        "is_copy_behind": age is not None and age > _LATE_INTERVALS * offsite["interval_seconds"],
        "copy_failure": _failure(copy) if offsite is not None else None,
        "purge_failure": _failure(purge),
    }


def _failure(work: Mapping[str, Any]) -> str | None:
    return str(work["error"]["message"]) if "error" in work else None


def works_text(works: Mapping[str, Any]) -> str:
    """
    Write a summary of the custodian's works for people.

    >>> works_text(summarise_works({"offsite": None, "copy": None, "purge": None}, now=datetime.now()))
    'no off-site copy'
    """
    said = "no off-site copy"
    if works["has_offsite_copy"]:
        age = works["copy_age_seconds"]
        said = "off-site copy not made yet" if age is None else f"off-site copy {age_text(age)} ago"
        said += ", which is late" if works["is_copy_behind"] else ""
    failures = [("copy", works["copy_failure"]), ("purge", works["purge_failure"])]
    return said + "".join(f"; the last {name} failed: {cause}" for name, cause in failures if cause)


def offsite_text(status: Mapping[str, Any], *, now: datetime) -> str:
    """
    Write the off-site part of a status for people.

    >>> offsite_text({"offsite": None, "copy": None}, now=datetime.now())
    'there is no off-site copy; docs/how-to/off-site-copy.md says how to have one'
    """
    offsite, last = status["offsite"], status["copy"]
    if offsite is None:
        return "there is no off-site copy; docs/how-to/off-site-copy.md says how to have one"
    if "error" in offsite:
        lines = [offsite["error"]]
    else:
        as_of = offsite["as_of"]
        behind = f"as of {as_of}, {age_seconds(as_of, now=now):.0f} s ago" if as_of else "not complete yet"
        kept = "versions are kept" if offsite["is_versioned"] else "no versions are kept there"
        lines = [
            f"{offsite['objects']:,} objects, {size_text(offsite['bytes'])}, {behind}; {kept}",
            f"{offsite['waiting_objects']:,} objects, {size_text(offsite['waiting_bytes'])} wait to be copied",
            f"{offsite['only_in_copy']:,} objects are only in the copy: deleted, and not purged yet",
        ]
    if last is not None and "error" in last:
        lines.append(f"the last copy failed at {last['ended_at']}: {last['error']['message']}")
    return "\n".join(lines)


def age_seconds(moment: str, *, now: datetime) -> float:
    """
    Tell how long ago an ISO 8601 moment was.

    >>> age_seconds("2026-01-01T00:00:00+00:00", now=datetime.fromisoformat("2026-01-01T00:01:00+00:00"))
    60.0
    """
    return (now - datetime.fromisoformat(moment)).total_seconds()
