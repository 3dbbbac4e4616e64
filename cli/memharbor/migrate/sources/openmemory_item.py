"""
What OpenMemory says of one memory, or of one change of its state, as an item; the same from a database and from a zip. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from memharbor.migrate.record import Kind, RawItem, Refusal, State
from memharbor.migrate.sources.json_values import Problem
from memharbor.migrate.sources.qdrant_points import canonical_id

_LIFECYCLE = ("archived_at", "deleted_at")


@dataclass(frozen=True)
class Memory:
    """
    A memory of OpenMemory's.

    Args:
        fields: Its columns; `metadata` parsed.
        owner: External id of its user; `None` where there is no such user.
        app: Name of its app.
        categories: Their names.
        accesses: What is added to the metadata of how it was read.
    """

    fields: Mapping[str, Any]
    owner: Any
    app: Any
    categories: Sequence[Any]
    accesses: Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """
    A change of a memory's state.

    Args:
        fields: Its columns.
        owner: External id of the memory's user.
        changer: External id of who changed it; `None` where there is no such user.
        has_memory: Whether the memory is there.
    """

    fields: Mapping[str, Any]
    owner: Any
    changer: Any
    has_memory: bool


def memory_item(memory: Memory, vectors: Mapping[str, Sequence[float] | Problem], position: str) -> RawItem | Refusal:
    """Make an item of a memory, with its embedding where there is one under its id."""
    fields = memory.fields
    source_id = "" if fields.get("id") is None else canonical_id(fields["id"])
    metadata = fields.get("metadata") or {}
    problem = _check(memory, metadata)
    vector = vectors.get(source_id)
    if isinstance(vector, Problem):
        problem, vector = problem or vector, None
    if problem is not None:
        return refuse(problem, "memory", source_id or position, fields, position)
    # A key of the application's own stays.
    app = {} if memory.app is None else {"app": memory.app, "source_app": memory.app}
    data = {
        "id": source_id or None,
        "content": fields.get("content"),
        "user_id": memory.owner,
        "metadata": {**app, **memory.accesses, **metadata},
        "categories": list(memory.categories),
        "created_at": fields.get("created_at"),
        "updated_at": fields.get("updated_at"),
    }
    lifecycle = {key: str(fields[key]) for key in _LIFECYCLE if fields.get(key)}
    state = cast(State, fields.get("state") or "active")
    return RawItem("memory", source_id or position, data, position, vector, state, lifecycle)


def _check(memory: Memory, metadata: Any) -> Problem | None:
    if memory.owner is None:
        return Problem("not-mapped", f"its user `{memory.fields.get('user_id')}` is not in table `users`")
    if not isinstance(metadata, dict):
        return Problem("bad-json", "its metadata is no JSON object")
    state = memory.fields.get("state")
    if state is not None and state not in get_args(State):
        return Problem("bad-json", f"its state is `{str(state)[:40]}`, none of {', '.join(get_args(State))}")
    return None


def change_item(change: Change, position: str) -> RawItem | Refusal:
    """Make an item of a change of a state; who changed it is told by the external id."""
    fields = change.fields
    source_id = position if fields.get("id") is None else canonical_id(fields["id"])
    if not change.has_memory:
        problem = Problem("dangling", f"memory `{canonical_id(fields.get('memory_id'))}` is not there")
        return refuse(problem, "history", source_id, fields, position)
    data = {
        "table": "memory_status_history",
        "id": source_id,
        "memory_id": canonical_id(fields["memory_id"]),
        "user_id": change.owner,
        "changed_by": canonical_id(fields.get("changed_by")) if change.changer is None else change.changer,
        "old_state": fields.get("old_state"),
        "new_state": fields.get("new_state"),
        "changed_at": fields.get("changed_at"),
    }
    return RawItem("history", source_id, data, position)


def refuse(problem: Problem, kind: Kind, source_id: str, data: Mapping[str, Any], position: str) -> Refusal:
    """Refuse an item for what is wrong with it."""
    return Refusal(problem.reason, problem.detail, RawItem(kind, source_id, data, position))
