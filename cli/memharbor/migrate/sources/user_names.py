"""
Which column of a table `users` says what the owner of a memory is called, where memories name their owner by a number.

Source: ChatSG `001_create_users.sql`, where an address is unique and a name is not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from memharbor.errors import SourceDataError
from memharbor.migrate.sources.json_values import Problem

UsersFrom = Literal["id", "username", "email"]

# A user's name of older versions of ChatSG, and of the guide's.
_COLUMNS: Mapping[UsersFrom, tuple[str, ...]] = {"username": ("username", "name"), "email": ("email",)}


def find_user_column(users_from: UsersFrom, columns: Collection[str], place: str) -> str | None:
    """
    Find the column that names a user; `None` where the id does.

    Args:
        users_from: What was asked for.
        columns: Of table `users`; none where there is no such table.
        place: Where the table would be, for a message.

    >>> find_user_column("username", ["id", "name"], "chatsg.db")
    'name'

    Raises:
        SourceDataError: There is no such column.
    """
    if users_from == "id":
        return None
    for column in _COLUMNS[users_from]:
        if {"id", column} <= set(columns):
            return column
    raise SourceDataError(f"`{place}` has no table `users` with `id` and `{users_from}`", hint="pass `--users-from id`")


def shared_name_error(place: str, column: str) -> SourceDataError:
    """Say that two users have one name: their memories would become one user's, who would see the other's."""
    return SourceDataError(
        f"table `users` of `{place}` has the same `{column}` twice",
        hint="pass another `--users-from`, or `--users-from id` with `--remap-users FILE`",
    )


def nameless_user(number: Any) -> tuple[str, Problem]:
    """
    Say what a user without a name is called in a dead letter, and why it is one.

    Another user may have the bare number for a name, whose memories these are not to become where the letter is tried
    again as it is.

    >>> nameless_user(8)[0]
    'users:8'
    """
    name = f"users:{number}"
    return name, Problem("not-mapped", f"its user `{number}` has no name in table `users`; mend or map `{name}`")
