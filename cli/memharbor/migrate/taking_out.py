"""
Take memories out of a database: to a file, to a SQLite file, to the Mem0 Platform, or to Zep Cloud.

To Zep Cloud they may come from an export file as well.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memharbor.errors import UsageError
from memharbor.migrate.opening import open_platform
from memharbor.migrate.reading import count_memories, one_snapshot, read_changes, read_memories, read_users
from memharbor.migrate.record import Record
from memharbor.migrate.remapping import read_remap
from memharbor.migrate.targets.files import Shape, write_file
from memharbor.migrate.targets.platform import Outcome, PlatformTarget
from memharbor.migrate.targets.platform_review import review_file
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


def to_sqlite(
    target: Target,
    users: Sequence[str],
    path: str | None,
    output: Output,
    *,
    map_users: str | None,
    replace: bool,
    dry_run: bool = False,
) -> tuple[dict[str, Any], str]:
    """
    Take memories and their changes out to a SQLite file with ChatSG's tables.

    Args:
        target: The database.
        users: Only theirs; empty for everybody's.
        path: The file.
        output: Where progress is said.
        map_users: A file of numbers and users; without it, users are numbered.
        replace: Whether a file that is there may be replaced.
        dry_run: Only look whether it can be done.

    Returns:
        The report, as `memharbor.migrate.targets.sqlite.write_sqlite` gives it, and the same for people; of a dry run, how
        many `memories` and `users` there are.

    Raises:
        UsageError: No file is named, or its folder is not there.
        StateRefusedError: There is such a file.
        SourceDataError: A user is not in the file of numbers, or it is none.
    """
    from memharbor.migrate.targets import sqlite

    if path is None:
        raise UsageError("no file is named", hint="pass `--output-file chatsg.db`")
    sqlite.refuse_unwritable(Path(path), replace=replace)
    numbers = sqlite.number_users(read_remap(Path(map_users))) if map_users else None
    with closing(target.connect(autocommit=True)) as connection, one_snapshot(connection):
        total = count_memories(connection, users)
        with closing(read_users(connection, users)) as names:
            if dry_run:
                found = 0
                for name in names:
                    sqlite.number_of(name, numbers)
                    found += 1
                said = f"would take out {total:,} memories of {found:,} users"
                return {"dry_run": True, "memories": total, "users": found}, said
            with (
                closing(read_memories(connection, users, always_dated=True)) as memories,
                closing(read_changes(connection, users)) as changes,
                output.step(f"Write {path}"),
                output.percent() as on_percent,
            ):
                told = _telling(memories, lambda done: on_percent(100 * done / max(total, 1)))
                report = sqlite.write_sqlite(names, told, changes, Path(path), numbers=numbers, replace=replace)
    return report, _sqlite_text(report, path)


def _telling(records: Iterable[Record], tell: Callable[[int], None]) -> Iterator[Record]:
    for done, record in enumerate(records, 1):
        yield record
        tell(done)


def _sqlite_text(report: Mapping[str, Any], path: str) -> str:
    lines = [
        f"{report['memories']:,} memories of {report['users']:,} users and {report['changes']:,} changes in {path}"
    ]
    if report["beside"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report["beside"].items())
        lines.append(f"beside ChatSG's tables, in `memharbor_memories`: {reasons}")
    if report["expiring"]:
        lines.append(f"{report['expiring']:,} of them expire one day, which ChatSG does not know")
    again = f"memharbor migrate run --from sqlite --input {shlex.quote(path)} --users-from username --keep-duplicates"
    return "\n".join([*lines, f"they come in again with `{again}`"])


def to_platform(
    target: Target,
    users: Sequence[str],
    url: str | None,
    output: Output,
    *,
    review: str | None = None,
    replace: bool = False,
) -> tuple[dict[str, Any], str]:
    """
    Take memories out to the Mem0 Platform; what is there already is not written again.

    Args:
        target: The database.
        users: Only theirs; empty for everybody's.
        url: Of the service, where it is not the usual one.
        output: Where progress is said.
        review: A file for the memories that are there with other contents; `None` for none.
        replace: Whether one that is there may be replaced.

    Returns:
        `counts` by `inserted`, `same`, `changed` and `refused`; `named`: those that were changed or refused, and why;
        `review`: the file; and all of it for people.

    Raises:
        ConfigError: The key is not given, or refused.
        ConnectError: The service cannot be reached; the same call goes on, and no file for review was written.
        StateRefusedError: There is a file for review.
    """
    counts: Counter[str] = Counter(inserted=0, same=0, changed=0, refused=0)
    named: list[dict[str, str]] = []
    with (
        nullcontext() if review is None else review_file(Path(review), replace=replace) as on_review,
        closing(target.connect(autocommit=True)) as connection,
        open_platform(url) as http,
        output.step("Write to the Mem0 Platform"),
        output.percent() as on_percent,
    ):
        total = count_memories(connection, users)
        records = read_memories(connection, users, vectors=False)
        for outcome in PlatformTarget(http, on_review=on_review).write(records):
            counts[outcome.word] += 1
            on_percent(100 * counts.total() / max(total, 1))
            if outcome.word in ("changed", "refused") and len(named) < _NAMED_MAX:
                named.append({"id": outcome.record_id, "what": outcome.word, "detail": outcome.detail})
    text = ", ".join(f"{number:,} {word}" for word, number in counts.items())
    if review is not None:
        text += f"\nthe {counts['changed']:,} that are there with other contents are in {review}"
    return {"counts": dict(counts), "named": named, "review": review}, text


@dataclass(frozen=True)
class ToZep:
    """
    What is taken out to Zep Cloud, and how.

    Args:
        users: Only theirs; empty for everybody's.
        sessions: Only what was said in these; empty for everything.
        url: Of the service, where it is not the usual one.
        mapping: A file of roles, memory types and metadata; the default without it.
        threads: Whether turns of conversations become messages of threads.
        check: Whether what is there is compared afterwards.
        is_only_checked: Whether it is compared, and nothing is written.
    """

    users: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    url: str | None = None
    mapping: str | None = None
    threads: bool = False
    check: bool = False
    is_only_checked: bool = False


def count_for_zep(source: Target | Path, choice: ToZep) -> dict[str, Any]:
    """
    Count what would be taken out to Zep Cloud; the service is not asked.

    Args:
        source: The database, or an export file.
        choice: What is taken out of it.

    Returns:
        `memories` that Zep takes; `refused` ones, that it does not; `unreadable` items of a file by reason.

    Raises:
        SourceDataError: The file is no export.
    """
    from memharbor.migrate.targets.zep_choosing import Chosen

    with _readable(source, choice.users) as records:
        return Chosen(records).count(choice.users, choice.sessions)


def to_zep(source: Target | Path, choice: ToZep, state_folder: Path, output: Output) -> tuple[dict[str, Any], str]:
    """
    Take memories out to Zep Cloud; what is there already is not written again.

    Args:
        source: The database, or an export file.
        choice: What is taken out of it, and how.
        state_folder: Where it is noted what is there; not touched where it is only checked.
        output: Where progress is said.

    Returns:
        The report, with `validation`, which is `None` without a check; and both for people.

    Raises:
        ConfigError: The key is not given, or refused; or the mapping is wrong.
        ConnectError: The service cannot be reached; the same call goes on.
        SourceDataError: The file is no export.
    """
    from memharbor.migrate.targets.zep_client import connect
    from memharbor.migrate.targets.zep_migrator import Mem0ToZepMigrator
    from memharbor.migrate.targets.zep_validation import report_text

    report: dict[str, Any] = {}
    lines = []
    with _readable(source, choice.users) as records, connect(os.environ, choice.url) as http:
        mapping = Path(choice.mapping) if choice.mapping else None
        migrator = Mem0ToZepMigrator(http, state_folder, records, mapping=mapping, threads=choice.threads)
        if not choice.is_only_checked:
            total, done = 0 if isinstance(source, Path) or choice.sessions else count(source, choice.users), 0
            with output.step("Write to Zep Cloud"), output.percent() as on_percent:

                def tell(_: Outcome) -> None:
                    nonlocal done
                    done += 1
                    on_percent(min(100.0, 100 * done / total) if total else 0.0)

                report = migrator.migrate_all(choice.users, tell, sessions=choice.sessions)
            lines.append(", ".join(f"{report[word]:,} {word}" for word in ("inserted", "same", "changed", "refused")))
            lines += [f"{number:,} unreadable: {reason}" for reason, number in report["unreadable"].items()]
        found = None
        if choice.check or choice.is_only_checked:
            with output.step("Compare what is there"):
                found = migrator.validate(choice.users, sessions=choice.sessions)
            lines.append(report_text(found))
    return {**report, "validation": found}, "\n".join(lines)


@contextmanager
def _readable(source: Target | Path, users: Sequence[str]) -> Iterator[Path | Callable[[], Iterator[Record]]]:
    """Lend an export file as it is, and a database as what reads it."""
    if isinstance(source, Path):
        yield source
        return
    with closing(source.connect(autocommit=True)) as connection:
        yield lambda: read_memories(connection, users, vectors=False)
