"""What stands in a configuration beside plain values: texts with variables in them, and what cannot be read as data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

Cast = Literal["int", "float", "bool"]

_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class Variable:
    """
    A variable of the environment.

    Args:
        name: Its name.
        default: What the file takes where it is not set.
        encoded: Whether its value is percent-encoded when it is put in, as a URI needs it.
    """

    name: str
    default: str | None = None
    encoded: bool = False


@dataclass(frozen=True)
class Text:
    """
    A text in which variables stand.

    Args:
        parts: Plain pieces and variables, in order.
        cast: What the whole becomes, where the file converts it.
    """

    parts: tuple[str | Variable, ...]
    cast: Cast | None = None

    @property
    def variables(self) -> tuple[Variable, ...]:
        """List the variables in it."""
        return tuple(part for part in self.parts if isinstance(part, Variable))


@dataclass(frozen=True)
class Unreadable:
    """
    A value that only running the file could tell.

    Args:
        line: Where it stands.
    """

    line: int


def read_references(text: str) -> str | Text:
    """
    Find `${NAME}` and `${NAME:-default}` in a text of a data file.

    >>> read_references("plain")
    'plain'
    >>> read_references("${HOST}/x").parts
    (Variable(name='HOST', default=None, encoded=False), '/x')
    """
    parts: list[str | Variable] = []
    end = 0
    for match in _REFERENCE.finditer(text):
        parts += [text[end : match.start()], Variable(match[1], match[2])]
        end = match.end()
    if not parts:
        return text
    return join([*parts, text[end:]])


def join(parts: list[str | Variable]) -> str | Text:
    """
    Put pieces together: plain neighbours become one, and a text without variables is a plain one.

    >>> join(["a", "b"]), join(["a", Variable("X"), ""]).parts[0]
    ('ab', 'a')
    """
    joined: list[str | Variable] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    if all(isinstance(part, str) for part in joined):
        return "".join(part for part in joined if isinstance(part, str))
    return Text(tuple(joined))


def parts_of(value: str | Text) -> list[str | Variable]:
    """Take a text apart into its pieces."""
    return [value] if isinstance(value, str) else list(value.parts)


def with_references(value: Any) -> Any:
    """Read the references in all texts of a nested value."""
    if isinstance(value, dict):
        return {str(key): with_references(each) for key, each in value.items()}
    if isinstance(value, list):
        return [with_references(each) for each in value]
    return read_references(value) if isinstance(value, str) else value
