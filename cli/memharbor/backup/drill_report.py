"""
What a drill found, as data, as text and as one HTML page that needs nothing else. Pure, but for `write_report`.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from memharbor.output import size_text

_MARKS = {True: "ok", False: "FAILED", None: "not compared"}
_CLASSES = {True: "good", False: "bad", None: "unknown"}
# Names of the steps of a restore, as `memharbor.backup.sandbox` times them.
_STEPS = {"disk": "Look for disk", "restore": "Restore the files", "replay": "Replay the log"}


@dataclass(frozen=True)
class StepResult:
    """One step of the restore, and its seconds."""

    name: str
    seconds: float


@dataclass(frozen=True)
class CheckResult:
    """One check: whether what was found is as it should be (`None`: nothing to compare with), and its seconds."""

    name: str
    is_good: bool | None
    detail: str
    seconds: float

    @property
    def mark(self) -> str:
        """The result in words."""
        return _MARKS[self.is_good]


@dataclass(frozen=True)
class DrillReport:
    """One drill. Instants aware UTC, sizes in bytes, times in seconds."""

    stack: str
    backup: str
    backup_ended_at: datetime
    target: str
    reached_lsn: str | None
    begun_at: datetime
    seconds: float
    database_bytes: int
    steps: tuple[StepResult, ...]
    checks: tuple[CheckResult, ...]

    @property
    def id(self) -> str:
        """Its name in files and records."""
        return f"{self.begun_at:%Y%m%dT%H%M%SZ}"

    @property
    def ended_at(self) -> datetime:
        """When it was over."""
        return self.begun_at + timedelta(seconds=self.seconds)

    @property
    def is_good(self) -> bool:
        """Whether the backup was restored and nothing was found wrong; what could not be compared is no fault."""
        return bool(self.checks) and not self.failed

    @property
    def failed(self) -> list[CheckResult]:
        """The checks that found something wrong."""
        return [check for check in self.checks if check.is_good is False]

    def as_data(self) -> dict[str, Any]:
        """Describe the drill for `--output json` and for its record."""
        return {
            "format": 1,
            "id": self.id,
            "stack": self.stack,
            "result": "verified" if self.is_good else "failed",
            "backup": self.backup,
            "backup_ended_at": self.backup_ended_at.isoformat(),
            "target": self.target,
            "reached_lsn": self.reached_lsn,
            "begun_at": self.begun_at.isoformat(timespec="seconds"),
            "ended_at": self.ended_at.isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 1),
            "database_bytes": self.database_bytes,
            "steps": [{"name": step.name, "seconds": round(step.seconds, 1)} for step in self.steps],
            "checks": [
                {
                    "name": check.name,
                    "result": {True: "ok", False: "failed", None: "not compared"}[check.is_good],
                    "detail": check.detail,
                    "seconds": round(check.seconds, 1),
                }
                for check in self.checks
            ],
        }

    def as_text(self) -> str:
        """Write the drill for people."""
        lines = [
            f"drill {self.id} of stack {self.stack}: {'verified' if self.is_good else 'FAILED'}",
            f"backup {self.backup} of {self.backup_ended_at:%Y-%m-%d %H:%M:%S} UTC, {size_text(self.database_bytes)},"
            f" restored to {self.target} in {self.seconds:.1f} s",
            "",
        ]
        lines += [f"{'':14}{step_name(step):<24}{step.seconds:>7.1f} s" for step in self.steps]
        lines += [f"{check.mark:<14}{check.name:<24}{check.seconds:>7.1f} s  {check.detail}" for check in self.checks]
        return "\n".join(lines) + "\n"


def step_name(step: StepResult) -> str:
    """Name a step for people."""
    return _STEPS.get(step.name, step.name)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Drill {id} of {stack}: {result}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1d2329; background: #fff }}
h1 {{ font-size: 1.4rem }} table {{ border-collapse: collapse; width: 100%; margin: 1rem 0 }}
th, td {{ text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #dde2e7; vertical-align: top }}
td.seconds {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }}
td.bar {{ width: 30% }} .bar span {{ display: block; height: .8rem; margin-top: .3rem; background: #4a7fb5; border-radius: 2px }}
.good {{ color: #19692c }} .bad {{ color: #a3161f; font-weight: 600 }} .unknown {{ color: #7a5b00 }}
@media (prefers-color-scheme: dark) {{ body {{ color: #dfe5ea; background: #14181c }} th, td {{ border-color: #333b43 }}
 .good {{ color: #6fcf84 }} .bad {{ color: #ff8b91 }} .unknown {{ color: #e2bd57 }} }}
</style>
</head>
<body>
<h1>Drill of stack {stack}: <span class="{class_}">{result}</span></h1>
<table>
<tr><th>Backup</th><td>{backup}, made at {backup_ended_at}</td></tr>
<tr><th>Restored to</th><td>{target}</td></tr>
<tr><th>Reached</th><td>{reached}</td></tr>
<tr><th>Begun</th><td>{begun_at}</td></tr>
<tr><th>Took</th><td>{seconds} s for {size}</td></tr>
</table>
<table>
<tr><th>Step</th><th>Result</th><th>Found</th><th>Seconds</th><th></th></tr>
{rows}
</table>
</body>
</html>
"""


def render_html(report: DrillReport) -> str:
    """Write a drill as one page that names no other file and runs no script."""
    longest = max([step.seconds for step in report.steps] + [check.seconds for check in report.checks], default=0.0)
    rows = [(step_name(step), "", "", "", step.seconds) for step in report.steps]
    rows += [(check.name, check.mark, _CLASSES[check.is_good], check.detail, check.seconds) for check in report.checks]
    return _PAGE.format(
        id=report.id,
        stack=html.escape(report.stack),
        result="verified" if report.is_good else "FAILED",
        class_=_CLASSES[report.is_good],
        backup=html.escape(report.backup),
        backup_ended_at=f"{report.backup_ended_at:%Y-%m-%d %H:%M:%S} UTC",
        target=html.escape(report.target),
        reached=html.escape(report.reached_lsn or "nothing"),
        begun_at=f"{report.begun_at:%Y-%m-%d %H:%M:%S} UTC",
        seconds=f"{report.seconds:.1f}",
        size=size_text(report.database_bytes),
        rows="\n".join(_row(*row, share=row[4] / longest if longest else 0.0) for row in rows),
    )


def _row(name: str, mark: str, kind: str, detail: str, seconds: float, *, share: float) -> str:
    return (
        f'<tr><td>{html.escape(name)}</td><td class="{kind}">{mark}</td><td>{html.escape(detail)}</td>'
        f'<td class="seconds">{seconds:.1f}</td><td class="bar"><span style="width:{share * 100:.0f}%"></span></td></tr>'
    )


def write_report(report: DrillReport, folder: Path) -> dict[str, Path]:
    """
    Write the report as text, JSON and HTML, and name the files by kind.

    Args:
        report: The drill.
        folder: Where to; made where it is missing. Each file is there as a whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "txt": report.as_text(),
        "json": json.dumps(report.as_data(), indent=2, ensure_ascii=False) + "\n",
        "html": render_html(report),
    }
    paths = {}
    for kind, text in texts.items():
        paths[kind] = folder / f"{report.id}.{kind}"
        incoming = folder / f".{report.id}.{kind}.new"
        incoming.write_text(text, encoding="utf-8")
        incoming.replace(paths[kind])
    return paths
