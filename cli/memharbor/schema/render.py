"""
The whole schema as one script for psql, for those who roll out with something else than Memharbor.

The script keeps the ledger as `memharbor.schema.apply` does, so that it may run twice and Memharbor can take over later.
"""

from __future__ import annotations

from pathlib import Path

from memharbor.schema.ledger import OWNER
from memharbor.schema.migrations import Step, load_steps, split_header
from memharbor.settings import Settings
from memharbor.templates import literal, render

_HEAD = """\
-- Memharbor's schema: {dims} dimensions, {parts}.
-- Run it in the database as its administrator: psql --file=this-file "$DATABASE_URL". It may run twice.
-- Roles have no passwords yet: give them one each with \\password, for instance \\password memharbor_app
\\set ON_ERROR_STOP on
set client_min_messages = warning;
set search_path = '';
"""


def render_script(
    settings: Settings, *, include_graph: bool = True, include_history: bool = True, root: Path | None = None
) -> str:
    """
    Render everything as one script, without secrets.

    Args:
        settings: The configuration to render for.
        include_graph: Whether the memory graph is part of the schema.
        include_history: Whether the audit trail is part of the schema.
        root: Where the templates are.
    """
    steps = load_steps(settings, include_graph=include_graph, include_history=include_history, root=root)
    graph, history = ("with" if included else "without" for included in (include_graph, include_history))
    parts = [_HEAD.format(dims=settings.embedding_dims, parts=f"{graph} graph, {history} history")]
    for name in ("roles/1_roles.sql", "ledger/1_schema.sql", "ledger/2_tables.sql"):
        sql = render(name, {}, root=root)
        header, _ = split_header(sql, name)
        parts.append(f"\n-- {name}\nbegin;\n{_act_as(header.runs_as)}{sql}commit;\n")
    return "".join([*parts, *(_guarded(step) for step in steps)])


def _act_as(runs_as: str) -> str:
    return f"set local role {OWNER};\n" if runs_as == "owner" else ""


def _guarded(step: Step) -> str:
    name, checksum = literal(step.name), literal(step.checksum)
    row = (
        "insert into memharbor.schema_migrations (name, component, kind, direction, checksum, execution_ms)\n"
        f"values ({name}, {literal(step.component)}, {literal(step.kind)}, 'up', {checksum}, 0);\n"
    )
    if step.transactional:
        body = f"begin;\n{_act_as(step.runs_as)}{step.sql}set local role {OWNER};\n{row}commit;\n"
    else:
        body = f"set role {OWNER};\n{step.sql}{row}reset role;\n"
    return (
        f"\n-- {step.source}\n"
        "select coalesce((\n"
        "  select direction <> 'up' or checksum <> "
        f"{checksum} from memharbor.schema_migrations where name = {name} order by id desc limit 1\n"
        "), true) as pending \\gset\n"
        f"\\if :pending\n{body}\\endif\n"
    )
