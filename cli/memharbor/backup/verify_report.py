"""
What `pgbackrest verify` says, and what was found in all: pure.

Its exit code is 0 whatever it finds. Its report counts; the names of damaged files stand in its INFO lines, and what is
wrong with copies of its own files in its DETAIL lines. Source: pgBackRest 2.60, command/verify; docs/concepts/backup.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

BadReason = Literal["missing", "checksum", "size", "too short", "unreadable", "not answered"]

_BAD_FILE = re.compile(
    r"^(?P<what>invalid checksum|invalid size|file missing|invalid result) '?(?P<path>[^':\s]+)'?(?:: \[(?P<code>\d+)\] (?P<words>.*))?"
)
_LOG_LINE = re.compile(r"^P\d+ +(?:INFO|DETAIL|WARN|ERROR): (?P<text>.*)$")
_BACKUP_LINE = re.compile(r"^ +backup: (?P<label>\S+), status: (?P<status>[a-z -]+?)(?:,|$)")
_DUPLICATE = re.compile(r"duplicate WAL '([0-9A-F]{24})'")
# Lines that say nothing bad.
_HARMLESS = re.compile(
    r"^(?:archiveId: |statistics: |verify command |stanza: |\[DRY-RUN\]|backup '.*' appears to be in progress|"
    r"manifest missing for '.*' - backup may have expired|no (?:archives|backups) exist|duplicate WAL |"
    r"path '.*' does not contain any valid WAL)"
)
_LABEL = re.compile(r"^\d{8}-\d{6}F(?:_\d{8}-\d{6}[DI])?$")
# Errors of the way to the store and not of what lies in it: ProtocolError, HostConnectError, ServiceError.
_TRANSPORT_CODES = {"39", "49", "101"}
_REASONS: dict[str, BadReason] = {
    "invalid checksum": "checksum",
    "invalid size": "size",
    "file missing": "missing",
    "invalid result": "unreadable",
}


@dataclass(frozen=True)
class BadFile:
    """
    A file that pgBackRest found wanting.

    Args:
        path: Below `backup/<stanza>` or `archive/<stanza>`.
        reason: What is wrong.
        words: pgBackRest's own words, where it has any.
    """

    path: str
    reason: BadReason
    words: str = ""

    @property
    def backup(self) -> str | None:
        """The backup in whose folder it lies; `None` for WAL."""
        folder = self.path.split("/", 1)[0]
        return folder if _LABEL.match(folder) else None


@dataclass(frozen=True)
class Report:
    """
    What `pgbackrest verify --output=text --verbose` said.

    Args:
        status: `ok`, `error`, `failed` where it broke off, or empty where it said nothing.
        backups: State by label: `valid`, `invalid`, `manifest missing`, `in-progress`.
        bad_files: Each once.
        remarks: Other lines, most of them about copies of its own files.
    """

    status: str
    backups: dict[str, str]
    bad_files: tuple[BadFile, ...]
    remarks: tuple[str, ...]

    @property
    def not_answered(self) -> list[BadFile]:
        """Files about which the store gave no answer, which need not be damaged."""
        return [bad for bad in self.bad_files if bad.reason == "not answered"]


def parse_report(text: str) -> Report:
    r"""
    Read the output of `verify --output=text --verbose --log-level-console=detail --log-timestamp=n`.

    >>> said = "P02   INFO: invalid checksum '20261121-153809F/bundle/1'\nP00 DETAIL: x does not match y\n"
    >>> report = parse_report(said + "stanza: main\nstatus: error\n  backup: 20261121-153809F, status: invalid, total\n")
    >>> report.status, report.backups, report.bad_files[0].reason, report.remarks
    ('error', {'20261121-153809F': 'invalid'}, 'checksum', ('x does not match y',))
    """
    log, _, result = text.rpartition("\nstanza: ") if "\nstanza: " in text else (text, "", "")
    status = re.search(r"^status: (\w+)", result, re.MULTILINE)
    backups = {found["label"]: found["status"] for found in map(_BACKUP_LINE.match, result.splitlines()) if found}
    bad: dict[str, BadFile] = {}
    remarks = []
    for line in f"{log}\n{result}".splitlines():
        found = _LOG_LINE.match(line)
        if found is None:
            continue
        file = _BAD_FILE.match(found["text"])
        if file is not None:
            bad.setdefault(file["path"], BadFile(file["path"], _reason(file), file["words"] or ""))
        elif not _HARMLESS.match(found["text"]):
            remarks.append(found["text"])
    return Report(status[1] if status else "", backups, tuple(bad.values()), tuple(remarks))


def failed_report(text: str) -> Report:
    r"""
    Make a report of a verification that ended with an error, with the error's words.

    >>> failed_report("P00   INFO: begin\nP00  ERROR: [029]: the lists do not match\n").remarks
    ('the lists do not match',)
    """
    words = re.findall(r"^P\d+ +ERROR: \[\d+\]: (.*)$", text, re.MULTILINE)
    return Report("failed", {}, (), tuple(words[:1]) or (text.strip()[-200:],))


def _reason(found: re.Match[str]) -> BadReason:
    if found["code"] in _TRANSPORT_CODES:
        # The store answers 416 where a bundle ends before the file that should lie in it.
        return "too short" if "416" in (found["words"] or "") else "not answered"
    return _REASONS[found["what"]]


@dataclass(frozen=True)
class Finding:
    """
    One thing that is wrong.

    Args:
        kind: A short name, for programs.
        what: What is wrong.
        unusable: The backups that cannot be restored because of it.
        restorable: What still can be.
        hint: The next command or step.
    """

    kind: str
    what: str
    unusable: tuple[str, ...]
    restorable: str
    hint: str

    @property
    def line(self) -> str:
        """The finding as one line."""
        unusable = f"unusable: {', '.join(self.unusable)}" if self.unusable else "no backup is unusable"
        return f"damaged: {self.what}; {unusable}; still restorable: {self.restorable}; next: {self.hint}"


@dataclass(frozen=True)
class CheckedBackup:
    """
    A backup after the check.

    Args:
        id: Its label.
        state: `good`, `unusable` or `in progress`.
        reaches: The last WAL segment to which it can be replayed without a gap; empty where it is not good.
        reaches_end: Whether that is the end of the archive.
    """

    id: str
    state: Literal["good", "unusable", "in progress"]
    reaches: str = ""
    reaches_end: bool = False


@dataclass(frozen=True)
class Verification:
    """
    The result of a check.

    Args:
        findings: What is wrong; good where there is nothing.
        notes: What could not be checked, and what is worth knowing and not wrong.
        backups: Every backup that was looked at, oldest first.
        segment_count: How many WAL segments were looked at.
        seconds: How long it took.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    backups: tuple[CheckedBackup, ...]
    segment_count: int
    seconds: float

    @property
    def is_good(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def as_data(self) -> dict[str, Any]:
        """Describe the result for `--output json`."""
        return {
            "good": self.is_good,
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
            "backups": [asdict(backup) for backup in self.backups],
            "segments": self.segment_count,
            "seconds": round(self.seconds, 1),
        }

    def as_text(self) -> str:
        """Describe the result for people: one line a finding."""
        lines = [finding.line for finding in self.findings]
        if self.is_good:
            good = sum(backup.state == "good" for backup in self.backups)
            lines.append(f"good: {good} backups and {self.segment_count} WAL segments, in {self.seconds:.1f} s")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def names_of(items: Sequence[str], *, at_most: int = 3) -> str:
    """
    List names, the first few in full.

    >>> names_of(["a", "b", "c", "d"], at_most=2)
    'a, b and 2 more'
    """
    shown = ", ".join(items[:at_most])
    return shown if len(items) <= at_most else f"{shown} and {len(items) - at_most} more"
