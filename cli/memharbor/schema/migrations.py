"""
The steps below `sql_templates/`, rendered: what the schema consists of, in the order in which it is applied.

Pure: reads templates and settings, connects to nothing. A step is versioned (it changes tables, runs once and is never
edited afterwards) or repeatable (it states how functions, views, policies, grants or settings are, and runs again
whenever its rendered text changes).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from memharbor.errors import ConfigError
from memharbor.schema.statements import split_statements
from memharbor.settings import Settings
from memharbor.templates import render, template_root

# In the order in which they are rolled out. `roles` are of the whole server and have no ledger (`memharbor.schema.roles`).
COMPONENTS: tuple[str, ...] = ("roles", "settings", "extension", "tables", "indexes", "policies")
LEDGER_COMPONENTS = COMPONENTS[1:]
PREREQUISITES: Mapping[str, tuple[str, ...]] = {
    "tables": ("extension",),
    "indexes": ("tables",),
    "policies": ("tables",),
}
# What the contract names without a schema (Mem0's `::vector`, its `<=>`) is found through the roles' search path.
VECTOR_SCHEMA = "public"

Kind = Literal["versioned", "repeatable"]
RunsAs = Literal["owner", "administrator", "service"]

_HEADER_KEYS = ("component", "purpose", "variables", "runs as", "safe to repeat", "transaction", "feature")
_HEADER_LINE = re.compile(rf"-- ({'|'.join(_HEADER_KEYS)}): (.*)")
_STEP_FILE = re.compile(r"(?P<order>\d+)_(?P<name>[a-z0-9_]+)(?P<up>\.up)?\.sql")


@dataclass(frozen=True)
class Header:
    """What a template says about itself in its first lines."""

    component: str
    purpose: str
    variables: tuple[str, ...]
    runs_as: RunsAs
    safe_to_repeat: str
    transactional: bool = True
    feature: str | None = None


@dataclass(frozen=True)
class Step:
    """
    One rendered step.

    `checksum` identifies what is applied: the SQL without its header. `down_sql` is None where there is nothing to
    take back.
    """

    name: str
    component: str
    kind: Kind
    checksum: str
    sql: str
    down_sql: str | None
    verify_sql: str
    transactional: bool
    runs_as: RunsAs
    purpose: str
    source: str = field(compare=False)

    @cached_property
    def statements(self) -> tuple[str, ...]:
        """The statements of `sql`, in order."""
        return split_statements(self.sql)


def context(settings: Settings, *, include_graph: bool = True, include_history: bool = True) -> dict[str, Any]:
    """
    List everything that a step's template may name: settings, never secrets.

    Args:
        settings: The configuration.
        include_graph: Whether the memory graph is part of the schema.
        include_history: Whether the audit trail is part of the schema.
    """
    return {
        "database": settings.database,
        "embedding_dims": settings.embedding_dims,
        "embedding_operator_class": settings.embedding_operator_class,
        "embedding_storage": settings.embedding_storage,
        "embedding_type": settings.embedding_type,
        "hnsw_ef_construction": settings.hnsw_ef_construction,
        "hnsw_ef_search": settings.hnsw_ef_search,
        "hnsw_m": settings.hnsw_m,
        "include_graph": include_graph,
        "include_history": include_history,
        "leakproof": settings.leakproof,
        "lock_timeout_ms": settings.lock_timeout_ms,
        "statement_timeout_ms": settings.statement_timeout_ms,
        "vector_schema": VECTOR_SCHEMA,
    }


def load_steps(
    settings: Settings, *, include_graph: bool = True, include_history: bool = True, root: Path | None = None
) -> tuple[Step, ...]:
    """
    Render every step that a database's ledger keeps, in the order in which they are applied.

    Args:
        settings: The configuration to render for.
        include_graph: Whether the memory graph is part of the schema.
        include_history: Whether the audit trail is part of the schema.
        root: Where the templates are; `template_root()` by default.

    Raises:
        ConfigError: A template is wrong, has no verify twin, or two steps have the same place or name.
    """
    root = root or template_root()
    variables = context(settings, include_graph=include_graph, include_history=include_history)
    excluded = {
        feature for feature, included in (("graph", include_graph), ("history", include_history)) if not included
    }
    found: dict[tuple[int, int, int], Step] = {}
    for kind_order, (kind, folder) in enumerate((("versioned", "versioned"), ("repeatable", "repeatable"))):
        for file in sorted((root / folder).glob("*.sql")):
            match = _STEP_FILE.fullmatch(file.name)
            if match is None or bool(match["up"]) != (kind == "versioned"):
                continue
            name = f"{match['order']}_{match['name']}" if kind == "versioned" else match["name"]
            step, header = _load_step(name, "versioned" if kind == "versioned" else "repeatable", file, variables, root)
            place = (LEDGER_COMPONENTS.index(header.component), kind_order, int(match["order"]))
            if place in found:
                raise ConfigError(f"templates `{found[place].source}` and `{step.source}` have the same place")
            if header.feature not in excluded:
                found[place] = step
    steps = tuple(found[place] for place in sorted(found))
    if len({step.name for step in steps}) < len(steps):
        raise ConfigError("two templates below `versioned/` and `repeatable/` have the same name")
    return steps


def _load_step(name: str, kind: Kind, file: Path, variables: Mapping[str, Any], root: Path) -> tuple[Step, Header]:
    stem = file.name.removesuffix(".up.sql" if kind == "versioned" else ".sql")

    def rendered(suffix: str) -> str | None:
        sibling = file.with_name(stem + suffix)
        return render(f"{file.parent.name}/{sibling.name}", variables, root=root) if sibling.exists() else None

    source = f"{file.parent.name}/{file.name}"
    sql, verify_sql = render(source, variables, root=root), rendered(".verify.sql")
    if verify_sql is None:
        raise ConfigError(f"template `{source}` has no verify twin `{stem}.verify.sql`")
    header, body = split_header(sql, source)
    if header.component not in LEDGER_COMPONENTS:
        raise ConfigError(f"template `{source}` names the unknown component `{header.component}`")
    step = Step(
        name=name,
        component=header.component,
        kind=kind,
        checksum=hashlib.sha256(body.encode()).hexdigest(),
        sql=sql,
        down_sql=rendered(".down.sql"),
        verify_sql=verify_sql,
        transactional=header.transactional,
        runs_as=header.runs_as,
        purpose=header.purpose,
        source=source,
    )
    return step, header


def split_header(sql: str, source: str) -> tuple[Header, str]:
    """
    Read the header of a template and return it with what follows.

    Raises:
        ConfigError: A line of the header is missing or says something unknown.
    """
    lines = sql.splitlines(keepends=True)
    said: dict[str, str] = {}
    for line in lines:
        match = _HEADER_LINE.fullmatch(line.rstrip("\n"))
        if match is None:
            break
        said[match[1]] = match[2].strip()
    missing = [key for key in _HEADER_KEYS[:5] if key not in said]
    if missing:
        raise ConfigError(f"the header of template `{source}` lacks {', '.join(missing)}")
    runs_as = said["runs as"]
    if runs_as not in ("owner", "administrator", "service") or said.get("transaction", "no") != "no":
        raise ConfigError(f"the header of template `{source}` says something unknown")
    header = Header(
        component=said["component"],
        purpose=said["purpose"],
        variables=() if said["variables"] == "none" else tuple(said["variables"].split(", ")),
        runs_as=runs_as,  # type: ignore[arg-type]  # checked above
        safe_to_repeat=said["safe to repeat"],
        transactional="transaction" not in said,
        feature=said.get("feature"),
    )
    return header, "".join(lines[len(said) :])


def contract_views(steps: Iterable[Step]) -> tuple[str, ...]:
    """List the views in schema public that the steps make."""
    pattern = re.compile(r"^create or replace view public\.(\w+)", re.MULTILINE)
    return tuple(name for step in steps for name in pattern.findall(step.sql))
