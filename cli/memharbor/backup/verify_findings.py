"""
Turn what was read from a repository into findings: what is wrong, what it makes unusable, what still can be restored. Pure.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from memharbor.backup import verify_wal
from memharbor.backup.engine import Backup
from memharbor.backup.verify_report import BadFile, CheckedBackup, Finding, Report, Verification, names_of
from memharbor.backup.verify_wal import ArchivedWal, Gap, ServerWal
from memharbor.backup.wal import Segment, history_problem, parse_segment
from memharbor.errors import ExternalToolError

_NEW_FULL = "run `memharbor backup create --type full`"
_OLDER_VERSION = "run `memharbor backup undelete --at TIME`, a time at which it was good"
_WORDS = {
    "missing": "missing",
    "checksum": "different from their checksum",
    "size": "of another size",
    "too short": "too short",
    "unreadable": "not readable",
    "not answered": "not given out by the store",
}


@dataclass(frozen=True)
class MetadataFile:
    """
    One of pgBackRest's own files.

    Args:
        path: In the repository.
        state: `good` where it could be decrypted and is complete.
        is_encrypted: Whether it begins as an encrypted file does.
        digest: SHA-256 of what it says; empty where it is not good.
    """

    path: str
    state: Literal["good", "missing", "unreadable"]
    is_encrypted: bool = False
    digest: str = ""


def parse_metadata(text: str) -> list[MetadataFile]:
    r"""
    Read what the script in the container says of metadata files.

    Raises:
        ExternalToolError: The store did not answer for one of them.

    >>> [file.state for file in parse_metadata("a missing\nb encrypted unreadable\nc encrypted 0a1b\n")]
    ['missing', 'unreadable', 'good']
    """
    files = []
    for line in text.splitlines():
        path, _, rest = line.partition(" ")
        kind, _, digest = rest.partition(" ")
        if kind == "failed":
            raise ExternalToolError(f"the backup store did not give out `{path}`", hint="run `memharbor doctor`")
        if kind == "missing":
            files.append(MetadataFile(path, "missing"))
        elif digest == "unreadable":
            files.append(MetadataFile(path, "unreadable", kind == "encrypted"))
        else:
            files.append(MetadataFile(path, "good", kind == "encrypted", digest))
    return files


def troubled(files: Sequence[MetadataFile]) -> list[str]:
    """List the paths of pairs of which one is not good or that differ."""
    return [file.path for main, copy in _pairs(files) if not _is_good(main, copy) for file in (main, copy)]


def _pairs(files: Sequence[MetadataFile]) -> list[tuple[MetadataFile, MetadataFile]]:
    copies = {file.path.removesuffix(".copy"): file for file in files if file.path.endswith(".copy")}
    return [(file, copies[file.path]) for file in files if file.path in copies]


def _is_good(main: MetadataFile, copy: MetadataFile) -> bool:
    return main.state == copy.state == "good" and main.digest == copy.digest


class Judge:
    """
    Collect findings.

    Args:
        begun_at: When the verification began, by the monotonic clock.
        server: What the server knows of its WAL.
    """

    def __init__(self, begun_at: float, server: ServerWal) -> None:
        self._begun_at = begun_at
        self.server = server
        self.backups: list[Backup] = []
        self._findings: list[Finding] = []
        self._notes: list[str] = []
        self._in_progress: list[str] = []
        self._reaches: dict[str, tuple[Segment | None, bool]] = {}
        self._segment_count = 0
        self._is_explained = False

    @property
    def has_findings(self) -> bool:
        """Whether anything was found so far."""
        return bool(self._findings)

    def verification(self) -> Verification:
        """Put the result together."""
        unusable = {label for finding in self._findings for label in finding.unusable}
        checked = []
        for backup in self.backups:
            segment, is_end = self._reaches.get(backup.id, (None, False))
            is_good = backup.id not in unusable
            reaches = segment.name if segment is not None and is_good else ""
            checked.append(CheckedBackup(backup.id, "good" if is_good else "unusable", reaches, is_good and is_end))
        checked += [CheckedBackup(label, "in progress") for label in self._in_progress]
        seconds = time.monotonic() - self._begun_at
        return Verification(tuple(self._findings), tuple(self._notes), tuple(checked), self._segment_count, seconds)

    def report(self, report: Report) -> None:
        """Take over what pgBackRest found in the backups."""
        if not report.status:
            raise ExternalToolError("`pgbackrest verify` gave no report", hint="run `memharbor doctor`")
        known = {backup.id for backup in self.backups}
        if report.status == "failed":
            what = f"pgBackRest cannot use the lists of the repository: {report.remarks[0]}"
            self._add("metadata-lost", what, [], unusable=sorted(known), hint=_OLDER_VERSION)
            return
        by_owner: dict[str, list[BadFile]] = {}
        for bad in report.bad_files:
            if bad.backup in known:
                by_owner.setdefault(str(bad.backup), []).append(bad)
            elif bad.backup is not None:
                self._is_explained = True  # expired meanwhile, or left by a backup that was interrupted
        for owner, files in by_owner.items():
            self._bad_files(owner, files)
        for backup in self.backups:
            state = report.backups.get(backup.id)
            if state is None or state == "manifest missing":
                self._add("backup-missing", f"backup {backup.id} is listed but not in the store", [backup.id])
            elif state != "valid" and not {backup.id, *backup.references} & set(by_owner):
                self._add(
                    "backup-manifest", f"the manifest of backup {backup.id} and its copy are damaged", [backup.id]
                )
            if backup.has_error:
                self._add("page-checksums", f"backup {backup.id} holds damaged pages of the database", [backup.id])
        self._in_progress = [
            label for label, state in report.backups.items() if state == "in-progress" and label not in known
        ]
        self._notes += [
            f"backup {label} is in progress, or was interrupted; it is not looked at" for label in self._in_progress
        ]

    def _bad_files(self, owner: str, files: Sequence[BadFile]) -> None:
        reasons = sorted({_words(bad, len(files)) for bad in files})
        paths = [bad.path.removeprefix(f"{owner}/") for bad in files]
        what = f"{_count(len(files), 'file')} of backup {owner} {_are(len(files))} {' or '.join(reasons)}"
        self._add("backup-file", f"{what}: {names_of(paths)}", [owner])

    def unlisted(self, labels: Sequence[str]) -> None:
        """Accuse the list of backups of leaving some out."""
        if labels:
            what = f"{_count(len(labels), 'backup')} in the store {_are(len(labels))} not listed: {names_of(labels)}"
            self._add("backup-unlisted", what, [], unusable=labels, hint=_OLDER_VERSION)

    def metadata(self, files: Sequence[MetadataFile]) -> None:
        """Compare pgBackRest's own files with their copies."""
        for main, copy in _pairs(files):
            if _is_good(main, copy):
                continue
            hint = _OLDER_VERSION if "archive.info" in main.path else _NEW_FULL
            if main.state == copy.state == "good":
                self._add("metadata-copy", f"{main.path} and its copy differ", [], hint=hint)
            elif "good" in (main.state, copy.state):
                bad, good = (main, copy) if copy.state == "good" else (copy, main)
                self._add("metadata-copy", f"{bad.path} is {bad.state}; {good.path} is good", [], hint=hint)
            elif main.path.endswith(".info"):
                what = f"{main.path} and its copy are {' and '.join(sorted({main.state, copy.state}))}"
                everything = [backup.id for backup in self.backups]
                self._add("metadata-lost", what, [], unusable=everything, hint=_OLDER_VERSION)

    def foreign_cluster(self, system_id: str | None) -> None:
        """Accuse a repository of belonging to another cluster than the one that runs."""
        if system_id is not None:
            what = f"the repository belongs to another cluster than the running one ({system_id})"
            self._add("foreign-cluster", what, [], hint="run `memharbor restore`, or give the stack a new backup store")

    def empty_or_unreadable(
        self,
        info: Sequence[MetadataFile],
        backup_files: Collection[str],
        archive_files: Collection[str],
        words: str = "",
    ) -> None:
        """
        Tell an empty store from a wrong key from damage, where no backup is listed.

        Args:
            info: The lists of backups and of WAL with their copies.
            backup_files: Every file below `backup/<stanza>`.
            archive_files: Every file below `archive/<stanza>`.
            words: What pgBackRest said when it was asked for the backups, where it could not.
        """
        labels = sorted({path.split("/")[0] for path in backup_files if path[:1].isdigit()})
        there = [file for file in info if file.state != "missing"]
        if not backup_files and not archive_files:
            if self.server.has_archived:
                newest = max(self.server.archived, default=None)
                last = f" up to {newest.name}" if newest else ""
                what = f"the repository is empty, although the server archived WAL{last}"
                self._add("empty", what, [], hint=_OLDER_VERSION)
            return
        if there and all(file.state == "unreadable" and file.is_encrypted for file in there):
            what = (
                "nothing in the repository can be decrypted: the stack has another key than the one it was written with"
            )
            self._add(
                "wrong-key",
                what,
                [],
                unusable=labels,
                hint="run `memharbor stack init --escrow FILE`, then `pulumi up`",
            )
            return
        self.backups = []
        # A file that can be decrypted and has its end may still be garbled in between; pgBackRest knows its checksum.
        refused = {main.path for main, _ in _pairs(info) if f"{main.path}' or" in words}
        self.metadata([replace(f, state="unreadable") if f.path.removesuffix(".copy") in refused else f for f in info])
        lost = [finding for finding in self._findings if finding.kind == "metadata-lost"]
        history = [path for path in backup_files if path.startswith("backup.history/")]
        if lost:
            self._findings = [f if f not in lost else _with_unusable(f, labels) for f in self._findings]
        elif words:
            what = f"pgBackRest cannot use the lists of the repository: {_said(words)}"
            self._add("metadata-lost", what, [], unusable=labels, hint=_OLDER_VERSION)
        elif labels or history:
            what = "no backup is listed, although there were some"
            self._add("backup-unlisted", what, [], unusable=labels, hint=_OLDER_VERSION)

    def missing(self, archive: ArchivedWal) -> set[Segment]:
        """Find what is missing on the way from any backup to the end of any timeline."""
        return verify_wal.find_missing(archive, archive.paths, self._present, self.server)

    def own_wal(self, archive: ArchivedWal, bad: Mapping[str, BadFile], only: Backup) -> None:
        """Judge the WAL without which one backup is not consistent."""
        for gap in verify_wal.own_gaps(archive.paths, only):
            self._add("wal-missing", f"{gap.name} missing", [], unusable=[only.id])
        self._damaged_segments(bad, [only])
        self._segment_count = sum(verify_wal.needs(only, segment) for segment in archive.paths)

    def whole_wal(self, archive: ArchivedWal, bad: Mapping[str, BadFile], missing: Collection[Segment]) -> None:
        """Judge the archive from the oldest backup to its end."""
        oldest = verify_wal.oldest_start(self._present)
        for gap in verify_wal.gaps_of(archive, missing):
            self._gap(gap)
        damaged = self._damaged_segments(bad, self._present)
        self._twice(archive, oldest)
        self._histories(archive, oldest)
        self._segment_count = sum(segment.number >= oldest for segment in archive.paths)
        good = set(archive.paths) - damaged
        current = max(verify_wal.timelines_in_use(archive, self._present, self.server), default=1)
        for each in self._present:
            segment, is_end = verify_wal.reach_of(archive, good, each, current)
            is_end = is_end and not any(segment and gone.number > segment.number for gone in missing)
            self._reaches[each.id] = (segment, is_end)
        if not self.server.answered:
            self._notes.append(
                "the server does not answer, so it is not known what `pg_stat_archiver` calls archived;"
                " the archive was compared with the server's files alone"
            )
        if self.server.waiting:
            self._notes.append(f"{_count(len(self.server.waiting), 'WAL segment')} of the server still to be archived")

    @property
    def _present(self) -> list[Backup]:
        return [backup for backup in self.backups if backup.is_of_present_cluster]

    def older_clusters(self, archive: ArchivedWal) -> None:
        """Judge the WAL of backups that were made of an older cluster."""
        for backup in self.backups:
            if not backup.is_of_present_cluster:
                for gap in verify_wal.own_gaps(archive.paths, backup):
                    self._add("wal-missing", f"{gap.name} missing", [], unusable=[backup.id])

    def _gap(self, gap: Gap) -> None:
        if gap.is_explained:
            self._notes.append(
                f"{gap.name} missing on timeline {gap.first.timeline}, which was left there for want of it;"
                " what lies behind cannot be restored"
            )
            return
        needed = [b.id for b in self._present if verify_wal.needs_any(b, gap)]
        after = [b.id for b in self._present if b.start_lsn > verify_wal.end_of(gap) and b.id not in needed]
        before = [b.id for b in self._present if b.id not in (*needed, *after)]
        ways = [f"{names_of(before)} up to the gap"] if before else []
        ways += [f"everything from {after[0]} on"] if after else []
        self._add("wal-missing", f"{gap.name} missing", needed, restorable=", ".join(ways) or "nothing")

    def _damaged_segments(self, bad: Mapping[str, BadFile], backups: Sequence[Backup]) -> set[Segment]:
        oldest = verify_wal.oldest_start(backups)
        damaged: set[Segment] = set()
        for path, file in bad.items():
            segment = parse_segment(path.rsplit("/", 1)[-1])
            if segment is None or segment.number < oldest:
                self._is_explained = True  # older than any backup: nobody needs it
                continue
            damaged.add(segment)
            needed = [backup.id for backup in backups if verify_wal.needs(backup, segment)]
            what = f"WAL segment {segment.name} is {_words(file, 1)}"
            self._add("wal-damaged", what, needed, restorable="up to it, and from the next backup on")
        return damaged

    def _twice(self, archive: ArchivedWal, oldest: int) -> None:
        for segment, paths in archive.paths.items():
            if len(paths) > 1 and segment.number >= oldest:
                needed = [backup.id for backup in self._present if verify_wal.needs(backup, segment)]
                self._add("wal-duplicate", f"WAL segment {segment.name} is there {len(paths)} times", needed)
        for original, other in verify_wal.misplaced(archive):
            if other.number >= oldest:
                what = f"WAL segments {original.name} and {other.name} hold the same content, so one is lost"
                needed = [b.id for b in self._present if verify_wal.needs(b, original) or verify_wal.needs(b, other)]
                self._add("wal-misplaced", what, needed)

    def _histories(self, archive: ArchivedWal, oldest: int) -> None:
        in_use = {segment.timeline for segment in archive.paths if segment.number >= oldest}
        in_use |= {*self.server.histories, *archive.history_paths, *(backup.timeline for backup in self._present)}
        for timeline in sorted(in_use - {1}):
            text = archive.histories.get(timeline)
            mine = self.server.history_sums.get(timeline)
            if timeline not in archive.history_paths:
                problem = "is missing"
            elif text is None or (said := history_problem(timeline, text)) is not None:
                problem = "is damaged" if text is None else f"is damaged: {said}"
            elif mine and mine != hashlib.sha256(text.encode()).hexdigest():
                problem = "is another one than the server's"
            else:
                continue
            on_it = [backup.id for backup in self._present if backup.timeline == timeline]
            what = f"the history file of timeline {timeline} {problem}, so recovery would stay on an older timeline"
            self._add("history", what, on_it, hint=_OLDER_VERSION)

    def nothing_but_a_status(self, report: Report) -> None:
        """Never call a repository good that pgBackRest calls bad for a reason that was not understood."""
        if report.status != "ok" and not self._findings and not self._is_explained:
            words = names_of(report.remarks) or "it names none"
            self._add("report", f"`pgbackrest verify` reports an error: {words}", [], hint="run `memharbor drill`")

    def _add(
        self,
        kind: str,
        what: str,
        roots: Collection[str],
        *,
        unusable: Collection[str] = (),
        restorable: str | None = None,
        hint: str = _NEW_FULL,
    ) -> None:
        # A diff or an incr cannot be restored without what it refers to.
        depends = [each.id for each in self.backups if {each.id, *each.references} & set(roots)]
        broken = tuple(dict.fromkeys([*depends, *unusable, *(root for root in roots if root not in depends)]))
        if restorable is None:
            others = [backup.id for backup in self.backups if backup.id not in broken]
            restorable = names_of(others) if others else "nothing"
            restorable = "everything" if others and len(others) == len(self.backups) else restorable
        self._findings.append(Finding(kind, what, broken, restorable, hint))


def _with_unusable(finding: Finding, labels: Sequence[str]) -> Finding:
    return Finding(finding.kind, finding.what, tuple(labels), "nothing", finding.hint)


def _said(words: str) -> str:
    # After our own first line, pgBackRest's; one is enough, and noise of a garbled file must not reach a terminal.
    line = (words.splitlines()[1:] or [words])[0]
    return "".join(character for character in line if character.isprintable())[:200]


def _words(bad: BadFile, count: int) -> str:
    return _WORDS[bad.reason].replace("their", "its") if count == 1 else _WORDS[bad.reason]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
