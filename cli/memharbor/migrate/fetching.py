"""
Read a source into a file of JSON lines, without any database: an export, or a look at what there is.

What was read so far stands in `<file>.partial`, each line with its position, so that the same call goes on after it was
stopped, wherever that was. The file itself appears last, when all that stands beside it is there.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any, BinaryIO

from memharbor.errors import StateRefusedError, UsageError
from memharbor.migrate.opening import say_notes
from memharbor.migrate.record import RawItem, Refusal, Source, item_as_data
from memharbor.migrate.sources.own_lines import line_of
from memharbor.migrate.transform import Choice, transform
from memharbor.migrate.workfolder import refusal_as_data
from memharbor.output import Output

_FLUSH_ITEMS = 1000
# Last in `<file>.partial` once all was read: the manifest of what is put in place then.
_FINISHED = "finished"
# What some programs take for the end of a line.
_LINE_ENDS = (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"))


def fetch(
    source: Source, path: Path, output: Output, *, replace: bool = False, choice: Choice | None = None
) -> dict[str, Any]:
    """
    Read a source into a file that `--from file` reads: each item comes back as it was, under the name of its source.

    Args:
        source: The source.
        path: The file. Beside it come `<file>.manifest.json` and, where an item was refused, `<file>.refused.jsonl`, which
            `--from dead-letters` reads.
        output: Where progress is said.
        replace: Whether one that is there may be replaced.
        choice: Which items are kept, as a run would choose them; all by default. What a run would refuse is kept, too.

    Returns:
        The manifest: `file`, `source`, `items` by kind, `refused` by reason, `sha256`, `bytes`; `chosen`, where not all is.

    Raises:
        StateRefusedError: The file is there, or what was read before is of another source or choice.
        UsageError: The file's folder is not there.
    """
    refuse_unwritable(path, replace=replace)
    place, info = _Place(path), source.describe()
    say_notes(source, output)
    chosen = {"chosen": _choice_as_data(choice)} if choice is not None else {}
    head = {"identity": info.identity, **chosen}
    if manifest := place.find_finished(head):
        place.partial.unlink()
        return manifest
    refuse_unwritable(path, replace=replace, may_be_finished=False)
    after, count = place.find_position(head)
    total = sum(info.counts.values())
    with (
        output.step(f"Read {info.name}"),
        output.percent() as on_percent,
        _opened(place.partial, os.O_APPEND) as file,
    ):
        if file.tell() == 0:
            file.write(_spell(head))
        for item in source.read(after):
            if choice is not None and not _is_chosen(item, info.name, choice):
                continue
            file.write(_spell_item(item))
            count += 1
            if count % _FLUSH_ITEMS == 0:
                file.flush()
                if total:
                    on_percent(min(100.0, 100 * count / total))
    return place.finish({"file": path.name, "source": info.name, **chosen})


def refuse_unwritable(path: Path, *, replace: bool, may_be_finished: bool = True) -> None:
    """
    Refuse a file that cannot be made.

    Args:
        path: The file.
        replace: Whether one that is there may be replaced.
        may_be_finished: Whether one that is there may be that of a reading which was stopped at its very end.

    Raises:
        StateRefusedError: It is there already.
        UsageError: Its folder is not.
    """
    if path.exists() and not replace and not (may_be_finished and _Place(path).partial.exists()):
        raise StateRefusedError(f"`{path}` is there already", hint="pass `--replace`, or name another file")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder `{path.parent}`", hint=f"mkdir -p {path.parent}")


@dataclass(frozen=True)
class _Place:
    """
    The file, and what stands beside it.

    Args:
        path: The file.
    """

    path: Path

    @property
    def partial(self) -> Path:
        """What was read so far."""
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def _manifest(self) -> Path:
        return self.path.with_name(f"{self.path.name}.manifest.json")

    @property
    def _refused(self) -> Path:
        return self.path.with_name(f"{self.path.name}.refused.jsonl")

    def find_finished(self, head: Mapping[str, Any]) -> dict[str, Any] | None:
        """Find the manifest of a reading that had put all in place, and was stopped before it took `partial` away."""
        last: dict[str, Any] = {}
        for number, (_, line) in enumerate(_lines(self.partial)):
            if number == 0 and line != head:
                return None
            last = line
        manifest: dict[str, Any] | None = last.get(_FINISHED)
        if manifest is None or not self.path.is_file() or not self._manifest.is_file():
            return None
        is_there = self._manifest.read_bytes() == _spell_manifest(manifest) and _digest(self.path) == manifest["sha256"]
        return manifest if is_there else None

    def find_position(self, head: Mapping[str, Any]) -> tuple[str | None, int]:
        """Find where to go on, and behind how many items; cuts off what was not written to its end."""
        position, count, good_bytes = None, 0, 0
        if not self.partial.exists():
            return position, count
        for number, (end, line) in enumerate(_lines(self.partial)):
            if number == 0 and line != head:
                raise StateRefusedError(
                    f"`{self.partial}` is of another source or choice, or of a source that has changed",
                    hint=f"rm {self.partial}",
                )
            if _FINISHED in line:
                break
            if number:
                position, count = line.get("item", line)["position"], count + 1
            good_bytes = end
        os.truncate(self.partial, good_bytes)
        return position, count

    def finish(self, begun: Mapping[str, Any]) -> dict[str, Any]:
        """Make the file of what was read; whatever stops it, the same again puts all in place."""
        items: Counter[str] = Counter()
        refused: Counter[str] = Counter()
        made = {path: path.with_name(f".{path.name}.incoming") for path in (self._refused, self._manifest, self.path)}
        with _opened(made[self.path], os.O_TRUNC) as file, _opened(made[self._refused], os.O_TRUNC) as dead:
            for _, line in _lines(self.partial):
                if "reason" in line:
                    refused[line["reason"]] += 1
                    dead.write(_spell({"source": begun["source"], **line}))
                elif "kind" in line:
                    items[line["kind"]] += 1
                    file.write(_spell_readably(line_of(line, begun["source"])))
        sums = {"sha256": _digest(made[self.path]), "bytes": made[self.path].stat().st_size}
        manifest = {**begun, "items": dict(items), "refused": dict(refused), **sums}
        with _opened(made[self._manifest], os.O_TRUNC) as file:
            file.write(_spell_manifest(manifest))
        with _opened(self.partial, os.O_APPEND) as file:
            file.write(_spell({_FINISHED: manifest}))
        for path, incoming in made.items():
            incoming.replace(path)
            if path == self._refused and not refused:
                path.unlink()
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.partial.unlink()
        return manifest


def _lines(partial: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read lines as far as they are whole, each with the offset behind it."""
    if not partial.exists():
        return
    end = 0
    with partial.open("rb") as file:
        for raw in file:
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                return
            if not isinstance(line, dict):
                return
            end += len(raw)
            yield end, line


def _is_chosen(item: RawItem | Refusal, source: str, choice: Choice) -> bool:
    """Whether a run would take an item, or refuse it: whose a refused one is may be what is wrong with it."""
    return isinstance(item, Refusal) or transform(item, source, choice) is not None


def _choice_as_data(choice: Choice) -> dict[str, Any]:
    found = {
        "users": None if choice.users is None else sorted(choice.users),
        "from": None if choice.from_at is None else choice.from_at.isoformat(),
        "to": None if choice.to_at is None else choice.to_at.isoformat(),
    }
    return {name: value for name, value in found.items() if value is not None}


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[BinaryIO]:
    """Open a file to write, which nobody else may read, and see to it that the disk has it."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o600), "ab") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _spell_item(item: RawItem | Refusal) -> bytes:
    try:
        return _spell(refusal_as_data(item) if isinstance(item, Refusal) else item_as_data(item))
    except RecursionError:
        raw = item.item if isinstance(item, Refusal) else item
        bare = RawItem(raw.kind, raw.source_id, {}, raw.position)
        return _spell(refusal_as_data(Refusal("bad-json", "it is nested too deeply", bare)))


def _spell(data: Any) -> bytes:
    return (json.dumps(data, separators=(",", ":")) + "\n").encode("ascii")


def _spell_readably(data: Any) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    try:
        for end, escaped in _LINE_ENDS:
            text = text.replace(end, escaped)
        return (text + "\n").encode("utf-8")
    except UnicodeEncodeError:
        return _spell(data)  # half of a surrogate pair, which the run will refuse


def _spell_manifest(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode("ascii")
