"""
Read one JSON value of a source, exactly, or say what is wrong with it. Pure.

What PostgreSQL could not store is found here, where the item still has a place in its source: numbers that are not
finite, NUL characters, halves of surrogate pairs. Source: RFC 8259; Python's `json`.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memharbor.migrate.vector import Vector

# So much of an item that cannot be read is kept for a person to mend.
KEPT_BYTES = 1 << 20

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Problem:
    """
    Why something is no value that can travel on.

    Args:
        reason: A code of `memharbor.migrate.reasons`.
        detail: What is wrong, for a person.
    """

    reason: str
    detail: str


class _NotFiniteError(ValueError):
    """A number that JSON has no word for, or that no float can hold."""


def parse_value(raw: bytes) -> Any:
    """
    Parse one JSON value, or return a `Problem`.

    Whole numbers stay exact, others become floats.

    >>> parse_value(b'{"n": 12345678901234567890}')
    {'n': 12345678901234567890}
    >>> parse_value(b"[1e999]")
    Problem(reason='bad-number', detail='`1e999` is no finite number')
    """
    if b"\0" in raw:
        return Problem("bad-text", "it has a NUL character")
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, parse_constant=_finite)
        if not _seems_finite(value):
            value = json.loads(text, parse_float=_finite)
    except UnicodeDecodeError as exc:
        return Problem("bad-text", f"it is not UTF-8: {exc.reason} at its byte {exc.start:,}")
    except json.JSONDecodeError as exc:
        return Problem("bad-json", f"it is no JSON: {exc.msg} at its character {exc.pos:,}")
    except _NotFiniteError as exc:
        return Problem("bad-number", str(exc))
    except RecursionError:
        return Problem("bad-json", "it is nested too deeply")
    except ValueError:
        return Problem("bad-number", "a whole number in it has too many digits")
    # Only an escape can bring such a character in: the bytes were UTF-8 without NUL.
    if b"\\u" in raw and not is_storable(value):
        return Problem("bad-text", "a text in it has a NUL character or half of a surrogate pair")
    return value


def parse_object(raw: bytes) -> dict[str, Any] | Problem:
    """
    Parse one JSON object, or say what it is instead.

    >>> parse_object(b"[]")
    Problem(reason='bad-json', detail='it is a list, not an object')
    """
    value = parse_value(raw)
    if isinstance(value, dict | Problem):
        return value
    kinds = {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return Problem("bad-json", f"it is {kinds.get(type(value), 'null')}, not an object")


def is_storable(value: Any) -> bool:
    r"""
    Whether PostgreSQL can store every text in a JSON value, however deep.

    >>> is_storable({"a": ["x", "\ud800"]})
    False
    """
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            waiting += each
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
        elif isinstance(each, str) and _UNSTORABLE.search(each):
            return False
    return True


def read_vector(value: Any) -> Sequence[float] | Problem | None:
    """
    Read an embedding as files spell it: a list of numbers, that list as a text, or base64 of little-endian float32.

    >>> read_vector("AACAPwAAAL8=")
    Vector.of((1.0, -0.5))
    >>> read_vector([])
    """
    if value is None or value in ([], ""):
        return None
    if isinstance(value, str):
        if value.lstrip()[:1] == "[":
            listed = parse_value(value.encode("utf-8", "surrogatepass"))
            return read_vector(listed) if isinstance(listed, list) else Problem("bad-vector", _NO_VECTOR)
        try:
            return unpack_floats(base64.b64decode(value, validate=True))
        except (binascii.Error, ValueError):
            return Problem("bad-vector", _NO_VECTOR)
    if not isinstance(value, list) or not set(map(type, value)) <= {int, float}:
        return Problem("bad-vector", _NO_VECTOR)
    try:
        return tuple(map(float, value))
    except OverflowError:
        return Problem("bad-vector", "a value of its embedding is larger than any float")


_NO_VECTOR = "its embedding is neither a list of numbers nor base64 of float32 values"


def unpack_floats(packed: bytes) -> Vector | Problem | None:
    """
    Read little-endian float32 values, bit for bit; none at all is no embedding.

    >>> unpack_floats(b"abc")
    Problem(reason='wrong-dims', detail='its embedding has 3 bytes, which is no number of float32 values')
    """
    if len(packed) % 4:
        size = f"{len(packed):,} bytes"
        return Problem("wrong-dims", f"its embedding has {size}, which is no number of float32 values")
    return Vector(packed) if packed else None


def raw_item(raw: bytes, *, is_whole: bool = True) -> dict[str, Any]:
    r"""
    Keep what could not be parsed, so that a person can mend it: field `raw`, as text.

    Args:
        raw: Its bytes.
        is_whole: Whether these are all of them.

    >>> raw_item(b'{"a": "\xff"}')
    {'raw': '{"a": "\\xff"}'}
    """
    kept = raw[:KEPT_BYTES].decode("utf-8", "backslashreplace").replace("\0", "\\x00")
    return {"raw": kept} | ({"is_cut_off": True} if len(raw) > KEPT_BYTES or not is_whole else {})


def id_text(value: Any) -> str | Problem:
    """
    Spell an id as text; empty where there is none.

    >>> id_text(7)
    '7'
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return Problem("bad-json", "its id is neither a text nor a whole number")


def first_text(values: Sequence[Any]) -> str:
    """Find the first that is a text and not empty; empty where none is."""
    return next((value for value in values if isinstance(value, str) and value), "")


def _seems_finite(value: Any) -> bool:
    """Whether no number in a JSON value is infinite; may say no where only a sum is."""
    if isinstance(value, dict):
        return all(map(_seems_finite, value.values()))
    if isinstance(value, list):
        if set(map(type, value)) <= {int, float}:
            try:
                return math.isfinite(sum(value))
            except OverflowError:
                return False
        return all(map(_seems_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _NotFiniteError(f"`{text[:40]}` is no finite number")
    return value
