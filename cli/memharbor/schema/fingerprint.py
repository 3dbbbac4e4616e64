"""
What a database's catalog is, as data: to tell whether something changed, and what.

Covers the schemas `memharbor` and `memharbor_pooler`, the contract views in `public`, and the roles of Memharbor with
their settings and grants. Leaves out oids, rows, and users' own vector indexes, which follow the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memharbor.database import Connection, transaction, translated_errors
from memharbor.templates import render

Catalog = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """One object that two catalogs describe differently; None where one of them does not have it."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        if self.before is None:
            return f"{self.key} was added"
        if self.after is None:
            return f"{self.key} is gone"
        return f"{self.key} was changed"


def describe_catalog(connection: Connection) -> Catalog:
    """Describe everything of Memharbor's in the database, by names; keys are sorted."""
    with translated_errors("describe the catalog"), transaction(connection):
        rows = connection.execute(render("catalog/describe.sql", {})).fetchall()
    return dict(rows)


def fingerprint(connection: Connection) -> str:
    """Compute the fingerprint of the present catalog."""
    return fingerprint_of(describe_catalog(connection))


def fingerprint_of(catalog: Mapping[str, Any]) -> str:
    """
    Digest a catalog, whatever the order of its keys.

    >>> fingerprint_of({"a": 1, "b": [2]}) == fingerprint_of({"b": [2], "a": 1})
    True
    """
    canonical = json.dumps(catalog, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Difference, ...]:
    """
    Compare two catalogs.

    >>> [str(found) for found in differences({"table a": 1, "table b": 1}, {"table b": 2, "table c": 1})]
    ['table a is gone', 'table b was changed', 'table c was added']
    """
    return tuple(
        Difference(key, before.get(key), after.get(key))
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    )


def with_differences(catalog: Mapping[str, Any], changes: tuple[Difference, ...]) -> Catalog:
    """
    Carry changes over into a catalog; what else differs there stays as it is.

    >>> with_differences({"a": 1, "b": 1}, (Difference("b", 1, None), Difference("c", None, 3)))
    {'a': 1, 'c': 3}
    """
    result = {**catalog, **{change.key: change.after for change in changes if change.after is not None}}
    for change in changes:
        if change.after is None:
            result.pop(change.key, None)
    return dict(sorted(result.items()))
