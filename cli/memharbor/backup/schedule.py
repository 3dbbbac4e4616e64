"""
The schedule of backups: presets, what is asked for, what is in force, what comes next. Pure but for `read_runs`.

The schedule lives in the stack's settings; `pulumi up` brings it into the database's container, where supercronic reads
it. Times are UTC.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from memharbor.backup.engine import BackupEngine
from memharbor.cron import find_next
from memharbor.errors import UsageError
from memharbor.server_files.postgres import BACKUP_PROGRAM, BACKUP_TYPES, SCHEDULE_STATE
from memharbor.settings import Settings

_FULL, _DIFF, _INCR = (str(Settings.model_fields[f"backup_schedule_{each}"].default) for each in BACKUP_TYPES)
# A preset names how old the newest backup may get; what comes before it is made less often.
PRESETS: Mapping[str, tuple[str, str, str]] = {
    "hourly": (_FULL, _DIFF, _INCR),
    "daily": (_FULL, _DIFF, ""),
    "weekly": (_FULL, "", ""),
    "off": ("", "", ""),
}


@dataclass(frozen=True)
class Wanted:
    """
    What `schedule set` was asked for; `None` leaves a part as it is.

    Args:
        preset: One of `PRESETS`.
        crons: Expressions by type of backup; they win over the preset, and an empty one is never.
        retention_days: Days back to which every moment can be restored.
        retention_full: Full backups that are kept at least.
    """

    preset: str | None
    crons: Mapping[str, str | None]
    retention_days: int | None = None
    retention_full: int | None = None

    def settings(self) -> dict[str, str]:
        """
        Name the settings that are to be set.

        Raises:
            UsageError: None is.

        >>> Wanted("daily", {"diff": "0 4 * * *"}, retention_days=30).settings()["backup_schedule_diff"]
        '0 4 * * *'
        """
        wanted = dict(zip(BACKUP_TYPES, PRESETS[self.preset], strict=True)) if self.preset else {}
        wanted |= {each: cron for each, cron in self.crons.items() if cron is not None}
        settings = {f"backup_schedule_{each}": cron for each, cron in wanted.items()}
        if self.retention_days is not None:
            settings["backup_retention_days"] = str(self.retention_days)
        if self.retention_full is not None:
            settings["backup_retention_full"] = str(self.retention_full)
        if not settings:
            raise UsageError("nothing to set", hint="pass `--schedule daily`, or see `--help`")
        return settings


def parse_crontab(text: str) -> dict[str, str]:
    r"""
    Read the schedule out of a crontab of ours, by type of backup.

    >>> parse_crontab(f"# x\n17 2 * * 0 {BACKUP_PROGRAM} full\n")
    {'full': '17 2 * * 0'}
    """
    lines = (line.partition(BACKUP_PROGRAM) for line in text.splitlines() if not line.startswith("#"))
    return {each.strip(): when.strip() for when, program, each in lines if program}


def parse_runs(text: str) -> dict[str, dict[str, Any]]:
    """Read how scheduled backups ended, one JSON object a line, by type of backup; what is damaged is left out."""
    runs = {}
    for line in text.splitlines():
        try:
            run = json.loads(line)
            runs[str(run["type"])] = run
        except (ValueError, KeyError, TypeError):
            continue
    return runs


def read_runs(engine: BackupEngine) -> dict[str, dict[str, Any]]:
    """Read how the scheduled backups of a stack ended, by type of backup; what never ran is left out."""
    return parse_runs(engine.run_beside(["sh", "-c", f"cat {SCHEDULE_STATE}/*.json 2>/dev/null"]).stdout)


def describe(
    settings: Settings, in_force: Mapping[str, str], runs: Mapping[str, Mapping[str, Any]], now: datetime
) -> dict[str, Any]:
    """
    Put config, container and past runs side by side, as plain data.

    Args:
        settings: Those of the stack's config.
        in_force: The container's schedule, by type of backup.
        runs: How scheduled backups ended, by type of backup.
        now: From when on the next runs are counted.
    """
    rows = []
    for each in BACKUP_TYPES:
        cron = str(getattr(settings, f"backup_schedule_{each}"))
        present = in_force.get(each, "")
        run = runs.get(each)
        rows.append(
            {
                "type": each,
                "schedule": cron or None,
                "in_force": present or None,
                "next_run_at": find_next(present, now).isoformat() if present else None,
                "last_run": dict(run) if run is not None else None,
            }
        )
    return {
        "backups": rows,
        "retention_full": settings.backup_retention_full,
        "retention_days": settings.backup_retention_days,
        "is_in_force": all(row["schedule"] == row["in_force"] for row in rows),
    }
