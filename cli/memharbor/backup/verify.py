"""
Verify what lies in the backup repository: `pgbackrest verify`, and what it does not see.

Reads only. Every file of every backup and every WAL segment is read, decrypted and compared with its checksum by
pgBackRest; here its report is read (its exit code says nothing), and gaps in the WAL, dependents of a broken backup,
backups that are not listed or not there, copies that differ and a wrong key are added. A store that does not answer is
an error and no damage. Only a drill proves the rest. Source: docs/concepts/backup.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from memharbor.backup.engine import Backup, BackupEngine
from memharbor.backup.verify_findings import Judge, MetadataFile, parse_metadata, troubled
from memharbor.backup.verify_report import Report, Verification, failed_report, parse_report
from memharbor.backup.verify_wal import ArchivedWal, ServerWal, parse_archive, parse_server
from memharbor.backup.wal import parse_history_name
from memharbor.errors import ExternalToolError, StateRefusedError

# What the server knows of its WAL; also where it does not run. One word and one name a line.
_SERVER = """
psql --no-psqlrc -tA --dbname=postgres --command "select 'stat ' || coalesce(last_archived_wal, '-') from pg_stat_archiver"
cd "$PGDATA/pg_wal" 2>/dev/null || exit 0
ls archive_status | sed 's/^/status /'
for file in *.history; do
  [ ! -e "$file" ] || sha256sum "$file" | sed 's/^/sum /'
done
"""

# Each file of pgBackRest's own: `PATH missing`, or `PATH plain|encrypted SHA-256-or-unreadable`. An info file that was
# decrypted with another key may come out as noise without an error, so the words that each one has are looked for.
_METADATA = """
stanza=$1; shift
scratch=$(mktemp)
trap 'rm -f "$scratch"' EXIT
get() {
  pgbackrest --stanza="$stanza" --log-level-console=off repo-get --ignore-missing "$@" >"$scratch"
}
for path; do
  code=0
  get --raw "$path" || code=$?
  case $code in
  0) ;;
  1) echo "$path missing"; continue ;;
  *) echo "$path failed"; continue ;;
  esac
  kind=plain
  [ "$(head -c 8 "$scratch" | tr -d '\\0')" != Salted__ ] || kind=encrypted
  sum=unreadable
  if get "$path" && grep -aq '^backrest-checksum=' "$scratch"; then
    sum=$(sha256sum <"$scratch" | cut -c1-64)
  fi
  echo "$path $kind $sum"
done
"""
# A history may end with empty lines, and they count: the dot says where it ends.
_HISTORIES = """
stanza=$1; shift
for path; do
  echo "history $path"
  pgbackrest --stanza="$stanza" --log-level-console=off repo-get "$path" || true
  echo .
done
"""
_PATHS_PER_CALL = 200


@dataclass(frozen=True)
class _Listing:
    """The repository's files: of `backup/<stanza>`, and of `archive/<stanza>` by cluster."""

    backup: frozenset[str]
    archive: frozenset[str]

    @property
    def present_cluster(self) -> str:
        clusters = {path.split("/")[0] for path in self.archive if path[:1].isdigit()}
        return max(clusters, key=lambda name: [int(part) for part in name.split("-")], default="")

    def archived(self, *, of_present: bool) -> ArchivedWal:
        cluster = f"{self.present_cluster}/"
        return parse_archive(path for path in self.archive if path.startswith(cluster) == of_present)


class BackupVerifier:
    """
    Verify a stack's backups.

    Args:
        engine: The stack's backups.
    """

    def __init__(self, engine: BackupEngine) -> None:
        self._engine = engine

    def verify(self, backup_id: str | None = None) -> Verification:
        """
        Verify the whole repository, or one backup with all that it needs.

        Args:
            backup_id: A backup's label: that backup, those it depends on, and the WAL without which it is not
                consistent. All of them, and the WAL up to the end of the archive, by default.

        Raises:
            StateRefusedError: There is nothing to verify.
            ExternalToolError: The store does not answer, or not for long enough.
        """
        begun_at = time.monotonic()
        # In this order: what the server calls archived must be listed afterwards, and so must what a backup needs.
        server = self._server()
        before, unreadable = self._backups()
        listing = self._list()
        judge = Judge(begun_at, server)
        if unreadable is not None or not before:
            return self._without_backups(judge, listing, unreadable)

        members = before if backup_id is None else _members(self._engine.get_backup(backup_id), before)
        report = self._report(backup_id)
        kept = {backup.id for backup in self._engine.list_backups()}
        judge.backups = [backup for backup in members if backup.id in kept]
        if not judge.backups:
            raise StateRefusedError("the backups expired while they were verified", hint="run `memharbor backup list`")
        judge.report(report)
        if backup_id is None:
            judge.unlisted(self._unlisted(listing, {backup.id for backup in before} | kept))
        if report.remarks:
            judge.metadata(self._metadata([*_info_files(self._engine.stanza), *self._manifests(judge.backups)]))
        judge.foreign_cluster(self._engine.foreign_system_id())
        self._judge_wal(judge, listing, report, None if backup_id is None else members[-1])
        judge.nothing_but_a_status(report)
        return judge.verification()

    def _without_backups(self, judge: Judge, listing: _Listing, unreadable: ExternalToolError | None) -> Verification:
        info = self._metadata(_info_files(self._engine.stanza))
        judge.empty_or_unreadable(
            info, listing.backup, listing.archive, "" if unreadable is None else unreadable.message
        )
        if judge.has_findings:
            return judge.verification()
        if unreadable is not None:
            # The files can be read one by one, so it was the store or a moment.
            raise unreadable
        raise StateRefusedError("there is no backup to verify", hint="run `memharbor backup create --type full`")

    def _judge_wal(self, judge: Judge, listing: _Listing, report: Report, only: Backup | None) -> None:
        archive = self._with_histories(listing.archived(of_present=True))
        bad = {bad.path: bad for bad in report.bad_files if bad.backup is None}
        judge.older_clusters(listing.archived(of_present=False))
        if only is not None:
            judge.own_wal(archive, bad, only)
            return
        missing = judge.missing(archive)
        if missing:
            # Segments are archived side by side, so the one before the last may have been on its way: a second look.
            judge.server = self._server()
            again = self._list().archived(of_present=True)
            archive = replace(again, histories=archive.histories)
            missing &= judge.missing(archive)
        judge.whole_wal(archive, bad, missing)

    def _server(self) -> ServerWal:
        return parse_server(self._engine.run_beside(["sh", "-c", _SERVER]).stdout)

    def _backups(self) -> tuple[list[Backup], ExternalToolError | None]:
        try:
            return self._engine.list_backups(), None
        except ExternalToolError as exc:
            return [], exc

    def _list(self) -> _Listing:
        return _Listing(self._list_folder("backup"), self._list_folder("archive"))

    def _list_folder(self, folder: str) -> frozenset[str]:
        said = self._pgbackrest("repo-ls", "--output=json", "--recurse", f"{folder}/{self._engine.stanza}")
        try:
            listed = json.loads(said or "{}")
        except ValueError as exc:
            raise ExternalToolError(f"`pgbackrest repo-ls` answered with an unknown shape: {exc}") from exc
        return frozenset(path for path, entry in listed.items() if entry["type"] == "file")

    def _report(self, backup_id: str | None) -> Report:
        # Without retries of its own: each damaged file costs 15 seconds otherwise, each file of a short bundle too.
        report = self._run_verify(backup_id, "--job-retry=0")
        if report.not_answered:
            self._list()  # raises where the store does not answer at all
            report = self._run_verify(backup_id)
        return report

    def _run_verify(self, backup_id: str | None, *options: str) -> Report:
        chosen = () if backup_id is None else (f"--set={backup_id}",)
        log = ("--log-level-console=detail", "--log-timestamp=n")
        arguments = (*log, *options, "verify", "--output=text", "--verbose", *chosen)
        done = self._engine.run_beside(["pgbackrest", f"--stanza={self._engine.stanza}", *arguments])
        if done.exit_code != 0:
            # It never fails for what is damaged, but it does where its lists contradict each other.
            self._list()  # raises where it was the store that did not answer
            return failed_report(done.stdout)
        return parse_report(done.stdout)

    def _unlisted(self, listing: _Listing, known: set[str]) -> list[str]:
        """Name the backups that lie in the store complete, and that pgBackRest does not know."""
        found = _complete(listing) - known
        if found:
            # One that is being expired or has just ended is in between for a moment.
            time.sleep(2)
            found &= _complete(self._list()) - {backup.id for backup in self._backups()[0]}
        return sorted(found)

    def _manifests(self, backups: Iterable[Backup]) -> list[str]:
        folder = f"backup/{self._engine.stanza}"
        return [f"{folder}/{each.id}/backup.manifest{copy}" for each in backups for copy in ("", ".copy")]

    def _metadata(self, paths: Sequence[str]) -> list[MetadataFile]:
        files = self._look_at(paths)
        again = troubled(files)
        if again:
            # A file and its copy are written one after the other.
            time.sleep(1)
            seen = {file.path: file for file in self._look_at(again)}
            files = [seen.get(file.path, file) for file in files]
        return files

    def _look_at(self, paths: Sequence[str]) -> list[MetadataFile]:
        said = ""
        for begin in range(0, len(paths), _PATHS_PER_CALL):
            said += self._script(_METADATA, paths[begin : begin + _PATHS_PER_CALL])
        return parse_metadata(said)

    def _with_histories(self, archive: ArchivedWal) -> ArchivedWal:
        paths = [f"archive/{self._engine.stanza}/{path}" for path in archive.history_paths.values()]
        if not paths:
            return archive
        parts = f"\n{self._script(_HISTORIES, paths)}".split("\nhistory ")[1:]
        texts: dict[int, str] = {}
        for part in parts:
            path, _, text = part.partition("\n")
            timeline = parse_history_name(path.rsplit("/", 1)[-1])
            if timeline is not None:
                texts[timeline] = text.rstrip("\n").removesuffix(".")
        return replace(archive, histories=texts)

    def _script(self, script: str, arguments: Sequence[str]) -> str:
        return self._engine.run_beside(["sh", "-c", script, "verify", self._engine.stanza, *arguments]).stdout

    def _pgbackrest(self, *arguments: str) -> str:
        return self._engine.run_in_container(["pgbackrest", f"--stanza={self._engine.stanza}", *arguments])


def _info_files(stanza: str) -> list[str]:
    return [f"{kind}/{stanza}/{kind}.info{copy}" for kind in ("backup", "archive") for copy in ("", ".copy")]


def _members(backup: Backup, backups: Sequence[Backup]) -> list[Backup]:
    """List a backup and those it depends on, the backup itself last."""
    return [*(each for each in backups if each.id in backup.references), backup]


def _complete(listing: _Listing) -> set[str]:
    return {path.split("/")[0] for path in listing.backup if path.count("/") == 1 and path.endswith("/backup.manifest")}
