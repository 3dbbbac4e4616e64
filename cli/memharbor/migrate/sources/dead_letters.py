"""
Dead letters, mended by a person, as a source: what a run or `migrate read` refused is tried again under the same ids.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memharbor.errors import SourceDataError
from memharbor.migrate.record import RawItem, Refusal, SourceInfo
from memharbor.migrate.sources.json_values import Problem, raw_item
from memharbor.migrate.sources.own_lines import item_of


class DeadLetterSource:
    """
    A file of dead letters.

    Args:
        path: `dead-letters.jsonl` of a run, `….refused.jsonl` of `migrate read`, or a copy in which `item` or `record` of
            its lines was mended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def describe(self) -> SourceInfo:
        """Say how many there are, and where `migrate read` found them; a file that is edited is another source."""
        digest, count, names = hashlib.sha256(), 0, set[str]()
        try:
            with self._path.open("rb") as file:
                for line in file:
                    digest.update(line)
                    if line.strip():
                        count += 1
                        names.update(_source_names(line))
        except OSError as exc:
            raise SourceDataError(f"the dead letters cannot be read: {exc}", hint="memharbor migrate status") from exc
        if len(names) > 1:
            listed = " and ".join(sorted(f"`{name}`" for name in names)[:8])
            raise SourceDataError(
                f"`{self._path}` has dead letters of {listed}, whose ids are made otherwise",
                hint="give those of each source by itself",
            )
        name = names.pop() if names else _NAME
        return SourceInfo(name, digest.hexdigest(), {"memory": count}, size_bytes=self._path.stat().st_size)

    def read(self, after: str | None = None) -> Iterator[RawItem | Refusal]:
        """Read every line; its position is its number."""
        with self._path.open(encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                if number > int(after or 0) and line.strip():
                    yield _read_line(line, str(number))


# Of those of a run, whose source its settings know.
_NAME = "dead-letters"


def _source_names(line: bytes) -> set[str]:
    """Find which source a dead letter is of; none where it is no dead letter."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return set()
    if not isinstance(found, dict) or not {"item", "record"} & found.keys():
        return set()
    return {found["source"] if isinstance(found.get("source"), str) else _NAME}


def _read_line(line: str, position: str) -> RawItem | Refusal:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as exc:
        item: RawItem | Problem = Problem("bad-json", str(exc))
    else:
        item = _item(data, position) if isinstance(data, dict) else Problem("bad-json", "it is no JSON object")
    if isinstance(item, Problem):
        kept = raw_item(line.encode("utf-8", "surrogateescape"))
        detail = f"line {position} is no dead letter: {item.detail}"
        return Refusal(item.reason, detail, RawItem("memory", "", kept, position))
    return item


def _item(data: Mapping[str, Any], position: str) -> RawItem | Problem:
    if "item" in data:
        return item_of(_of_this_text(data["item"]), position)
    record = data.get("record")
    if not isinstance(record, dict):
        return Problem("bad-json", "it has neither `item` nor `record`")
    try:
        # Its id is a UUID by now, and stays.
        known = str(uuid.UUID(record.get("id")))
    except (ValueError, TypeError, AttributeError):
        return Problem("bad-json", "the `id` of its `record` is no UUID")
    # What its run has made is made again, from the cache.
    vector = None if record.get("made") else record.get("embedding")
    return item_of(_of_this_text({**record, "source_id": known, "vector": vector, "settled": True}), position)


def _of_this_text(spelled: Any) -> Any:
    """Drop what was made of another text, where a person has mended it: it is made again, or asked for."""
    data = spelled.get("data") if isinstance(spelled, dict) else None
    if not isinstance(data, dict) or not isinstance(data.get("hash"), str):
        return spelled
    names = ("data",) if spelled.get("settled") else ("memory", "content", "text", "data")
    text = next((data[name] for name in names if isinstance(data.get(name), str)), "")
    # Whatever writes a hash takes that of its text. Source: mem0ai `mem0/memory/main.py`; mem0-ts `src/oss`.
    if data["hash"] == hashlib.md5(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest():
        return spelled
    left = {name: value for name, value in data.items() if name not in ("hash", "text_lemmatized", "textLemmatized")}
    return {**spelled, "data": left, "vector": None}
