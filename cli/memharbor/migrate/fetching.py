"""
Read a source into a file of JSON lines, without any database: an export, or a look at what there is.

What was read so far stands in `<file>.partial`, each line with its position, so that the same call goes on after it was
stopped.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from hashlib import file_digest
from pathlib import Path
from typing import Any

from memharbor.errors import StateRefusedError
from memharbor.migrate.record import RawItem, Refusal, Source, item_as_data, item_from_data, pack_vector
from memharbor.migrate.workfolder import refusal_as_data
from memharbor.output import Output

_FLUSH_ITEMS = 1000


def fetch(source: Source, path: Path, output: Output, *, replace: bool = False) -> dict[str, Any]:
    """
    Read all of a source into a file that `--from file` reads.

    Args:
        source: The source.
        path: The file. Beside it come `<file>.manifest.json` and, where an item was refused, `<file>.refused.jsonl`.
        output: Where progress is said.
        replace: Whether one that is there may be replaced.

    Returns:
        The manifest: `file`, `source`, `items` by kind, `refused` by reason, `sha256`, `bytes`.

    Raises:
        StateRefusedError: The file is there, or what was read before is of another source.
    """
    if path.exists() and not replace:
        raise StateRefusedError(f"`{path}` is there already", hint="pass `--replace`, or name another file")
    info = source.describe()
    partial = path.with_name(f"{path.name}.partial")
    after = _find_position(partial, info.identity)
    total = sum(info.counts.values())
    with output.step(f"Read {info.name}"), output.percent() as on_percent, partial.open("ab") as file:
        if file.tell() == 0:
            file.write(_spell({"identity": info.identity}))
        count = 0
        for count, item in enumerate(source.read(after), start=1):
            file.write(_spell(refusal_as_data(item) if isinstance(item, Refusal) else item_as_data(item)))
            if count % _FLUSH_ITEMS == 0:
                file.flush()
                if total:
                    on_percent(min(100.0, 100 * count / total))
    return _finish(path, partial, info.name)


def _find_position(partial: Path, identity: str) -> str | None:
    """Find where to go on, and cut off a line that was not written to its end."""
    if not partial.exists():
        return None
    position, good_bytes = None, 0
    with partial.open("rb") as file:
        for number, line in enumerate(file):
            try:
                data = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                data = None
            if data is None:
                break
            if number == 0 and data.get("identity") != identity:
                raise StateRefusedError(
                    f"`{partial}` is of another source, or of one that has changed", hint="delete it, and begin anew"
                )
            item = data.get("item", data)
            position = item.get("position", position)
            good_bytes += len(line)
    os.truncate(partial, good_bytes)
    return position


def _finish(path: Path, partial: Path, source: str) -> dict[str, Any]:
    items: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    incoming, letters = (path.with_name(f".{path.name}.{name}") for name in ("incoming", "refused"))
    with incoming.open("wb") as file, letters.open("wb") as dead:
        for line in _lines(partial):
            if "reason" in line:
                refused[line["reason"]] += 1
                dead.write(_spell(line))
            elif "kind" in line:
                item = item_from_data(line)
                items[item.kind] += 1
                file.write(_spell(_spell_item(item)))
        file.flush()
        os.fsync(file.fileno())
    incoming.chmod(0o600)
    incoming.replace(path)
    if refused:
        letters.replace(path.with_name(f"{path.name}.refused.jsonl"))
    letters.unlink(missing_ok=True)
    with path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    manifest = {
        "file": path.name,
        "source": source,
        "items": dict(items),
        "refused": dict(refused),
        "sha256": digest,
        "bytes": path.stat().st_size,
    }
    path.with_name(f"{path.name}.manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    partial.unlink()
    return manifest


def _lines(partial: Path) -> Iterator[dict[str, Any]]:
    with partial.open(encoding="ascii") as file:
        yield from map(json.loads, file)


def _spell_item(item: RawItem) -> dict[str, Any]:
    """Spell an item as `--from file` reads it: its fields as they were, beside its id, embedding and state."""
    data = {**item.data, "id": item.source_id}
    if item.kind != "memory":
        data["kind"] = item.kind
    if item.vector is not None:
        data["embedding"] = pack_vector(item.vector)
    return data | ({"state": item.state} if item.state != "active" else {}) | dict(item.lifecycle)


def _spell(data: Any) -> bytes:
    return (json.dumps(data, separators=(",", ":")) + "\n").encode("ascii")
