"""
Which tables hold a user's rows, and how a row tells whose it is. Pure.

The one list for logical backups, restores of one user, checkpoints and erasure; what `memharbor.fingerprint_users()`
covers (`sql_templates/repeatable/45_fingerprints.sql`) is compared with it by a test.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEMA = "memharbor"


@dataclass(frozen=True)
class UserTable:
    """
    One table with rows of users.

    Args:
        name: The table, in schema `memharbor`.
        owner: SQL expression of the owner's id over a row; null for a row of nobody.
        key: Columns that identify a row.
        identity: Column that the database numbers itself, which a row that is copied into another database does not
            keep.
        feature: Part of the schema that may be left out: `graph` or `history`.
    """

    name: str
    owner: str
    key: tuple[str, ...]
    identity: str | None = None
    feature: str | None = None


# In the order in which rows may be inserted under the foreign keys; delete in the opposite order.
USER_TABLES = (
    UserTable("memories", "user_id", ("id",)),
    UserTable("entities", "(payload ->> 'user_id')", ("id",)),
    UserTable("memory_relationships", "user_id", ("id",), feature="graph"),
    UserTable("memory_categories", "user_id", ("memory_id", "category_id")),
    UserTable("memory_history", "user_id", ("id",), identity="id", feature="history"),
    UserTable("org_members", "user_id", ("org_id", "user_id")),
)
# Rows of nobody in particular; `memory_categories` refers to the first.
SHARED_TABLES = ("categories", "configs")
