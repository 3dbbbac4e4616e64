"""What a conversion says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["dropped", "renamed", "changed", "pinned", "secret", "check"]


@dataclass(frozen=True)
class Note:
    """
    One thing that was changed, or that a person has to look at.

    Args:
        kind: What happened.
        key: The key it is about, with its path in the old configuration; empty for the whole.
        text: A sentence without a final stop.
    """

    kind: Kind
    key: str
    text: str

    def line(self) -> str:
        """
        Write it for people.

        >>> Note("dropped", "graph_store", "it is gone").line()
        'dropped `graph_store`: it is gone'
        """
        return f"{self.kind} `{self.key}`: {self.text}" if self.key else f"{self.kind}: {self.text}"


class Notes(list[Note]):
    """Notes in the order in which they were made."""

    def add(self, kind: Kind, key: str, text: str) -> None:
        """Make one."""
        self.append(Note(kind, key, text))
