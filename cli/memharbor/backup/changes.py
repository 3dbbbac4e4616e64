"""
What is not as it was at a checkpoint: rows, compared with their copies bit by bit, and the tables' definitions.
"""

from __future__ import annotations

from dataclasses import dataclass

from memharbor.backup.access import all_rows, present_tables, qualified
from memharbor.backup.checkpoint import KEYS, Checkpoint, copy_name, read_catalog
from memharbor.database import Connection, transaction, translated_errors
from memharbor.errors import StateRefusedError
from memharbor.schema.fingerprint import describe_catalog
from memharbor.schema.fingerprint import differences as catalog_differences
from memharbor.templates import ident

# What of the catalog a rollback of everything must find as it was, and what one of single tables or users must.
_WHOLE = ("schema ", "relation ", "column ", "constraint ", "index ", "trigger ", "policy ", "function ")
_ROWS = ("column ", "constraint ")


@dataclass(frozen=True)
class Change:
    """How many rows of a table were added, changed and removed since a checkpoint."""

    added: int
    changed: int
    removed: int

    @property
    def total(self) -> int:
        """How many rows are not as they were."""
        return self.added + self.changed + self.removed


def find_changes(connection: Connection, checkpoint: Checkpoint) -> dict[str, Change]:
    """
    Count what was added, changed and removed since a checkpoint whose rows were copied, by table; bits count.

    Raises:
        StateRefusedError: It has no copies, or a table is not there any more.
        DatabaseError: A table was changed so that its rows cannot be compared.
    """
    refuse_missing_copies(connection, checkpoint)
    tables = list(checkpoint.tables)
    with translated_errors("compare with the checkpoint"), transaction(connection), all_rows(connection, tables):
        return count_changes(connection, checkpoint)


def find_changed_keys(connection: Connection, checkpoint: Checkpoint, *, limit: int = 1000) -> list[dict[str, str]]:
    """Name the rows that are not as they were, at most `limit` a table: `table`, `change`, `key`."""
    found = []
    tables = list(checkpoint.tables)
    with translated_errors("compare with the checkpoint"), transaction(connection), all_rows(connection, tables):
        for table in checkpoint.tables:
            keys = ", ".join(f"coalesce(t.{ident(key)}, s.{ident(key)})::text" for key in KEYS[table])
            rows = connection.execute(
                f"""
                select {_kind(table)}, concat_ws(', ', {keys}) {_different(checkpoint, table)}
                order by 1, 2 limit {limit}
                """.encode()
            )
            found += [{"table": table, "change": kind, "key": key} for kind, key in rows.fetchall()]
    return found


def _kind(table: str) -> str:
    key = ident(KEYS[table][0])
    return f"case when s.{key} is null then 'added' when t.{key} is null then 'removed' else 'changed' end"


def _different(checkpoint: Checkpoint, table: str) -> str:
    """Spell the rows of a table that differ from its copy. `*=` compares images: what a row is made of, bit by bit."""
    copy = copy_name(checkpoint.copies[table])
    live = f"{qualified(table)} where {checkpoint.condition(table)}"
    return f"from (select * from {live}) t full join {copy} s on {same_key(table)} where (t *= s) is not true"  # noqa: S608 - names of our own


def same_key(table: str) -> str:
    """Spell that `t` and `s` are the same row by its key."""
    return " and ".join(f"t.{ident(key)} = s.{ident(key)}" for key in KEYS[table])


def count_changes(connection: Connection, checkpoint: Checkpoint) -> dict[str, Change]:
    """Count as `find_changes` does, inside a transaction that sees all rows."""
    changes = {}
    for table in checkpoint.tables:
        counted = connection.execute(
            f"select {_kind(table)}, count(*) {_different(checkpoint, table)} group by 1".encode()
        )
        found: dict[str, int] = dict(counted.fetchall())
        changes[table] = Change(*(found.get(kind, 0) for kind in ("added", "changed", "removed")))
    return changes


def refuse_missing_copies(connection: Connection, checkpoint: Checkpoint) -> None:
    """
    Refuse a checkpoint whose rows are not there to compare with, or whose tables are not.

    Raises:
        StateRefusedError: So it is.
    """
    if not checkpoint.copies:
        raise StateRefusedError(
            f"checkpoint `{checkpoint.name}` has no copies of its rows in this database",
            hint=f"run `memharbor rollback --to {checkpoint.name} --dry-run`",
        )
    missing = sorted({*checkpoint.tables} - {*present_tables(connection, checkpoint.tables)})
    if missing:
        raise StateRefusedError(
            f"table `memharbor.{missing[0]}` is not there any more",
            hint=f"run `memharbor rollback --to {checkpoint.name} --dry-run`",
        )


def find_definition_changes(connection: Connection, checkpoint: Checkpoint) -> list[str] | None:
    """
    Say what of the tables' definitions is not as it was at a checkpoint.

    Returns:
        One line each; `None` where the database does not know the checkpoint, so that nobody can tell.
    """
    then = read_catalog(connection, checkpoint)
    if then is None:
        return None
    found = [str(each) for each in catalog_differences(then, describe_catalog(connection))]
    if checkpoint.is_everything:
        # The largest things first: a column of a table that is gone says nothing more.
        return [each for kind in _WHOLE for each in found if each.startswith(kind)]
    starts = tuple(f"{kind}memharbor.{table}." for kind in _ROWS for table in checkpoint.tables)
    return [each for each in found if each.startswith(starts)]
