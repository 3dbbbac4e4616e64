"""
Which memories go to Zep: those of an export file, or of anything that yields records, of some users and conversations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from memharbor.errors import UsageError
from memharbor.migrate.record import Record, Refusal
from memharbor.migrate.sources.files import FileSource
from memharbor.migrate.targets.zep_mapping import impossible
from memharbor.migrate.transform import Choice, transform


class Chosen:
    """
    Memories to choose from.

    Args:
        source: An export file in any of Mem0's shapes, or a function that yields the records, each time it is called.
    """

    def __init__(self, source: Path | Callable[[], Iterable[Record]] | None) -> None:
        self._source = source

    @property
    def is_given(self) -> bool:
        """Whether there is a source."""
        return self._source is not None

    def records(
        self,
        users: Collection[str] = (),
        sessions: Collection[str] = (),
        *,
        on_refusal: Callable[[Refusal], None] | None = None,
    ) -> Iterator[Record]:
        """
        Read memories, streamed.

        Args:
            users: Only theirs; empty for everybody's.
            sessions: Only those with one of these as `run_id`; empty for all.
            on_refusal: Told of each item of a file that is no memory.

        Raises:
            UsageError: There is no source.
            SourceDataError: The file is no export.
        """
        if self._source is None:
            raise UsageError("there is nothing to migrate from", hint="pass `source`, an export file")
        made = self._read(self._source, users, on_refusal) if isinstance(self._source, Path) else self._source()
        for record in made:
            if (not users or record.user_id in users) and (not sessions or record.data.get("run_id") in sessions):
                yield record

    def count(self, users: Collection[str] = (), sessions: Collection[str] = ()) -> dict[str, Any]:
        """
        Count memories: those that Zep takes, `refused` ones, and `unreadable` items of a file by reason.

        Raises:
            UsageError: There is no source.
            SourceDataError: The file is no export.
        """
        unreadable: Counter[str] = Counter()
        counts = Counter(
            bool(impossible(record))
            for record in self.records(users, sessions, on_refusal=lambda one: unreadable.update([one.reason]))
        )
        return {"memories": counts[False], "refused": counts[True], "unreadable": dict(unreadable)}

    @staticmethod
    def _read(path: Path, users: Collection[str], on_refusal: Callable[[Refusal], None] | None) -> Iterator[Record]:
        source = FileSource(path)
        # What a file that we read ourselves says of its source makes the ids.
        name = source.describe().name
        choice = Choice(users=frozenset(users) if users else None, carry_vectors=False)
        for item in source.read():
            made = item if isinstance(item, Refusal) else transform(item, name, choice)
            if isinstance(made, Record):
                yield made
            elif isinstance(made, Refusal) and on_refusal is not None:
                on_refusal(made)
