"""
The one renderer of Memharbor's SQL templates.

`sql_templates/` is rendered here for the CLI, for the Ansible module and for the tests. Undefined variables are errors;
names go through `ident`, values through `literal`: nothing else puts a value into SQL. Rendered text holds no secret,
no time and no randomness, so that its checksum identifies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from memharbor.errors import ConfigError

IDENTIFIER_BYTES_MAX = 63


def template_root() -> Path:
    """
    Find `sql_templates/`: inside the installed package, or at the top of the checkout.

    Raises:
        ConfigError: Neither exists, so the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    for root in (package / "sql_templates", package.parents[1] / "sql_templates"):
        if root.is_dir():
            return root
    raise ConfigError("the SQL templates are missing from this installation", hint="install memharbor again")


def ident(name: str) -> str:
    """
    Quote a name as an SQL identifier. Source: PostgreSQL manual, Lexical Structure, Identifiers.

    Raises:
        ConfigError: The name is empty, holds a NUL or is longer than 63 bytes, which PostgreSQL would cut silently.

    >>> ident('o"brien')
    '"o""brien"'
    """
    if not name or "\0" in name or len(name.encode()) > IDENTIFIER_BYTES_MAX:
        raise ConfigError(f"`{name}` cannot be an SQL name: 1 to {IDENTIFIER_BYTES_MAX} bytes without NUL")
    return '"' + name.replace('"', '""') + '"'


def literal(value: str | int | float | bool | None) -> str:
    r"""
    Quote a value as an SQL literal, also safe where `standard_conforming_strings` is off.

    Raises:
        ConfigError: A text holds a NUL, which PostgreSQL cannot store.

    >>> literal("o'brien"), literal("a\\b"), literal(True), literal(None), literal(5)
    ("'o''brien'", " E'a\\\\b'", 'true', 'null', '5')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if "\0" in value:
        raise ConfigError("a text with a NUL byte cannot be an SQL value")
    quoted = "'" + value.replace("'", "''") + "'"
    return " E" + quoted.replace("\\", "\\\\") if "\\" in value else quoted


@cache
def _environment(root: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(root),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - SQL, not HTML; quoting is `ident` and `literal`
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["ident"] = ident
    environment.filters["literal"] = literal
    return environment


def render(name: str, variables: Mapping[str, Any], *, root: Path | None = None) -> str:
    """
    Render one template.

    Args:
        name: Path below the template root, for instance `versioned/0002_memories.up.sql`.
        variables: Everything that the template may name.
        root: Where the templates are; `template_root()` by default.

    Raises:
        ConfigError: The template is missing, wrong, or names a variable that is not given.
    """
    try:
        return _environment(root or template_root()).get_template(name).render(**variables)
    except TemplateError as exc:
        raise ConfigError(f"template `{name}` cannot be rendered: {exc}") from exc
