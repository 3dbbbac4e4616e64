"""
Records beside the backups, in the backup store: fingerprints of backups, erasures, drills.

They outlive a restore, which a table would not, and the store keeps every version of each. One record is one small JSON
object; the leader's container writes and reads them with pgBackRest's key (`docker/postgres/record`). Must not hold a
secret or a memory's text: a record is not encrypted.
"""

from __future__ import annotations

import json
import re
from typing import Any

from memharbor.backup.engine import BackupEngine
from memharbor.containers import Finished
from memharbor.errors import ExternalToolError, SourceDataError, UsageError

_PROGRAM = "/usr/local/lib/memharbor/record"
_PATH = re.compile(r"[a-z]+(/[A-Za-z0-9_.-]+)*")
_NOT_FOUND = 3
# One argument of a process may have 128 KiB. Source: execve(2), MAX_ARG_STRLEN.
_BYTES_MAX = 100_000


class Records:
    """
    Keep records of one stack.

    Args:
        engine: The stack's backups; records are read and written beside them, also while the server is stopped.
    """

    def __init__(self, engine: BackupEngine) -> None:
        self._engine = engine

    def put(self, path: str, record: dict[str, Any]) -> None:
        """
        Write a record; an older one of that path becomes an older version.

        Args:
            path: Below the stack's records, for instance `erasures/2026.json`.
            record: Plain data, at most 100,000 bytes as JSON.

        Raises:
            ExternalToolError: The store did not take it.
        """
        text = json.dumps(record, separators=(",", ":"), sort_keys=True, default=str)
        if len(text.encode()) > _BYTES_MAX:
            raise UsageError(f"record `{path}` is larger than {_BYTES_MAX:,} bytes")
        self._check(self._run('printf %s "$2" | "$0" put "$1"', path, text), "write", path)

    def get(self, path: str) -> dict[str, Any] | None:
        """
        Read a record; `None` where there is none.

        Raises:
            ExternalToolError: The store cannot be read.
            SourceDataError: The record is no JSON object.
        """
        done = self._run('"$0" get "$1"', path)
        if done.exit_code == _NOT_FOUND:
            return None
        return _parse(path, self._check(done, "read", path).stdout)

    def list(self, folder: str) -> list[str]:
        """
        List the paths of the records below a folder, sorted.

        Raises:
            ExternalToolError: The store cannot be read.
        """
        return sorted(self._check(self._run('"$0" list "$1"', folder), "list", folder).stdout.split())

    def get_all(self, folder: str) -> dict[str, dict[str, Any]]:
        """
        Read every record below a folder, by path.

        Raises:
            ExternalToolError: The store cannot be read.
            SourceDataError: A record is no JSON object.
        """
        # The line end after the list: a last line without one would not be read, and its record would be left out.
        listed = '{ "$0" list "$1" && echo; } | while read -r path; do [ -n "$path" ] || continue'
        script = f'{listed}; printf "%s\\t" "$path"; "$0" get "$path" || exit; echo; done'
        said = self._check(self._run(f"set -o pipefail 2>/dev/null; {script}", folder), "read", folder).stdout
        rows = (line.partition("\t") for line in said.splitlines() if line)
        return {path: _parse(path, text) for path, _, text in rows}

    def delete(self, path: str) -> None:
        """
        Delete a record; its versions stay in the store until they are purged.

        Raises:
            ExternalToolError: The store refused.
        """
        self._check(self._run('"$0" delete "$1"', path), "delete", path)

    def _run(self, script: str, path: str, *arguments: str) -> Finished:
        if not _PATH.fullmatch(path) or ".." in path:
            raise UsageError(f"`{path}` cannot be the path of a record")
        return self._engine.run_beside(["sh", "-c", script, _PROGRAM, path, *arguments])

    def _check(self, done: Finished, doing: str, path: str) -> Finished:
        if done.exit_code != 0:
            raise ExternalToolError(
                f"cannot {doing} record `{path}` in the backup store: {done.last_words}", hint="run `memharbor doctor`"
            )
        return done


def _parse(path: str, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as exc:
        raise SourceDataError(f"record `{path}` in the backup store is no JSON: {exc}") from exc
    if not isinstance(record, dict):
        raise SourceDataError(f"record `{path}` in the backup store is no JSON object")
    return record
