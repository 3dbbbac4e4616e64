"""
How Memharbor speaks: data on stdout, everything else on stderr.

`Output` is created once by the command line and handed down; nothing else writes to the terminal. With
`--output json` stdout holds one JSON document and nothing more: a list where the result is a list, else an object. Colour follows the terminal and `NO_COLOR`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

Format = Literal["text", "json"]


class Output:
    """
    Write results, notes, tables and progress of one command.

    Args:
        format: `text` for people, `json` for one JSON document on stdout.
        verbose: Whether `detail` is shown.
    """

    def __init__(self, format: Format = "text", *, verbose: bool = False) -> None:
        self.format = format
        self.verbose = verbose

    def result(self, data: Mapping[str, Any] | Sequence[Any], text: str | None = None) -> None:
        """Write the command's result: `data` as JSON, or `text` for people (nothing where it is None)."""
        if self.format == "json":
            sys.stdout.write(json.dumps(data, indent=2, default=_plain, ensure_ascii=False) + "\n")
        elif text is not None:
            sys.stdout.write(text if text.endswith("\n") else text + "\n")

    def table(self, data: Sequence[Mapping[str, Any]], columns: Sequence[str], *, empty: str = "nothing") -> None:
        """Write rows as a table for people, or as a JSON list; `empty` is said where there is no row."""
        if self.format == "json":
            self.result(list(data))
            return
        if not data:
            self.note(empty)
            return
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column.replace("_", " "), overflow="fold")
        for row in data:
            table.add_row(*("" if row.get(column) is None else str(_plain_text(row[column])) for column in columns))
        _console(sys.stdout).print(table)

    def note(self, text: str) -> None:
        """Say something on stderr that is not the result."""
        sys.stderr.write(text + "\n")

    def detail(self, text: str) -> None:
        """Say something on stderr with `--verbose` only."""
        if self.verbose:
            self.note(text)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Say what begins and, when it ended well, how long it took."""
        begun_at = time.monotonic()
        self.note(f"{text} …")
        yield
        self.note(f"{text}: done in {time.monotonic() - begun_at:.1f} s")

    @contextmanager
    def percent(self, size_bytes: int = 0) -> Iterator[Callable[[float], None]]:
        """
        Show a share of 100 on stderr while work goes on, with the time it took and will take; on a terminal only.

        Args:
            size_bytes: What 100 stands for, where it is a size: then the rate is shown too.
        """
        if self.format == "json" or not sys.stderr.isatty():
            yield lambda share: None
            return
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=_console(sys.stderr), transient=True) as progress:
            task = progress.add_task("", total=100)
            begun_at = time.monotonic()

            def update(share: float) -> None:
                seconds = time.monotonic() - begun_at
                rate = f"{size_text(size_bytes * share / 100 / seconds)}/s" if size_bytes and seconds > 1 else ""
                progress.update(task, completed=share, description=rate)

            yield update


def _console(stream: Any) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, soft_wrap=not stream.isatty(), width=None if stream.isatty() else 200)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if hasattr(value, "_asdict"):
        return value._asdict()
    return str(value)


def _plain_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S %Z")
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def size_text(size_bytes: float) -> str:
    """
    Write a size for people.

    >>> size_text(512), size_text(10_485_760)
    ('512 B', '10.0 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size_bytes) < 1024 or unit == "TiB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError("unreachable")


def age_text(seconds: float) -> str:
    """
    Write an age for people.

    >>> age_text(42), age_text(600), age_text(10_000), age_text(400_000)
    ('42 s', '10 min', '2.8 h', '4.6 days')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
