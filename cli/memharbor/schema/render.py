"""
The whole schema as one script for psql, for those who roll out with something else than Memharbor.

The script keeps the ledger as `memharbor.schema.apply` does, so that it may run twice and Memharbor can take over later.
"""

from __future__ import annotations

from pathlib import Path

from memharbor.schema.ledger import OWNER
from memharbor.schema.migrations import load_steps, split_header
from memharbor.settings import Settings
from memharbor.templates import render

_FOUNDATIONS = ("roles/1_roles.sql", "ledger/1_schema.sql", "ledger/2_tables.sql")


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
    foundations = []
    for name in _FOUNDATIONS:
        sql = render(name, {}, root=root)
        foundations.append({"sql": sql, "runs_as": split_header(sql, name)[0].runs_as})
    variables = {
        "embedding_dims": settings.embedding_dims,
        "foundations": foundations,
        "include_graph": include_graph,
        "include_history": include_history,
        "owner": OWNER,
        "steps": load_steps(settings, include_graph=include_graph, include_history=include_history, root=root),
    }
    return split_header(render("ledger/script.sql", variables, root=root), "ledger/script.sql")[1]
