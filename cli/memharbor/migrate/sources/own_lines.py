"""
Items as Memharbor itself writes them into files: lines of `migrate read`, and the items of dead letters. Pure.

A line of `migrate read` is told from everybody else's by all of its keys, of which `data` is an object: what Mem0 and the
scripts around it write has a text there or nothing, and a user's own metadata always stands beside an id or a text.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from memharbor.migrate.record import Kind, RawItem, State
from memharbor.migrate.sources.json_values import Problem, unpack_floats

# The first key of a line, and which version of lines it is.
MARK = "memharbor_item"
VERSION = 1

_NEEDED = {MARK, "source", "kind", "source_id", "data"}
_OPTIONAL = {"vector", "state", "lifecycle", "settled"}
_BEGINS = re.compile(rb'\{\s*"memharbor_item"\s*:')


def line_of(spelled: Mapping[str, Any], source: str) -> dict[str, Any]:
    """
    Make a line of `migrate read`.

    Args:
        spelled: An item as `item_as_data` spells it.
        source: Name of its source, which ids are made of.

    >>> line_of({"kind": "entity", "source_id": "7", "data": {"data": "Rome"}, "position": "1"}, "mem0-pgvector")
    {'memharbor_item': 1, 'source': 'mem0-pgvector', 'kind': 'entity', 'source_id': '7', 'data': {'data': 'Rome'}}
    """
    own = {name: value for name, value in spelled.items() if name in _NEEDED | _OPTIONAL}
    return {MARK: VERSION, "source": source, **own}


def parse_line(raw: bytes) -> dict[str, Any] | None:
    r"""
    Parse a line of `migrate read` as it was written: also what no target can store, which a run refuses by itself.

    Returns:
        Its fields; `None` where it does not begin like one, or is broken.

    >>> parse_line(b'{"id": "7"}')
    >>> parse_line(b'{"memharbor_item":1,"source":"s","kind":"memory","source_id":"","data":{"x":"\\ud800"}}')["data"]
    {'x': '\ud800'}
    """
    if not _BEGINS.match(raw):
        return None
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return data if is_line(data) else None


def is_line(data: Any) -> bool:
    """
    Whether an object is a line of `migrate read`, and nobody else's that happens to have a key of that name.

    >>> is_line({"memharbor_item": 1, "id": "7", "data": "likes tea"})
    False
    """
    return (
        isinstance(data, dict)
        and _NEEDED <= data.keys() <= _NEEDED | _OPTIONAL
        and isinstance(data["data"], dict)
        and isinstance(data["source"], str)
    )


def item_of(data: Any, position: str) -> RawItem | Problem:
    """
    Make the item again that was spelled, exactly; a person may have mended it.

    Args:
        data: What `item_as_data` spelled, or a line of `migrate read`.
        position: Of the source that reads it.

    >>> item_of({"kind": "history", "source_id": "7", "data": {"table": "history"}}, "3")
    RawItem(kind='history', source_id='7', data={'table': 'history'}, position='3', vector=None, state='active', lifecycle={}, is_settled=False)
    """
    if not isinstance(data, dict):
        return Problem("bad-json", "it is no item: it is no JSON object")
    if data.get(MARK, VERSION) != VERSION:
        return Problem("bad-json", f"another version of Memharbor wrote it: `{MARK}` is {str(data[MARK])[:40]}")
    missing = next((name for name in ("kind", "source_id", "data") if name not in data), None)
    if missing:
        return Problem("bad-json", f"it is no item: it has no `{missing}`")
    kind, source_id, fields = data["kind"], data["source_id"], data["data"]
    state: Any = data.get("state") or "active"
    lifecycle: Any = data.get("lifecycle") or {}
    is_sound = (
        kind in get_args(Kind)
        and isinstance(source_id, str)
        and isinstance(fields, dict)
        and state in get_args(State)
        and isinstance(lifecycle, dict)
        and all(isinstance(value, str | None) for value in lifecycle.values())
    )
    if not is_sound:
        return Problem("bad-json", "it is no item: one of its fields has the wrong type or value")
    vector = _vector(data.get("vector"))
    if isinstance(vector, Problem):
        return vector
    return RawItem(kind, source_id, fields, position, vector, state, lifecycle, data.get("settled") is True)


def _vector(spelled: Any) -> Sequence[float] | Problem | None:
    if spelled is None:
        return None
    if isinstance(spelled, str):
        try:
            return unpack_floats(base64.b64decode(spelled, validate=True))
        except ValueError:
            return Problem("bad-vector", "its embedding is no base64 of float32 values")
    if not isinstance(spelled, list):
        return Problem("bad-vector", "its embedding is neither a list nor base64 of float32 values")
    try:
        # Of one that no float32 holds each number is spelled as a text, so that it is refused for what it is.
        return tuple(map(float, spelled))
    except (ValueError, TypeError, OverflowError):
        return spelled
