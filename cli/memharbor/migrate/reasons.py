"""
Why an item is refused: every reason that a dead letter can have. Pure; the table in the docs is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping

REASONS: Mapping[str, str] = {
    "no-id": "it has no id, and nothing else in the source tells it from others",
    "duplicate-id": "another item of the same run has its id and says something else",
    "no-owner": "it has none of `user_id`, `agent_id` and `run_id`, or only empty ones",
    "no-text": "it has no text",
    "text-too-long": "its text is larger than 1 MiB, or has more words than PostgreSQL's text search takes",
    "wrong-dims": "its embedding does not have the number of dimensions of the schema",
    "bad-vector": "its embedding has a value that is not a finite float32, or none but zeros",
    "bad-time": "one of its instants is none, or lies outside the years 1970 to 2200",
    "bad-text": "a text in it has a NUL character or half of a surrogate pair, which PostgreSQL cannot store",
    "bad-json": "it is no JSON object, or one of its fields has the wrong type",
    "bad-number": "a number in it is not finite, or larger than PostgreSQL's jsonb takes",
    "not-mapped": "its owner is not in the file of `--remap-users`, or in no table that names users",
    "erased-user": "its user was erased here",
    "dangling": "the memory that it belongs to is not there",
    "rejected": "the target did not take it; the detail has its words",
}
