"""Write a configuration as JSON, with references like `${NAME}`, or as the Python that makes it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from memharbor.mem0_config.values import Text, Variable

_ENCODED = "_ENCODED"


def as_data(value: Any) -> Any:
    """
    Write variables as `${NAME}`; one that has to be percent-encoded as `${NAME_ENCODED}`.

    >>> as_data({"dsn": Text(("postgresql://", Variable("PW", encoded=True)))})
    {'dsn': 'postgresql://${PW_ENCODED}'}
    """
    if isinstance(value, dict):
        return {key: as_data(each) for key, each in value.items()}
    if isinstance(value, list):
        return [as_data(each) for each in value]
    return "".join(_reference(part) for part in value.parts) if isinstance(value, Text) else value


def as_json(config: dict[str, Any]) -> str:
    """Write a configuration as JSON."""
    return json.dumps(as_data(config), indent=2, ensure_ascii=False, default=str)


def as_program(config: dict[str, Any], *, imports: Iterable[str] = ()) -> str:
    """Write a program that makes the configuration and a `Memory` of it."""
    body = f"config = {expression(config)}\n\nmemory = Memory.from_config(config)"
    return with_imports(body, imports)


def with_imports(body: str, imports: Iterable[str] = ()) -> str:
    """Put what a body needs in front of it: the standard library, then the rest."""
    standard = []
    if "os.environ" in body:
        standard.append("import os")
    if "quote(" in body:
        standard.append("from urllib.parse import quote")
    groups = ["\n".join(standard), "\n".join(["from mem0 import Memory", *imports]), body]
    return "\n\n".join(filter(None, groups)) + "\n"


def expression(value: Any, indent: int = 0) -> str:
    r"""
    Write a value as Python.

    >>> expression({"port": Text((Variable("PORT"),), "int")})
    '{\n    "port": int(os.environ["PORT"]),\n}'
    """
    inner, outer = " " * 4 * (indent + 1), " " * 4 * indent
    if isinstance(value, dict):
        if not value:
            return "{}"
        lines = [f"{inner}{_literal(key)}: {expression(each, indent + 1)}," for key, each in value.items()]
        return "{\n" + "\n".join(lines) + f"\n{outer}}}"
    if isinstance(value, list):
        return "[" + ", ".join(expression(each, indent) for each in value) + "]"
    if isinstance(value, Code):
        return value.text
    if isinstance(value, Text):
        joined = " + ".join(_operand(part) for part in value.parts)
        return f"{value.cast}({joined})" if value.cast else joined
    return _literal(value) if isinstance(value, str) else repr(value)


class Code:
    """
    A piece of Python in a configuration.

    Args:
        text: An expression.
    """

    def __init__(self, text: str) -> None:
        self.text = text


def _reference(part: str | Variable) -> str:
    return part if isinstance(part, str) else f"${{{part.name}{_ENCODED if part.encoded else ''}}}"


def _operand(part: str | Variable) -> str:
    if isinstance(part, str):
        return _literal(part)
    name = _literal(part.name)
    read = f"os.environ[{name}]" if part.default is None else f"os.environ.get({name}, {_literal(part.default)})"
    return f'quote({read}, safe="")' if part.encoded else read


def _literal(text: str) -> str:
    """Write a text with double quotes; what JSON escapes, Python reads alike."""
    return json.dumps(text, ensure_ascii=False)
