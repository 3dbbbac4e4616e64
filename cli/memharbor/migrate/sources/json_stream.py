"""
Read a JSON file of any size a piece at a time: find where each value begins and ends, and leave its meaning to others.

A parser of events would stop at the first `NaN` or misspelled item; here such an item has bounds like every other, so that
it can be refused and the next one read. Nothing but the value at hand is in memory. Source: RFC 8259.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from memharbor.errors import SourceDataError

CHUNK_BYTES = 1 << 18
# An item that is larger is refused: 1 MiB of text and an embedding of 16,000 dimensions have room in it many times.
VALUE_BYTES = 1 << 24

# No possessive quantifiers: those of Python before 3.11.5, which Debian 12 has, match wrongly (python/cpython#106052).
# These need none, for no two of their parts can take the same byte.
_SPACE = re.compile(rb"[ \t\r\n]*")
_SCALAR = re.compile(rb"[^\s,:\[\]{}\"]*")
# To the next bracket, over whole strings; a string that is cut off stops it at its first quote.
_TO_BRACKET = re.compile(rb'(?:[^"{}\[\]]+|"[^"\\]*(?:\\.[^"\\]*)*")*', re.DOTALL)
# To the end of a string, or as far as there are bytes.
_IN_STRING = re.compile(rb"[^\"\\]*(?:\\.[^\"\\]*)*", re.DOTALL)


@dataclass(frozen=True)
class Value:
    """
    One value as its file has it.

    Args:
        raw: Its bytes; of one that is larger than the limit only the first of them.
        offset: Of its first byte.
        is_whole: Whether these are all of its bytes.
    """

    raw: bytes
    offset: int
    is_whole: bool = True


class JsonStream:
    """
    Goes through JSON values, forwards only.

    Args:
        read: Yields at most so many bytes more, none at the end.
        name: What is read, for messages.
    """

    def __init__(self, read: Callable[[int], bytes], name: str) -> None:
        self._read = read
        self._name = name
        self._buffer = b""
        self._at = 0  # in the buffer
        self._start: int | None = None  # of the value at hand, in the buffer
        self._base = 0  # of the buffer's first byte in the file
        if self._fill() and self._buffer.startswith(b"\xef\xbb\xbf"):
            self._at = 3
        elif self._buffer[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise SourceDataError(
                f"{name} is UTF-16, not UTF-8", hint="convert it: `iconv -f UTF-16 -t UTF-8 FILE > NEW`"
            )

    @property
    def offset(self) -> int:
        """Of the next byte in the file."""
        return self._base + self._at

    def peek(self) -> bytes:
        """Look at the next byte that is no white space; empty at the end."""
        while True:
            match = _SPACE.match(self._buffer, self._at)
            assert match is not None  # noqa: S101 - it matches nothing too
            self._at = match.end()
            if self._at < len(self._buffer):
                return self._buffer[self._at : self._at + 1]
            if not self._fill():
                return b""

    def members(self) -> Iterator[bytes]:
        """Go through an object: yields each key as it is spelled; the caller takes the value before the next one."""
        self._take(b"{")
        if self.peek() == b"}":
            self._take(b"}")
            return
        while True:
            if self.peek() != b'"':
                self.refuse()
            key = self.value()
            self._take(b":")
            yield key.raw
            if self._take(b",}") == b"}":
                return

    def elements(self) -> Iterator[None]:
        """Go through a list: the caller takes each value before the next one."""
        self._take(b"[")
        if self.peek() == b"]":
            self._take(b"]")
            return
        while True:
            yield None
            if self._take(b",]") == b"]":
                return

    def value(self, limit: int | None = None) -> Value:
        """
        Take the next value.

        Args:
            limit: Of one that is larger, only so many bytes are kept; `VALUE_BYTES` by default.

        Raises:
            SourceDataError: There is none, or the file ends inside it.
        """
        first = self.peek()
        self._start, self._is_whole, self._kept, self._limit = self._at, True, b"", VALUE_BYTES
        if limit is not None:
            self._limit = limit
        self._begin = self.offset
        if first == b'"':
            self._at += 1
            self._to_string_end()
        elif first and first in b"{[":
            self._to_bracket_end()
        else:
            self._to_scalar_end()
        raw = self._buffer[self._start : self._at] if self._is_whole else self._kept
        self._start = None
        return Value(raw, self._begin, self._is_whole)

    def _to_bracket_end(self) -> None:
        depth = 1
        self._at += 1
        while depth:
            match = _TO_BRACKET.match(self._buffer, self._at)
            assert match is not None  # noqa: S101 - it matches nothing too
            self._at = match.end()
            bracket = self._buffer[self._at : self._at + 1]
            if bracket == b'"':
                self._at += 1
                self._to_string_end()
            elif bracket:
                depth += 1 if bracket in b"{[" else -1
                self._at += 1
            else:
                self._fill_inside()

    def _to_string_end(self) -> None:
        while True:
            match = _IN_STRING.match(self._buffer, self._at)
            assert match is not None  # noqa: S101 - it matches nothing too
            self._at = match.end()
            if self._buffer[self._at : self._at + 1] == b'"':
                self._at += 1
                return
            self._fill_inside()

    def _to_scalar_end(self) -> None:
        while True:
            match = _SCALAR.match(self._buffer, self._at)
            assert match is not None  # noqa: S101 - it matches nothing too
            self._at = match.end()
            if self._at == self._start and self._is_whole:
                self.refuse()
            if self._at < len(self._buffer) or not self._fill():
                return
            self._shed()

    def _fill_inside(self) -> None:
        if not self._fill():
            raise SourceDataError(f"{self._name} ends inside the value that begins at byte {self._begin:,}")
        self._shed()

    def _shed(self) -> None:
        """Let go of the inside of a value that is too large to be kept."""
        assert self._start is not None  # noqa: S101 - the caller is inside one
        if self._at - self._start > self._limit or not self._is_whole:
            if self._is_whole:
                self._kept, self._is_whole = self._buffer[self._start : self._start + self._limit], False
            self._start = self._at

    def _take(self, wanted: bytes) -> bytes:
        found = self.peek()
        if not found or found not in wanted:
            self.refuse()
        self._at += 1
        return found

    def refuse(self) -> NoReturn:
        """Say that what comes next is not what JSON has there."""
        found = self.peek()
        if not found:
            raise SourceDataError(f"{self._name} ends at byte {self.offset:,} before its JSON does")
        shown = found.decode("ascii", "backslashreplace")
        raise SourceDataError(f"{self._name} is no JSON: it has `{shown}` at byte {self.offset:,}")

    def _fill(self) -> bool:
        """Read on, and forget what lies before the value at hand."""
        done = self._at if self._start is None else self._start
        more = self._read(CHUNK_BYTES)
        self._buffer = self._buffer[done:] + more
        self._base, self._at = self._base + done, self._at - done
        self._start = None if self._start is None else 0
        return bool(more)


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """
    Lend the content of a file, unpacked where it is gzip, and say whether it was.

    Raises:
        SourceDataError: It cannot be read, or what is packed in it is damaged.
    """
    with damage(path), path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            file.seek(0)
            yield file, False
        else:
            file.seek(0)
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield cast(BinaryIO, unpacked), True


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Say which file it is that cannot be read."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise SourceDataError(f"`{path}` is damaged: {exc}", hint="export it again") from exc
    except OSError as exc:
        raise SourceDataError(
            f"`{path}` cannot be read: {exc.strerror or exc}", hint=f"look with `ls -l {path}`"
        ) from exc


def digest_file(path: Path) -> tuple[int, str]:
    """
    Tell a file by its content: its size in bytes and its SHA-256.

    Raises:
        SourceDataError: It cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with damage(path), path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()
