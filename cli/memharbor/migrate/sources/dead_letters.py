"""
The dead letters of a run, mended by a person, as a source: what was refused is tried again under the same ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memharbor.errors import SourceDataError
from memharbor.migrate.record import (
    RawItem,
    Refusal,
    SourceInfo,
    item_from_data,
    record_from_data,
)


class DeadLetterSource:
    """
    A file of dead letters.

    Args:
        path: `dead-letters.jsonl` of a run, or a copy in which `item` or `record` of its lines was mended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def describe(self) -> SourceInfo:
        """Say how many there are; a file that is edited is another source."""
        digest, count = hashlib.sha256(), 0
        try:
            with self._path.open("rb") as file:
                for line in file:
                    digest.update(line)
                    count += bool(line.strip())
        except OSError as exc:
            raise SourceDataError(f"the dead letters cannot be read: {exc}", hint="memharbor migrate status") from exc
        return SourceInfo("dead-letters", digest.hexdigest(), {"memory": count}, size_bytes=self._path.stat().st_size)

    def read(self, after: str | None = None) -> Iterator[RawItem | Refusal]:
        """Read every line; its position is its number."""
        with self._path.open(encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                if number > int(after or 0) and line.strip():
                    yield _read_line(line, str(number))


def _read_line(line: str, position: str) -> RawItem | Refusal:
    try:
        data: dict[str, Any] = json.loads(line)
        if "item" in data:
            item = item_from_data({**data["item"], "position": position})
        else:
            record = record_from_data(data["record"])
            moments = {name: moment.isoformat() for name, moment in record.lifecycle.items()}
            # Its id is a UUID by now, and stays.
            item = RawItem(record.kind, str(record.id), record.data, position, record.embedding, record.state, moments)
    except (ValueError, KeyError, TypeError) as exc:
        return Refusal("bad-json", f"line {position} is no dead letter: {exc}", RawItem("memory", "", {}, position))
    return item
