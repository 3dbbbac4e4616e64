"""
Memories of an export file: JSON in every shape that Mem0, its Platform and the scripts around them write, or JSON lines.

Shapes of JSON: a list; an object with `memories` or `results`; an object of users, each with a list or with an object that
has `results`; memories one after the other, as `jq` prints them. Gzip is unpacked by what the file is, not by its name.
Of an object with `memories` or `results` nothing else is read: `relations` of Mem0 1.x name no memories.

What `memharbor migrate read` wrote comes back as the items that were read, of every kind, under the name of their source
(`memharbor.migrate.sources.own_lines`): a run from the file makes the same ids as one from the source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from memharbor.errors import SourceDataError
from memharbor.migrate.record import RawItem, Refusal, SourceInfo, State
from memharbor.migrate.sources.json_stream import VALUE_BYTES, JsonStream, Value, digest_file, opened
from memharbor.migrate.sources.json_values import (
    Problem,
    first_text,
    id_text,
    parse_object,
    parse_value,
    raw_item,
    read_vector,
)
from memharbor.migrate.sources.own_lines import MARK, is_line, item_of, parse_line

# Keys whose list holds memories, whatever else stands beside them.
LIST_KEYS = ("memories", "results")
TEXT_KEYS = ("memory", "content", "data", "text")
LIFECYCLE_KEYS = ("archived_at", "deleted_at", "expires_at")
_HEAD_BYTES = 1 << 18
_LINES_SUFFIXES = {".jsonl", ".ndjson"}

_OWN_LINE = b'{"%s":' % MARK.encode()

_Shape = Literal["list", "envelope", "users", "one"]


@dataclass(frozen=True)
class _Found:
    """
    A place in the file where an item should be.

    Args:
        value: What is there.
        label: `line 7`, or `item 7` of its list.
        owner: The key that its list stands under, as it is spelled in the file; `None` where the shape has no users.
        problem: What is wrong with the place itself.
    """

    value: Value
    label: str
    owner: bytes | None = None
    problem: Problem | None = None


@dataclass
class FileSource:
    """
    An export file, of any size.

    Args:
        path: The file.
        name: What the source is called where its items do not say; part of the ids that are made.
    """

    path: Path
    name: str = "file"
    _digest: tuple[int, str] | None = field(default=None, init=False, repr=False)
    _origin: str | None = field(default=None, init=False, repr=False)

    def describe(self) -> SourceInfo:
        """Say what there is: reads the file once for its digest, and its first good item; see `Source`."""
        if self._digest is None:
            self._digest = digest_file(self.path)
        size, digest = self._digest
        first = self._first()
        dims = len(first.vector) if first and first.vector else None
        return SourceInfo(self._origin or self.name, f"{size} bytes, sha256 {digest}", dims=dims, size_bytes=size)

    def read(self, after: str | None = None) -> Iterator[RawItem | Refusal]:
        """Read every item in the file's order; see `Source`."""
        if self._origin is None:
            self._first()
        for item, origin in self._read(after):
            if origin != self._origin and isinstance(item, RawItem):
                raise SourceDataError(
                    f"`{self.path}` holds items of `{self._origin}` and then of `{origin}`, whose ids are made otherwise",
                    hint="give what was read of each source by itself",
                )
            yield item

    def _first(self) -> RawItem | None:
        """Find the first good item, whose source is that of all."""
        for item, origin in self._read(None):
            if isinstance(item, RawItem):
                self._origin = origin
                return item
        return None

    def _read(self, after: str | None) -> Iterator[tuple[RawItem | Refusal, str]]:
        number, offset = _read_position(after)
        with opened(self.path) as (file, is_packed):
            if self._has_lines(file):
                if offset and not is_packed:
                    file.seek(offset)
                found = _find_lines(file, number if offset and not is_packed else 0, at=offset if not is_packed else 0)
                for line_number, end, each in found:
                    if line_number > number:
                        position = f"{line_number}" if is_packed else f"{line_number}@{end}"
                        yield _item(each, position, self.name)
                return
        yield from self._read_json(number)

    def _read_json(self, number: int) -> Iterator[tuple[RawItem | Refusal, str]]:
        name = f"`{self.path}`"
        with opened(self.path) as (file, _):
            shape = _find_shape(JsonStream(file.read, name), name)
        with opened(self.path) as (file, _):
            for ordinal, each in enumerate(_find_items(JsonStream(file.read, name), shape), 1):
                if ordinal > number:
                    yield _item(each, str(ordinal), self.name)

    def _has_lines(self, file: BinaryIO) -> bool:
        """Whether it is JSON lines: by its name, or because its first lines are objects of their own."""
        head = file.read(_HEAD_BYTES)
        file.seek(0)
        suffixes = self.path.suffixes[:-1] if self.path.suffix == ".gz" else self.path.suffixes
        if suffixes and suffixes[-1].lower() in _LINES_SUFFIXES:
            return True
        if not head.strip():
            raise SourceDataError(f"`{self.path}` is empty", hint="export it again")
        lines = [line.strip() for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
        if lines[0].startswith(_OWN_LINE):
            return True
        if lines[0].startswith(b"[") or len(lines) < 2:
            return False
        # One that is damaged may be the first; JSON over many lines has more that only open or close something.
        whole = [line.startswith(b"{") and line.endswith(b"}") and len(line) > 2 for line in lines]
        return whole[0] or 2 * sum(whole) >= len(whole)


def _read_position(after: str | None) -> tuple[int, int]:
    """Read `number` or `number@offset` of the last item that was read."""
    number, _, offset = (after or "0").partition("@")
    try:
        return int(number), int(offset or 0)
    except ValueError as exc:
        raise SourceDataError(f"`{after}` is no position in an export file") from exc


def _find_lines(file: BinaryIO, number: int, *, at: int) -> Iterator[tuple[int, int, _Found]]:
    """Find lines that are not blank: yields the line's number, the offset behind it, and what it has."""
    while raw := file.readline(VALUE_BYTES):
        number, begin, at = number + 1, at, at + len(raw)
        is_whole = raw.endswith(b"\n") or len(raw) < VALUE_BYTES
        rest = b"" if is_whole else file.readline(VALUE_BYTES)
        while rest:
            at += len(rest)
            rest = b"" if rest.endswith(b"\n") else file.readline(VALUE_BYTES)
        raw = raw.removeprefix(b"\xef\xbb\xbf").strip() if begin == 0 else raw.strip()
        if raw:
            yield number, at, _Found(Value(raw, begin, is_whole), f"line {number}")


def _find_shape(stream: JsonStream, name: str) -> _Shape:
    """Find how a file of JSON holds its memories; reads no more of it than that takes."""
    first = stream.peek()
    if first == b"[":
        return "list"
    if first != b"{":
        raise SourceDataError(
            f"{name} is neither JSON nor JSON lines", hint="give a file that Mem0 or Memharbor exported"
        )
    keys, has_users, is_one = [], False, False
    for raw in stream.members():
        key, begins = parse_value(raw), stream.peek()
        keys.append(str(key))
        if begins == b"[" and key in LIST_KEYS:
            return "envelope"
        is_one = is_one or (begins == b'"' and key in TEXT_KEYS) or key == MARK
        has_users = has_users or begins == b"["
        if begins == b"{":
            has_users = _has_list(stream) or has_users
        else:
            stream.value(limit=0)
    if is_one:
        return "one"
    if has_users or not keys:
        return "users"
    raise SourceDataError(
        f"{name} holds no memories in a shape that is known; its keys are {', '.join(f'`{key[:40]}`' for key in keys[:8])}",
        hint='give a list, `{"results": [...]}`, `{USER: [...]}`, or one JSON object a line',
    )


def _has_list(stream: JsonStream) -> bool:
    found = False
    for raw in stream.members():
        found = found or (stream.peek() == b"[" and parse_value(raw) in LIST_KEYS)
        stream.value(limit=0)
    return found


def _find_items(stream: JsonStream, shape: _Shape) -> Iterator[_Found]:
    if shape == "one":
        number = 0
        while stream.peek():
            number += 1
            yield _Found(stream.value(), f"item {number}")
        return
    if shape == "list":
        yield from _find_elements(stream, None)
    elif shape == "envelope":
        yield from _find_in_object(stream, None)
    else:
        for owner in stream.members():
            yield from _find_of_user(stream, owner)
    if stream.peek():
        stream.refuse()


def _find_of_user(stream: JsonStream, owner: bytes) -> Iterator[_Found]:
    begins = stream.peek()
    if begins == b"[":
        yield from _find_elements(stream, owner)
    elif begins == b"{":
        yield from _find_in_object(stream, owner)
    else:
        value = stream.value()
        if value.raw != b"null":
            yield _Found(value, "item 0", owner, Problem("bad-json", "what stands under a user is no list of memories"))


def _find_in_object(stream: JsonStream, owner: bytes | None) -> Iterator[_Found]:
    found, others = False, list[bytes]()
    for raw in stream.members():
        key = parse_value(raw)
        if key in LIST_KEYS and stream.peek() == b"[":
            found = True
            yield from _find_elements(stream, owner)
        else:
            value = stream.value(limit=200)
            if len(others) < 8:
                others.append(raw + b": " + value.raw[:200])
    if not found and owner is not None:
        value = Value(b"{" + b", ".join(others) + b"}", 0)
        problem = Problem("bad-json", "what stands under a user has neither `results` nor `memories`")
        yield _Found(value, "item 0", owner, problem)


def _find_elements(stream: JsonStream, owner: bytes | None) -> Iterator[_Found]:
    for number, _ in enumerate(stream.elements(), 1):
        yield _Found(stream.value(), f"item {number}", owner)


def _item(found: _Found, position: str, name: str) -> tuple[RawItem | Refusal, str]:
    """Make an item of what was found, or say why it is none; and name its source, where it does not say so by `name`."""
    raw = found.value.raw
    own = parse_line(raw) if found.problem is None and found.value.is_whole else None
    if own is not None:
        return _own_item(own, _labelled(found, None), position), own["source"]
    owner = None if found.owner is None else parse_value(found.owner)
    label = _labelled(found, owner)
    problem = found.problem or (owner if isinstance(owner, Problem) else None)
    if problem is None and not found.value.is_whole:
        problem = Problem("bad-json", f"it is larger than {VALUE_BYTES:,} bytes")
    data = problem or parse_object(raw)
    if isinstance(data, Problem):
        kept = raw_item(raw, is_whole=found.value.is_whole)
        return Refusal(data.reason, data.detail, RawItem("memory", label(), kept, position)), name
    if is_line(data):
        return _own_item(data, label, position), data["source"]
    if isinstance(owner, str) and not data.get("user_id") and not data.get("userId"):
        data["user_id"] = owner
    return memory_item(data, label, position), name


def _labelled(found: _Found, owner: Any) -> Callable[[], str]:
    """Tell a place from others; by its content too, so that items of two files never meet under one id."""

    def label() -> str:
        at = f"{found.label} {hashlib.sha256(found.value.raw).hexdigest()[:16]}"
        return f"{owner} {at}" if isinstance(owner, str) else at

    return label


def _own_item(data: dict[str, Any], label: Callable[[], str], position: str) -> RawItem | Refusal:
    """Make an item of a line that `migrate read` wrote; one that somebody broke since is refused."""
    item = item_of(data, position)
    if isinstance(item, RawItem):
        return item
    source_id = id_text(data["source_id"])
    known = label() if isinstance(source_id, Problem) else source_id or label()
    return Refusal(item.reason, item.detail, RawItem("memory", known, data, position))


def memory_item(data: dict[str, Any], label: Callable[[], str], position: str) -> RawItem | Refusal:
    """
    Make an item of a memory as JSON has it: its embedding, state and lifecycle leave its fields.

    Args:
        data: Its fields; of no other use afterwards.
        label: Makes what tells it from others where it has no id or is refused; begins with its owner, where the shape
            names one.
        position: Of the source.
    """
    source_id = id_text(data.get("id"))
    if isinstance(source_id, Problem):
        return Refusal(source_id.reason, source_id.detail, RawItem("memory", label(), data, position))
    vector = read_vector(data.get("embedding")) or read_vector(data.get("vector"))
    if isinstance(vector, Problem):
        return Refusal(vector.reason, vector.detail, RawItem("memory", source_id or label(), data, position))
    for key in ("embedding", "vector"):
        data.pop(key, None)
    state: State = "active"
    if data.get("state") in _STATES:
        state = data.pop("state")
    lifecycle = _take_lifecycle(data)
    if not source_id:
        owner, at = first_text([data.get(key) for key in _OWNER_KEYS]), label()
        source_id = at if not owner or at.startswith(f"{owner} ") else f"{owner} {at}"
    return RawItem("memory", source_id, data, position, vector, state, lifecycle)


_OWNER_KEYS = ("user_id", "userId", "agent_id", "agentId", "run_id", "runId", "session_id")
_STATES = get_args(State)


def _take_lifecycle(data: dict[str, Any]) -> Mapping[str, str]:
    lifecycle = {key: data[key] for key in LIFECYCLE_KEYS if isinstance(data.get(key), str) and data[key]}
    for key in LIFECYCLE_KEYS:
        if key in lifecycle or data.get(key, ...) is None:
            del data[key]
    return lifecycle
