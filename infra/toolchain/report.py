"""
Say what happens, on stderr, and carry failures: the tool, the source, the cause and what to do.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO

EXIT_CONFIG = 3
EXIT_CONNECT = 4
EXIT_EXTERNAL_TOOL = 6
EXIT_REFUSED = 9


class ToolchainError(Exception):
    """
    A failure that a person can act on.

    Args:
        message: One sentence that names the tool and the source, values in backticks.
        hints: What to do, at most two, each a command where there is one.
        exit_code: See `docs/reference`, exit codes.
        output: Text of the program that failed, shown verbatim.
    """

    def __init__(
        self, message: str, *, hints: Sequence[str] = (), exit_code: int = EXIT_EXTERNAL_TOOL, output: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hints = tuple(hints)
        self.exit_code = exit_code
        self.output = output


class Reporter:
    """
    Write one line per event, with the seconds since the beginning on lines about long work.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._begin = time.monotonic()

    def elapsed_seconds(self) -> float:
        """Seconds since this reporter was made."""
        return time.monotonic() - self._begin

    def line(self, text: str) -> None:
        """Write `text` as it is."""
        self._stream.write(text + "\n")
        self._stream.flush()

    def taken(self, tool: str, version: str, source: str, reason: str) -> None:
        """Say which source a tool was taken from and why."""
        self.line(f"  {tool:<18} {version:<24} {source}: {reason}")

    def working(self, text: str) -> None:
        """Say that something slow begins or goes on."""
        self.line(f"  [{self.elapsed_seconds():4.0f} s] {text}")

    def error(self, failure: ToolchainError) -> None:
        """Write a failure the way every Memharbor command does."""
        if failure.output:
            self.line(failure.output.rstrip())
        self.line(f"error: {failure.message}")
        for hint in failure.hints:
            self.line(f"hint: {hint}")
