"""
The work folder of a run: its settings, and each step's output in segments that are complete or absent.

    run.json              what is migrated, from where and how; no secrets
    read/000001.jsonl     raw items, refused ones included; the last line says where the source stands behind them
    transformed/000001    records and dead letters
    embedded/000001       records with their embeddings, and dead letters
    loaded/000001.json    what the target did with them
    dead-letters.jsonl    every refusal, in the order of the source; made of the segments

A segment appears under its name only when it is whole, so that the names alone are the state of the run: whatever was
killed, the next run finds what is done and does the rest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from memharbor.errors import ConfigError, SourceDataError, StateRefusedError
from memharbor.migrate.record import Refusal, item_as_data, item_from_data

FORMAT = 1
STEPS = ("read", "transformed", "embedded", "loaded")
# There where a user of the run was erased, and the run's files with them.
CLEARED = "cleared.json"
_END = "end"


@dataclass(frozen=True)
class Segment:
    """
    What a step made of some items.

    Args:
        lines: JSON data of each.
        end: The last line: `counts`, `reasons`, and of the first step its `position`.
    """

    lines: list[Mapping[str, Any]]
    end: Mapping[str, Any]


class WorkFolder:
    """
    One run's folder.

    Args:
        path: The folder; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # By step, what was written last: the next step takes it from here, and need not read it back.
        self._at_hand: dict[str, tuple[int, Segment]] = {}

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "run.json").is_file()

    def begin(self, run: Mapping[str, Any]) -> None:
        """
        Begin a run.

        Raises:
            StateRefusedError: There is another one.
        """
        if self.exists:
            raise StateRefusedError(
                f"`{self.path}` has a run already", hint=f"memharbor migrate resume {self.path.name}"
            )
        for step in STEPS:
            (self.path / step).mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)
        self.write_json("run.json", {"format": FORMAT, **run})

    def read_run(self) -> dict[str, Any]:
        """
        Read what was begun.

        Raises:
            ConfigError: There is nothing, or another version made it.
        """
        found = self.read_json("run.json")
        if found is None:
            raise ConfigError(f"`{self.path}` is no work folder of a migration", hint="run `memharbor migrate status`")
        if found.get("format") != FORMAT:
            raise ConfigError(f"`{self.path}` was written by another version of Memharbor", hint="use that version")
        return found

    def segments(self, step: str) -> list[int]:
        """List the numbers of the segments that a step has completed."""
        names = (path.name.partition(".")[0] for path in (self.path / step).glob("[0-9]*.json*"))
        return sorted({int(name) for name in names if name.isdigit()})

    def has(self, step: str, number: int) -> bool:
        """Whether a step has completed a segment."""
        return self._segment(step, number).is_file() or (self.path / step / f"{number:06}.json").is_file()

    def is_read(self) -> bool:
        """Whether the source was read to its end."""
        return (self.path / "read" / "complete.json").is_file()

    def write_segment(self, step: str, number: int, lines: Iterable[Mapping[str, Any]], end: Mapping[str, Any]) -> None:
        """
        Write a segment, which appears whole or not at all.

        Args:
            step: Whose output it is.
            number: From 1 on.
            lines: Its lines.
            end: What the last line says.
        """
        segment = Segment(list(lines), end)

        def write(incoming: Path) -> None:
            compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
            with zstandard.open(incoming, "wt", cctx=compressor, encoding="utf-8", newline="\n") as file:
                for line in segment.lines:
                    file.write(_spell(line) + "\n")
                file.write(_spell({_END: end}) + "\n")

        self._put(self._segment(step, number), write)
        self._at_hand[step] = (number, segment)

    def pass_on(self, segment: Segment, step: str, number: int, to: str) -> None:
        """Make a segment of one step that of the next, which has nothing to change in it."""
        source = self._segment(step, number)

        def write(incoming: Path) -> None:
            try:
                incoming.hardlink_to(source)
            except OSError:
                shutil.copyfile(source, incoming)

        self._put(self._segment(to, number), write)
        self._at_hand[to] = (number, segment)

    def take_segment(self, step: str, number: int) -> Segment:
        """
        Take a segment for the next step; what this process wrote last is not read back.

        Raises:
            SourceDataError: It is damaged.
        """
        written, segment = self._at_hand.pop(step, (0, None))
        if segment is not None and written == number:
            return segment
        return Segment(list(self.read_segment(step, number)), self.read_end(step, number))

    def read_segment(self, step: str, number: int) -> Iterator[dict[str, Any]]:
        """
        Read the lines of a segment, without the last one.

        Raises:
            SourceDataError: It is damaged.
        """
        path = self._segment(step, number)
        try:
            with zstandard.open(path, "rt", encoding="utf-8") as file:
                for text in file:
                    line = json.loads(text)
                    if _END in line:
                        return
                    yield line
        except (OSError, ValueError, zstandard.ZstdError) as exc:
            raise SourceDataError(f"`{path}` is damaged: {exc}", hint="delete it; `resume` makes it again") from exc
        raise SourceDataError(f"`{path}` is damaged: it is cut off", hint="delete it; `resume` makes it again")

    def read_end(self, step: str, number: int) -> dict[str, Any]:
        """Read the last line of a segment."""
        with zstandard.open(self._segment(step, number), "rt", encoding="utf-8") as file:
            lines = deque(file, maxlen=1)
        end: dict[str, Any] = json.loads(lines[0])[_END]
        return end

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a small file, which appears whole or not at all."""
        self._put(self.path / name, lambda incoming: _write_text(incoming, json.dumps(data, indent=1) + "\n"))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a small file; `None` where it is not there."""
        try:
            found: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as exc:
            raise SourceDataError(f"`{self.path / name}` is damaged: {exc}") from exc
        return found

    def dead_letters(self) -> Iterator[dict[str, Any]]:
        """Read every refusal of the run, step by step in the order of the source."""
        for number in self.segments("read"):
            for step in STEPS[:-1]:
                if self.has(step, number):
                    yield from (
                        {"step": step, "segment": number, **line}
                        for line in self.read_segment(step, number)
                        if "reason" in line
                    )
            yield from (self.read_json(f"loaded/{number:06}.json") or {}).get("refused", [])

    def write_dead_letters(self) -> int:
        """Write `dead-letters.jsonl` anew, and return how many there are."""
        count = 0

        def write(incoming: Path) -> None:
            nonlocal count
            with incoming.open("w", encoding="utf-8") as file:
                for line in self.dead_letters():
                    file.write(_spell(line) + "\n")
                    count += 1

        self._put(self.path / "dead-letters.jsonl", write)
        return count

    def _segment(self, step: str, number: int) -> Path:
        return self.path / step / f"{number:06}.jsonl.zst"

    def _put(self, path: Path, write: Callable[[Path], None]) -> None:
        incoming = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            write(incoming)
            with incoming.open("rb") as file:
                os.fsync(file.fileno())
            incoming.replace(path)
        finally:
            incoming.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def refusal_as_data(refusal: Refusal) -> dict[str, Any]:
    """Spell a refusal as a line."""
    return {"reason": refusal.reason, "detail": refusal.detail, "item": item_as_data(refusal.item)}


def refusal_from_data(data: Mapping[str, Any]) -> Refusal:
    """Read what `refusal_as_data` spelled."""
    return Refusal(data["reason"], data["detail"], item_from_data(data["item"]))


def _spell(data: Mapping[str, Any]) -> str:
    # ASCII, so that half of a surrogate pair in a bad item can be kept as it was.
    return json.dumps(data, ensure_ascii=True, separators=(",", ":"))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
