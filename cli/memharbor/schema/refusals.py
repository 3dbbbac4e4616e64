"""
When a roll-out must not begin: each reason once, with what to do about it. Nothing was changed when one of these is raised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from memharbor.database import Connection, transaction
from memharbor.errors import StateRefusedError
from memharbor.schema import ledger
from memharbor.schema.ledger import AppliedStep
from memharbor.schema.migrations import LEDGER_COMPONENTS, PREREQUISITES, Step, contract_views
from memharbor.settings import Settings


def refuse_unknown(applied: Mapping[str, AppliedStep], steps: Iterable[Step]) -> None:
    """Refuse a database that a newer Memharbor rolled out."""
    known = {step.name for step in steps}
    unknown = sorted(name for name, step in applied.items() if step.kind == "versioned" and name not in known)
    if unknown:
        raise StateRefusedError(
            f"step `{unknown[-1]}` is applied to this database and unknown to this Memharbor: a newer one was here",
            hint="use the newer Memharbor; to go back, run `memharbor schema downgrade` with it first",
        )


def refuse_edited(changed: Iterable[Step]) -> None:
    """Refuse versioned steps whose text is not the one that was applied."""
    for step in changed:
        if step.kind == "versioned":
            raise StateRefusedError(
                f"the versioned step `{step.name}` was applied with another text than the present one",
                hint=[
                    "restore the template or setting it was applied with; changes belong into a new versioned step",
                    "memharbor schema history",
                ],
            )


def refuse_other_dimensions(connection: Connection, settings: Settings) -> None:
    """Refuse settings whose embeddings do not fit the table."""
    with transaction(connection):
        row = connection.execute(
            """
            select t.typname, a.atttypmod from pg_catalog.pg_attribute a
            join pg_catalog.pg_type t on t.oid = a.atttypid
            where a.attrelid = pg_catalog.to_regclass('memharbor.memories') and a.attname = 'embedding'
            """
        ).fetchone()
    if row is not None and (row[0], row[1]) != (settings.embedding_type, settings.embedding_dims):
        raise StateRefusedError(
            f"this database holds embeddings of type {row[0]}({row[1]}), the settings say"
            f" {settings.embedding_type}({settings.embedding_dims}), and dimensions cannot be changed in place",
            hint=[
                f"set MEMHARBOR_EMBEDDING_DIMS={row[1]}",
                "for other embeddings roll out a second database: set MEMHARBOR_DATABASE to a new name",
            ],
        )


def find_missing_prerequisite(
    connection: Connection, components: Iterable[str], every: Sequence[Step]
) -> StateRefusedError | None:
    """
    Find what must be rolled out before the given components can be; None where nothing is missing.

    Args:
        connection: To the database.
        components: What is to be rolled out together.
        every: All steps of the schema.
    """
    with transaction(connection):
        row = connection.execute("select pg_catalog.to_regrole(%s) is not null", (ledger.OWNER,)).fetchone()
    if row is None or not row[0]:
        return StateRefusedError(
            f"role {ledger.OWNER} does not exist on this server",
            hint="ansible-playbook ansible/playbooks/roles.yml",
        )
    here = set(components)
    applied = ledger.read_applied(connection)
    for component in sorted(here, key=LEDGER_COMPONENTS.index):
        for needed in PREREQUISITES.get(component, ()):
            pending = [step.name for step in every if step.component == needed and step.name not in applied]
            if needed not in here and pending:
                return StateRefusedError(
                    f"component `{component}` needs `{needed}`, of which step `{pending[0]}` is not applied",
                    hint=f"memharbor schema apply --component {needed}",
                )
    return None


def refuse_taken_names(connection: Connection, steps: Iterable[Step]) -> None:
    """Refuse a database where a contract view's name belongs to something else, for instance to stock Mem0's table."""
    with transaction(connection):
        row = connection.execute(
            """
            select c.relname, c.relkind = 'v', pg_catalog.pg_get_userbyid(c.relowner) from pg_catalog.pg_class c
            where c.relnamespace = 'public'::pg_catalog.regnamespace and c.relname = any (%s)
              and not (c.relkind = 'v' and c.relowner = pg_catalog.to_regrole(%s))
            order by c.relname
            """,
            (list(contract_views(steps)), ledger.OWNER),
        ).fetchone()
    if row is not None:
        name, is_view, owner = row
        raise StateRefusedError(
            f"public.{name} is a {'view' if is_view else 'table'} of `{owner}` already, and Memharbor needs the name",
            hint=f"rename it first, for instance to {name}_old",
        )
