"""
Where the embeddings of OpenMemory's memories are: its database has none, and its vector store has them under the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from memharbor.migrate.sources.json_values import Problem


class Vectors(Protocol):
    """Embeddings that are open."""

    def find_many(self, ids: Sequence[str]) -> Mapping[str, Sequence[float] | Problem]:
        """Find embeddings by their ids, spelled as `canonical_id` does; what has none is not among them."""


class VectorStore(Protocol):
    """A place that embeddings are read from."""

    def describe(self) -> tuple[str, int | None]:
        """
        Say which place it is and what it held, without secrets; and the dimensions, where it can tell.

        Raises:
            SourceDataError: It is not what it was said to be.
            ConnectError: It cannot be reached.
        """

    def lend(self) -> AbstractContextManager[Vectors]:
        """
        Lend the embeddings.

        Raises:
            SourceDataError: It cannot be read.
            ConnectError: It cannot be reached.
        """
