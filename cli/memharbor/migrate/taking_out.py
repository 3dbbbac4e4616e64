"""
Take memories out of a database: to a file, to the Mem0 Platform, or to Zep Cloud.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from memharbor.errors import ConfigError, UsageError
from memharbor.migrate.http import HttpClient
from memharbor.migrate.key import find_key
from memharbor.migrate.opening import PLATFORM_KEY_VARIABLE, PLATFORM_URL
from memharbor.migrate.reading import count_memories, read_memories
from memharbor.migrate.targets.files import Shape, write_file
from memharbor.migrate.targets.platform import Outcome, PlatformTarget
from memharbor.output import Output
from memharbor.target import Target

# Refused and changed records are named in the report, so many at most.
_NAMED_MAX = 1000


def count(target: Target, users: Sequence[str]) -> int:
    """Count the memories that would be taken out."""
    with closing(target.connect(autocommit=True)) as connection:
        return count_memories(connection, users)


def to_file(
    target: Target, users: Sequence[str], path: str | None, shape: Shape, output: Output, *, replace: bool
) -> dict[str, Any]:
    """
    Take memories out to a file.

    Returns:
        Its manifest, as `memharbor.migrate.targets.files.write_file` gives it.

    Raises:
        UsageError: No file is named.
        StateRefusedError: There is one.
    """
    if path is None:
        raise UsageError("no file is named", hint="pass `--output-file memories.jsonl.gz`")
    with closing(target.connect(autocommit=True)) as connection, output.step(f"Write {path}"):
        records = read_memories(connection, users, vectors=shape == "jsonl")
        return write_file(records, Path(path), shape, replace=replace)


def to_platform(target: Target, users: Sequence[str], url: str | None, output: Output) -> dict[str, Any]:
    """
    Take memories out to the Mem0 Platform; what is there already is not written again.

    Returns:
        `counts` by `inserted`, `same`, `changed` and `refused`; `named`: those that were changed or refused, and why.

    Raises:
        ConfigError: The key is not given, or refused.
        ConnectError: The service cannot be reached; the same call goes on.
    """
    key = find_key(PLATFORM_KEY_VARIABLE, os.environ)
    if key is None:
        raise ConfigError(
            "the key of the Mem0 Platform is not given",
            hint=f"export {PLATFORM_KEY_VARIABLE}=…, so that it is on no command line",
        )
    counts: Counter[str] = Counter(inserted=0, same=0, changed=0, refused=0)
    named: list[dict[str, str]] = []
    with (
        closing(target.connect(autocommit=True)) as connection,
        HttpClient(url or PLATFORM_URL, key=key, key_variable=PLATFORM_KEY_VARIABLE) as http,
        output.step("Write to the Mem0 Platform"),
        output.percent() as on_percent,
    ):
        total = count_memories(connection, users)
        records = read_memories(connection, users, vectors=False)
        for outcome in PlatformTarget(http, target.name).write(records):
            counts[outcome.word] += 1
            on_percent(100 * counts.total() / max(total, 1))
            if outcome.word in ("changed", "refused") and len(named) < _NAMED_MAX:
                named.append({"id": outcome.record_id, "what": outcome.word, "detail": outcome.detail})
    return {"counts": dict(counts), "named": named}


def to_zep(
    target: Target,
    users: Sequence[str],
    state_folder: Path,
    output: Output,
    *,
    url: str | None,
    mapping: str | None,
    threads: bool,
    check: bool,
) -> tuple[dict[str, Any], str]:
    """
    Take memories out to Zep Cloud; what is there already is not written again.

    Args:
        target: The database.
        users: Only theirs; empty for everybody's.
        state_folder: Where it is noted what is there.
        output: Where progress is said.
        url: Of the service, where it is not the usual one.
        mapping: A file of roles, memory types and metadata; the default without it.
        threads: Whether turns of conversations become messages of threads.
        check: Whether what is there is counted afterwards.

    Returns:
        The report, with `validation`, which is `None` without `check`; and both for people.

    Raises:
        ConfigError: The key is not given, or refused; or the mapping is wrong.
        ConnectError: The service cannot be reached; the same call goes on.
    """
    from memharbor.migrate.targets.zep_client import connect
    from memharbor.migrate.targets.zep_migrator import Mem0ToZepMigrator
    from memharbor.migrate.targets.zep_validation import report_text

    with closing(target.connect(autocommit=True)) as connection, connect(os.environ, url) as http:
        state_folder.mkdir(parents=True, exist_ok=True)
        migrator = Mem0ToZepMigrator(
            http,
            state_folder,
            lambda: read_memories(connection, users, vectors=False),
            mapping=Path(mapping) if mapping else None,
            threads=threads,
        )
        total, done = max(count_memories(connection, users), 1), 0
        with output.step("Write to Zep Cloud"), output.percent() as on_percent:

            def tell(_: Outcome) -> None:
                nonlocal done
                done += 1
                on_percent(100 * done / total)

            report = migrator.migrate_all(on_outcome=tell)
        text = ", ".join(f"{report[word]:,} {word}" for word in ("inserted", "same", "changed", "refused"))
        found = None
        if check:
            with output.step("Count what is there"):
                found = migrator.validate()
            text += f"\n{report_text(found)}"
    return {**report, "validation": found}, text
