"""Memories for tests of Zep as a target: made, written to a loopback server, and compared with it."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memharbor.migrate.record import Record
from memharbor.migrate.targets.platform import Outcome
from memharbor.migrate.targets.zep import ZepTarget
from memharbor.migrate.targets.zep_validation import validate
from tests.zep_server import ZepServer, client


def record(number: int, text: str | None = None, **data: Any) -> Record:
    payload = {
        "data": text or f"fact {number}",
        "hash": "0123",
        "text_lemmatized": "fact",
        "created_at": f"2025-03-01T08:{number % 60:02}:00.5+01:00",
        "user_id": f"u{number % 3}",
        **data,
    }
    return Record("memory", uuid.UUID(int=number + 1), str(number), payload)


def turn(number: int, **data: Any) -> Record:
    role = "patient" if number % 2 == 0 else "assistant"
    return record(number, **{"run_id": "talk", "user_id": "alice", "role": role, **data})


def write(server: ZepServer, folder: Path, records: Iterable[Record], **options: Any) -> list[Outcome]:
    with client(server) as http:
        return list(ZepTarget(http, folder, **options).write(records))


def words(outcomes: Iterable[Outcome]) -> Counter[str]:
    return Counter(outcome.word for outcome in outcomes)


def checked(server: ZepServer, folder: Path, records: Iterable[Record], **options: Any) -> dict[str, Any]:
    with client(server) as http:
        return validate(ZepTarget(http, folder, **options), records)
