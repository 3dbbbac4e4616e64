"""
pgBackRest behind one class, always run inside the leader's PostgreSQL container (one lock domain).

Two containers with separate lock paths destroy each other's backups, both with exit code 0; therefore nothing else in
Memharbor calls pgBackRest. Exit codes of `info` say nothing: its JSON is read. Source: docs/concepts/backup.md.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from memharbor.backup.retention import Expired, parse_expire
from memharbor.backup.wal import Segment, leads_to, parse_history, parse_lsn, parse_segment
from memharbor.containers import Containers, Finished
from memharbor.errors import ExternalToolError, SourceDataError, StateRefusedError
from memharbor.server_files.postgres import BACKUP_PROGRAM, PRUNE_PROGRAM

BackupType = Literal["full", "diff", "incr"]
OnPercent = Callable[[float], None]

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%\)")
# What an engine answers for a command whose container ends before or under it.
_CONTAINER_ENDED = (126, 137)
_LOCK_TIMEOUT_SECONDS = 60
_LOCK_HELD = 50  # pgBackRest error code: unable to acquire lock
_NOT_LEADING = 69  # of docker/postgres/backup

# `status.code` of `pgbackrest info --output=json`. Source: pgBackRest 2.60, command/info.
_OK, _MISSING_STANZA_PATH, _NO_BACKUP, _MISSING_STANZA_DATA = 0, 1, 2, 3


@dataclass(frozen=True)
class Backup:
    """One backup as the repository lists it. Sizes in bytes, instants aware UTC, LSNs as byte positions."""

    id: str
    type: BackupType
    begun_at: datetime
    ended_at: datetime
    database_bytes: int
    stored_bytes: int
    timeline: int
    start_lsn: int
    stop_lsn: int
    start_segment: str
    stop_segment: str
    references: tuple[str, ...]
    has_error: bool
    annotations: dict[str, str]
    # PostgreSQL's major version, as it was; empty where the repository does not say.
    postgres_version: str = ""
    # Whether it is of the cluster that the stanza is for now; an older one's WAL leads nowhere.
    is_of_present_cluster: bool = True


class BackupEngine:
    """
    Create, list and find what can be restored, for one stack.

    While the leader's container is stopped the same commands run in a job that has its volumes, so that a database
    that does not start can still be restored.

    Args:
        containers: The Docker engine that runs the stack.
        container: The leader's container.
        stanza: Name of pgBackRest's stanza; one per cluster.
    """

    def __init__(self, containers: Containers, container: str, stanza: str) -> None:
        self._containers = containers
        self.container = container
        self.stanza = stanza

    def list_backups(self) -> list[Backup]:
        """
        List the repository's backups, oldest first.

        Raises:
            ExternalToolError: The repository cannot be read (store down, wrong key); its words are in the message.
        """
        info = self._info()
        code, message = info["status"]["code"], info["status"]["message"]
        if code not in (_OK, _MISSING_STANZA_PATH, _NO_BACKUP, _MISSING_STANZA_DATA):
            raise ExternalToolError(
                f"the backup repository cannot be read: {message}{_repository_errors(info)}",
                hint="run `memharbor doctor`",
            )
        databases = info.get("db", [])
        return sorted((_backup(raw, databases) for raw in info.get("backup", [])), key=lambda backup: backup.ended_at)

    def get_backup(self, backup_id: str) -> Backup:
        """
        Get one backup by its label.

        Raises:
            StateRefusedError: The repository has none of that label.
        """
        for backup in self.list_backups():
            if backup.id == backup_id:
                return backup
        raise StateRefusedError(f"there is no backup `{backup_id}`", hint="run `memharbor backup list`")

    def create_backup(
        self, backup_type: BackupType, *, history_rows: int | None = None, on_percent: OnPercent | None = None
    ) -> Backup:
        """
        Make a backup and return it as the repository lists it.

        A `diff` or `incr` without a full backup before it becomes a full one; the result says so. Users' fingerprints are
        recorded with it, and what the retention no longer promises is expired (docker/postgres/backup).

        Args:
            backup_type: What is copied.
            history_rows: Rows of the Mem0 history that was handed in (`memharbor.backup.carried_history`); taken along.
            on_percent: Called with the share that is done.

        Raises:
            StateRefusedError: Another backup is running, or the server is down.
            ExternalToolError: pgBackRest failed; what was there before is untouched.
        """
        before = {backup.id for backup in self.list_backups()}
        self.ensure_stanza()
        try:
            history = [] if history_rows is None else [str(history_rows)]
            command = [BACKUP_PROGRAM, backup_type, "--watched", *history]
            done = self._run(command, on_line=percent_reader(on_percent))
        except KeyboardInterrupt:
            # Nobody waits for it any more, and the next one must not find it running.
            self._run([BACKUP_PROGRAM, "stop"])
            raise
        if done.exit_code == _LOCK_HELD:
            raise StateRefusedError(
                "another backup of this stack is running", hint="wait, then run `memharbor backup list`"
            )
        if done.exit_code == _NOT_LEADING:
            raise StateRefusedError("the database is down or does not lead", hint="run `memharbor doctor`")
        self._check(done, "pgbackrest backup")
        created = [backup for backup in self.list_backups() if backup.id not in before]
        if not created or created[-1].has_error:
            raise ExternalToolError("pgBackRest reported success, but the repository lists no new good backup")
        return created[-1]

    def prune(self, *, dry_run: bool = False) -> Expired:
        """
        Expire the backups and WAL that the stack's retention no longer promises, with the very program of the schedule.

        Waits for a backup that is running, for up to a minute.

        Args:
            dry_run: Only say what would go.

        Raises:
            StateRefusedError: A backup goes on for longer.
            ExternalToolError: pgBackRest failed.
        """
        segments = [segment.name for segment in self.list_segments()]
        done = _while_locked(lambda: self._run([PRUNE_PROGRAM, *(["--dry-run"] if dry_run else [])]))
        if done.exit_code == _LOCK_HELD:
            raise StateRefusedError("a backup of this stack is running", hint="wait, then run `memharbor backup prune`")
        return parse_expire(self._check(done, "pgbackrest expire").stdout, segments)

    def annotate(self, backup_id: str, key: str, value: str) -> None:
        """
        Note something on a backup; an older note of that name is replaced.

        Waits for a backup that is running, which holds the same lock, for up to a minute.

        Raises:
            ExternalToolError: pgBackRest failed.
        """
        self._wait_for_lock(f"--set={backup_id}", f"--annotation={key}={value}", "annotate")

    def _wait_for_lock(self, *arguments: str) -> None:
        """Run a command that needs a lock which archiving or a backup may hold, and wait for it for up to a minute."""
        self._check(_while_locked(lambda: self._pgbackrest(*arguments)), f"pgbackrest {arguments[-1]}")

    def ensure_stanza(self) -> None:
        """
        Create the stanza where it is missing.

        Not where it is there: `stanza-create` takes the lock that archiving holds, and would fail now and then.
        """
        if self._info()["status"]["code"] in (_MISSING_STANZA_PATH, _MISSING_STANZA_DATA):
            self._check(self._pgbackrest("stanza-create"), "pgbackrest stanza-create")

    def adopt_cluster(self) -> None:
        """
        Make the repository belong to the cluster that runs now; the backups of the one before lead nowhere any more.

        Raises:
            ExternalToolError: pgBackRest failed.
        """
        self.ensure_stanza()
        if self.foreign_system_id() is not None:
            self._wait_for_lock("stanza-upgrade")

    def foreign_system_id(self) -> str | None:
        """
        Name the system identifier of the running server where the repository belongs to another cluster, else `None`.

        It is another one after a data volume was lost and initdb made a new cluster: that one cannot be archived.
        """
        known = [str(database["system-id"]) for database in self._info().get("db", [])]
        if not known or not self._containers.is_running(self.container):
            return None
        query = "select system_identifier from pg_control_system()"
        done = self._run(["psql", "--no-psqlrc", "-tA", "--dbname=postgres", "--command", query])
        present = done.stdout.strip()
        return present if done.exit_code == 0 and present and present != known[-1] else None

    def check_archive(self) -> None:
        """
        Let PostgreSQL write a segment out and wait until the repository has it.

        Raises:
            ExternalToolError: It does not arrive; pgBackRest's words say why.
        """
        self.ensure_stanza()
        self._check(self._pgbackrest("check"), "pgbackrest check")

    def segment_paths(self) -> dict[Segment, str]:
        """Map the archived WAL segments of the present cluster to their paths below the stanza's archive."""
        named = ((parse_segment(path.rsplit("/", 1)[-1]), path) for path in self._archive_entries())
        return {segment: path for segment, path in named if segment is not None}

    def list_segments(self) -> list[Segment]:
        """List the archived WAL segments of the present cluster, in order."""
        return sorted(self.segment_paths())

    def list_live_segments(self) -> list[Segment]:
        """List the segments in the server's own pg_wal, those that are not archived yet among them."""
        # There is none in the middle of a restore.
        done = self._run(["sh", "-c", 'test ! -d "$PGDATA/pg_wal" || ls "$PGDATA/pg_wal"'])
        return sorted(filter(None, map(parse_segment, self._check(done, "ls pg_wal").stdout.split())))

    def history(self, timeline: int) -> dict[int, int]:
        """Read a timeline's ancestors from the archive, as `wal.parse_history`; timeline 1 has none."""
        if timeline == 1:
            return {}
        name = f"{timeline:08X}.history"
        path = next((path for path in self._archive_entries() if path.rsplit("/", 1)[-1] == name), None)
        if path is None:
            raise SourceDataError(f"timeline {timeline} has no history file in the archive")
        done = self._pgbackrest("repo-get", f"archive/{self.stanza}/{path}")
        return parse_history(self._check(done, "pgbackrest repo-get").stdout)

    def timeline_births(self) -> dict[int, datetime]:
        """List when each timeline began, aware UTC: when its history file reached the archive. Timeline 1 has none."""
        return {
            int(path.rsplit("/", 1)[-1][:8], 16): datetime.fromtimestamp(entry.get("time", 0), UTC)
            for path, entry in self._archive_entries().items()
            if path.endswith(".history")
        }

    def run_in_container(self, command: Sequence[str]) -> str:
        """
        Run a reading command beside pgBackRest, also while the server is stopped, and return what it prints.

        Raises:
            ExternalToolError: It failed.
        """
        return self._check(self.run_beside(command), command[0]).stdout

    def run_beside(self, command: Sequence[str]) -> Finished:
        """Run a command beside pgBackRest, also while the server is stopped, whatever its exit code."""
        return self._run(list(command))

    def find_backup_before(
        self,
        *,
        timeline: int,
        lsn: int | None = None,
        at: datetime | None = None,
        among: Sequence[Backup] | None = None,
    ) -> Backup | None:
        """
        Find the newest backup from which a target can be reached.

        Args:
            timeline: The timeline to recover to.
            lsn: The target's position; `None` is the end of the timeline.
            at: The target's instant, aware; `None` is no limit.
            among: The backups to choose from, oldest first; all of them by default.
        """
        history = self.history(timeline)
        for backup in reversed(self.list_backups() if among is None else among):
            if (
                not backup.has_error
                and leads_to(backup.timeline, backup.stop_lsn, target_timeline=timeline, history=history)
                and (lsn is None or backup.stop_lsn <= lsn)
                and (at is None or backup.ended_at < at)
            ):
                return backup
        return None

    def restore_command(self, backup: Backup, target: Sequence[str]) -> list[str]:
        """Spell the restore of a backup into the leader's data directory, for a job that owns its volume."""
        return [
            "pgbackrest",
            f"--stanza={self.stanza}",
            "--log-level-console=detail",
            "--delta",
            f"--set={backup.id}",
            *target,
            "restore",
        ]

    def _info(self) -> dict[str, Any]:
        done = self._check(self._pgbackrest("info", "--output=json"), "pgbackrest info")
        try:
            # Not strict: a file that another key decrypts to is quoted as the bytes that came out.
            stanzas = [stanza for stanza in json.loads(done.stdout, strict=False) if stanza["name"] == self.stanza]
        except (ValueError, KeyError) as exc:
            raise ExternalToolError(f"`pgbackrest info` answered with an unknown shape: {exc}") from exc
        if not stanzas:
            return {"status": {"code": _MISSING_STANZA_PATH, "message": "missing stanza path"}}
        found: dict[str, Any] = stanzas[0]
        return found

    def _archive_entries(self) -> dict[str, dict[str, Any]]:
        """List the files of the present cluster's archive by their path below the stanza."""
        done = self._pgbackrest("repo-ls", "--output=json", "--recurse", f"archive/{self.stanza}")
        listed: dict[str, dict[str, Any]] = json.loads(self._check(done, "pgbackrest repo-ls").stdout or "{}")
        clusters = {path.split("/")[0] for path in listed if path[:1].isdigit()}
        present = max(clusters, key=lambda name: [int(part) for part in name.split("-")], default="")
        return {
            path: entry for path, entry in listed.items() if entry["type"] == "file" and path.startswith(f"{present}/")
        }

    def _pgbackrest(self, *arguments: str, on_line: Callable[[str], None] | None = None) -> Finished:
        return self._run(["pgbackrest", f"--stanza={self.stanza}", *arguments], on_line=on_line)

    def _run(self, command: list[str], *, on_line: Callable[[str], None] | None = None) -> Finished:
        if self._containers.is_running(self.container):
            try:
                done = self._containers.execute(self.container, command, on_line=on_line)
            except (ExternalToolError, StateRefusedError):
                done = None  # it ended in between: a server that does not start is restarted again and again
            if done is not None and done.exit_code not in _CONTAINER_ENDED:
                return done
        return self._containers.run_job(self.container, command, on_line=on_line)

    def _check(self, done: Finished, what: str) -> Finished:
        if done.exit_code != 0:
            raise ExternalToolError(
                f"`{what}` failed with exit code {done.exit_code}:\n{done.last_words}",
                hint="run `memharbor doctor`",
            )
        return done


def percent_reader(on_percent: OnPercent | None) -> Callable[[str], None] | None:
    """Make a reader of pgBackRest's detail lines that passes on the share of 100 which each file completes."""
    if on_percent is None:
        return None

    def read(line: str) -> None:
        found = _PERCENT.search(line)
        if found:
            on_percent(float(found[1]))

    return read


def _repository_errors(info: dict[str, Any]) -> str:
    messages = [repo["status"]["message"] for repo in info.get("repo", []) if repo["status"]["code"] != _OK]
    said = "".join(f"\n{_printable(message)}" for message in dict.fromkeys(messages))
    if any(kind in said for kind in ("FormatError", "CryptoError")):
        said += "\nits passphrase is not the one that it was written with, or its info files are damaged"
    return said


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)[:1000]


def _backup(raw: dict[str, Any], databases: Sequence[dict[str, Any]]) -> Backup:
    segment = parse_segment(raw["archive"]["start"])
    if segment is None:
        raise SourceDataError(f"backup `{raw['label']}` names no WAL segment")
    cluster = raw.get("database", {}).get("id")
    versions = {database["id"]: str(database["version"]) for database in databases}
    size = raw["info"]
    repository = size["repository"]
    return Backup(
        id=raw["label"],
        type=raw["type"],
        begun_at=datetime.fromtimestamp(raw["timestamp"]["start"], UTC),
        ended_at=datetime.fromtimestamp(raw["timestamp"]["stop"], UTC),
        database_bytes=size["size"],
        # With block incremental the repository size of one backup is unknown; its own delta is what it added.
        stored_bytes=repository.get("delta", repository.get("size", 0)),
        timeline=segment.timeline,
        start_lsn=parse_lsn(raw["lsn"]["start"]),
        stop_lsn=parse_lsn(raw["lsn"]["stop"]),
        start_segment=raw["archive"]["start"],
        stop_segment=raw["archive"]["stop"],
        references=tuple(raw.get("reference") or ()),
        has_error=bool(raw.get("error")),
        annotations=raw.get("annotation") or {},
        postgres_version=versions.get(cluster, ""),
        is_of_present_cluster=not versions or cluster == max(versions),
    )


def _while_locked(run: Callable[[], Finished]) -> Finished:
    deadline = time.monotonic() + _LOCK_TIMEOUT_SECONDS
    while (done := run()).exit_code == _LOCK_HELD and time.monotonic() < deadline:
        time.sleep(1)
    return done
