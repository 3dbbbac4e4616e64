"""
Which rows of a database are embedded: everything that is asked for holds at once. Pure.

There is no choice of stale ones: no row knows which model made its embedding, of which text, or when. What was changed
since some moment is `all` of it by the time of its last change.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from memharbor.errors import UsageError
from memharbor.migrate.transform import parse_bound

Filter = Literal["missing", "all"]

# The column of the embedding by table. The text that is embedded is the payload's `data` in both.
VECTOR_COLUMNS: Mapping[str, str] = {"memories": "embedding", "entities": "vector"}

_CHOSEN = "id in (select id from pg_temp.chosen_ids)"
_CHOSEN_PAST = "id in (select id from pg_temp.chosen_ids where id > %(after)s)"


@dataclass(frozen=True)
class RowChoice:
    """
    Which rows are embedded.

    Args:
        only: `missing` for those that have no embedding, `all` for the others too.
        user_id: Only this user's.
        agent_id: Only this agent's.
        updated_since: Only memories that were last changed then or later.
        updated_before: Only memories that were last changed before then.
        states: Only memories in one of these; empty for any.
        ids: Lines of a file with the ids of the only ones, read once; `None` for any.
    """

    only: Filter = "missing"
    user_id: str | None = None
    agent_id: str | None = None
    updated_since: datetime | None = None
    updated_before: datetime | None = None
    states: Sequence[str] = ()
    ids: Iterable[str] | None = None

    @property
    def is_everything(self) -> bool:
        """Whether no embedding of another model would be left."""
        return self.only == "all" and self._parameters() == {} and self.ids is None

    def condition(self, table: str, after: uuid.UUID | None = None) -> tuple[str, dict[str, Any]]:
        """
        Spell it in SQL; the ids are those of `pg_temp.chosen_ids`.

        Args:
            table: A key of `VECTOR_COLUMNS`.
            after: Only rows with a greater id.

        Returns:
            A condition, and its parameters.

        >>> RowChoice(user_id="alice").condition("entities")
        ("vector is null and payload ->> 'user_id' = %(user_id)s", {'user_id': 'alice'})
        """
        parts = [f"{VECTOR_COLUMNS[table]} is null"] if self.only == "missing" else ["true"]
        parameters = self._parameters()
        spelled = {
            "user_id": "payload ->> 'user_id' = %(user_id)s",
            "agent_id": "payload ->> 'agent_id' = %(agent_id)s",
            "updated_since": "updated_at >= %(updated_since)s",
            "updated_before": "updated_at < %(updated_before)s",
            "states": "state = any(%(states)s)",
        }
        if table == "entities" and not parameters.keys() <= {"user_id", "agent_id"}:
            return "false", {}  # an entity has neither a state nor a time
        parts += [spelled[name] for name in parameters]
        past = "" if after is None else " and id > %(after)s"
        if self.ids is not None:
            # The bound stands in both, so that a page begins where the last one ended in either table.
            parts.append(_CHOSEN if after is None else _CHOSEN_PAST)
        return " and ".join(parts) + past, parameters if after is None else {**parameters, "after": after}

    def _parameters(self) -> dict[str, Any]:
        given = {
            "user_id": self.user_id,
            "agent_id": self.agent_id,
            "updated_since": self.updated_since,
            "updated_before": self.updated_before,
            "states": list(self.states) or None,
        }
        return {name: value for name, value in given.items() if value is not None}


def choose_rows(
    only: Filter = "missing",
    *,
    user_id: str | None = None,
    agent_id: str | None = None,
    updated_since: str | None = None,
    updated_before: str | None = None,
    states: Sequence[str] = (),
    ids: Iterable[str] | None = None,
) -> RowChoice:
    """
    Read what a person asked for; the arguments are those of `RowChoice`, moments as ISO 8601.

    Raises:
        UsageError: A name is empty, a moment is none, or nothing can lie between the two.
    """
    for option, name in (("--user", user_id), ("--agent", agent_id)):
        if name is not None and not name.strip():
            # A variable of a shell that is not set would choose everybody.
            raise UsageError(f"`{option}` is empty", hint=f"pass an id, or leave `{option}` out for all")
    since, before = _moment("--updated-since", updated_since), _moment("--updated-before", updated_before)
    if since is not None and before is not None and since >= before:
        raise UsageError(f"nothing was changed between {updated_since} and {updated_before}: the first must be earlier")
    return RowChoice(only, user_id, agent_id, since, before, tuple(dict.fromkeys(states)), ids)


def parse_ids(lines: Iterable[str]) -> Iterator[uuid.UUID]:
    """
    Read ids, one a line; empty lines are passed over.

    Raises:
        UsageError: A line is no id, or there is none.

    >>> [str(each)[-2:] for each in parse_ids(["00000000-0000-0000-0000-000000000007"])]
    ['07']
    """
    count = 0
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        try:
            yield uuid.UUID(text)
        except ValueError:
            raise UsageError(f"line {number} of `--ids` is no id: {text[:60]!r}", hint="one UUID a line") from None
        count += 1
    if not count:
        raise UsageError("`--ids` names no id", hint="one UUID a line; leave `--ids` out for all rows")


def _moment(option: str, text: str | None) -> datetime | None:
    try:
        return None if text is None else parse_bound(text)
    except ValueError as exc:
        raise UsageError(f"`{option}` is no moment: {text}", hint="for instance 2026-01-31, or with a time") from exc
