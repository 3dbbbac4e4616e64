"""
Let this machine drill regularly: a systemd timer where systemd runs, else a line of crontab.

A drill needs the Docker engine, which no container of the stack has, so that it is the host that starts it. Nothing here
holds a secret: what is started reads the passphrase from its file. Sources: systemd.timer(5), systemd.exec(5),
systemd.syntax(7), crontab(5).
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from memharbor.errors import StateRefusedError
from memharbor.process import find_tool, run

Frequency = Literal["daily", "weekly"]
Place = Literal["systemd", "systemd --user", "crontab"]

_CALENDAR = {"daily": "*-*-* 04:30", "weekly": "Sun *-*-* 04:30"}
_CRON = {"daily": "30 4 * * *", "weekly": "30 4 * * 0"}
# After which a schedule was missed: its period and some hours for a machine that was off or a drill that takes long.
_LATEST = {"daily": timedelta(hours=30), "weekly": timedelta(days=8)}
# What Pulumi and the engine's client need to find the stack again; none of them is a secret.
_KEPT_VARIABLES = (
    "HOME",
    "PATH",
    "PULUMI_HOME",
    "PULUMI_BACKEND_URL",
    "PULUMI_CONFIG_PASSPHRASE_FILE",
    "DOCKER_HOST",
    "DOCKER_TLS_VERIFY",
    "DOCKER_CERT_PATH",
)


@dataclass(frozen=True)
class Job:
    """
    What is started.

    Args:
        stack: The stack.
        program: This `memharbor`.
        folder: The checkout, from which it runs.
        log: Where cron's run writes what it says.
        environ: The variables that it needs.
    """

    stack: str
    program: str
    folder: Path
    log: Path
    environ: Mapping[str, str]

    @property
    def name(self) -> str:
        """The name of its units and of its line."""
        return f"memharbor-drill-{self.stack}"


def describe_job(stack: str, program: str, folder: Path, log: Path, environ: Mapping[str, str]) -> Job:
    """
    Describe what is started, with the variables of this process that it needs.

    Raises:
        StateRefusedError: The passphrase is in a variable, and a schedule must not hold it.
    """
    if "PULUMI_CONFIG_PASSPHRASE" in environ and "PULUMI_CONFIG_PASSPHRASE_FILE" not in environ:
        raise StateRefusedError(
            "PULUMI_CONFIG_PASSPHRASE holds the passphrase, and a schedule must not",
            hint="put it into a file and name that in PULUMI_CONFIG_PASSPHRASE_FILE",
        )
    kept = {name: environ[name] for name in _KEPT_VARIABLES if environ.get(name)}
    return Job(stack, program, folder, log, kept)


def render_units(job: Job, frequency: Frequency) -> dict[str, str]:
    """Render the service and its timer, by file name. The time is the machine's own."""
    variables = "".join(f"Environment={_systemd_quoted(f'{name}={value}')}\n" for name, value in job.environ.items())
    command = " ".join(
        _systemd_quoted(word).replace("$", "$$") for word in (job.program, "drill", "--stack", job.stack)
    )
    service = (
        f"[Unit]\nDescription=Restore drill of Memharbor stack {job.stack}\nAfter=docker.service\n\n"
        f"[Service]\nType=oneshot\nWorkingDirectory={str(job.folder).replace('%', '%%')}\n{variables}"
        f"ExecStart={command}\nNice=10\n"
    )
    timer = (
        f"[Unit]\nDescription=Restore drill of Memharbor stack {job.stack}, {frequency}\n\n"
        # Persistent: a drill that the machine slept through is made up for.
        f"[Timer]\nOnCalendar={_CALENDAR[frequency]}\nRandomizedDelaySec=30min\nPersistent=true\n\n"
        "[Install]\nWantedBy=timers.target\n"
    )
    return {f"{job.name}.service": service, f"{job.name}.timer": timer}


def _systemd_quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def render_crontab_line(job: Job, frequency: Frequency) -> str:
    """Render the line, without its end; it carries its name as a comment of the shell."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in job.environ.items())
    command = (
        f"cd {shlex.quote(str(job.folder))} && env {variables} {shlex.quote(job.program)} drill"
        f" --stack {shlex.quote(job.stack)} > {shlex.quote(str(job.log))} 2>&1 # {job.name}"
    )
    return f"{_CRON[frequency]} {command}".replace("%", "\\%")


def merge_crontab(present: str, job: Job, line: str | None) -> str:
    r"""
    Put a line into a crontab in place of the one of that name, or only take that one out.

    >>> job = Job("dev", "/m", Path("/c"), Path("/l"), {})
    >>> merge_crontab("1 2 * * * x\n30 4 * * * y # memharbor-drill-dev\n", job, None)
    '1 2 * * * x\n'
    """
    lines = [each for each in present.splitlines() if not each.endswith(f"# {job.name}")]
    return "".join(f"{each}\n" for each in [*lines, *([line] if line else [])])


def find_place() -> Place | None:
    """Find what starts things regularly on this machine; `None` where there is nothing."""
    if Path("/run/systemd/system").is_dir() and find_tool("systemctl"):
        return "systemd" if os.geteuid() == 0 else "systemd --user"
    return "crontab" if find_tool("crontab") else None


def install(job: Job, frequency: Frequency, place: Place | None) -> None:
    """
    Bring a schedule into force, in place of an older one.

    Raises:
        StateRefusedError: Nothing on this machine starts things regularly; the line is in the message.
        ExternalToolError: systemd or cron refused.
    """
    if place is None:
        raise StateRefusedError(
            "this machine has neither systemd nor crontab; give this line to what starts things regularly here:\n"
            + render_crontab_line(job, frequency),
            hint="install cron, or run `memharbor drill` yourself",
        )
    job.log.parent.mkdir(parents=True, exist_ok=True)
    if place == "crontab":
        _write_crontab(merge_crontab(_read_crontab(), job, render_crontab_line(job, frequency)))
        return
    folder = _units_folder(place)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in render_units(job, frequency).items():
        (folder / name).write_text(text, encoding="utf-8")
    _systemctl(place, "daemon-reload")
    _systemctl(place, "enable", "--now", f"{job.name}.timer")


def remove(job: Job, place: Place | None) -> None:
    """
    Take a schedule out of force; nothing happens where there is none.

    Raises:
        ExternalToolError: systemd or cron refused.
    """
    if place == "crontab":
        present = _read_crontab()
        if merge_crontab(present, job, None) != present:
            _write_crontab(merge_crontab(present, job, None))
    elif place is not None:
        units = [_units_folder(place) / f"{job.name}.{kind}" for kind in ("timer", "service")]
        if any(unit.exists() for unit in units):
            _systemctl(place, "disable", "--now", units[0].name)
            for unit in units:
                unit.unlink(missing_ok=True)
            _systemctl(place, "daemon-reload")


def _units_folder(place: Place) -> Path:
    if place == "systemd":
        return Path("/etc/systemd/system")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"


def _systemctl(place: Place, *arguments: str) -> None:
    run(["systemctl", *(["--user"] if place == "systemd --user" else []), *arguments], hint="run `systemctl status`")


def _read_crontab() -> str:
    from memharbor.errors import ExternalToolError

    try:
        return run(["crontab", "-l"])
    except ExternalToolError as exc:
        if "no crontab" in exc.message:
            return ""
        raise


def _write_crontab(text: str) -> None:
    run(["crontab", "-"], input_text=text)


def read_note(path: Path) -> dict[str, Any] | None:
    """Read what `write_note` wrote; `None` where no schedule is set."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and note.get("frequency") in _LATEST else None


def write_note(path: Path, frequency: Frequency | None, place: Place | None, *, now: datetime) -> None:
    """Note which schedule is set, for `status`; or that none is."""
    if frequency is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    note = {"frequency": frequency, "place": place, "set_at": now.astimezone(UTC).isoformat(timespec="seconds")}
    path.write_text(json.dumps(note) + "\n", encoding="utf-8")


def is_overdue(note: Mapping[str, Any] | None, last_verified_at: datetime | None, now: datetime) -> bool:
    """
    Tell whether a schedule is set and no drill has been good for longer than it allows.

    >>> note = {"frequency": "daily", "set_at": "2026-01-01T00:00:00+00:00"}
    >>> is_overdue(note, None, datetime(2026, 1, 2, tzinfo=UTC)), is_overdue(note, None, datetime(2026, 1, 3, tzinfo=UTC))
    (False, True)
    """
    if note is None:
        return False
    since = max(filter(None, [last_verified_at, datetime.fromisoformat(note["set_at"])]))
    return now - since > _LATEST[note["frequency"]]
