"""
Say what a migration will take, before it is done.

From what the source says of itself, and from a sample that is read, transformed and judged for real.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from memharbor.migrate.embedding.model import Estimate, estimate
from memharbor.migrate.pipeline import Report
from memharbor.migrate.record import RawItem, Refusal, Source, SourceInfo
from memharbor.output import size_text

# An endpoint that embeds 2,048 texts a request answers about so many of them a second. Measured: docs/how-to/migrate.md.
_EMBEDDINGS_PER_SECOND = 100.0


class Sample:
    """
    The first items of a source, as a source.

    Args:
        source: The source.
        size: Items at most.
    """

    def __init__(self, source: Source, size: int) -> None:
        self._source, self._size = source, size

    def describe(self) -> SourceInfo:
        """Say what the source says."""
        return self._source.describe()

    def read(self, after: str | None = None) -> Iterator[RawItem | Refusal]:
        """Read the first items."""
        return islice(self._source.read(after), self._size)


@dataclass(frozen=True)
class MigrationPlan:
    """
    What a migration will take.

    Args:
        info: What the source says of itself.
        sample: What became of the sample.
        item_count: Items in all, as far as can be told.
        rows_per_second: At which the sample was read, transformed and judged.
        embedding: Of all texts that need one; `None` where none is made.
        text_count: How many those are.
    """

    info: SourceInfo
    sample: Report
    item_count: int
    rows_per_second: float
    embedding: Estimate | None
    text_count: int = 0

    @property
    def seconds(self) -> float:
        """How long it will take."""
        embedding = self.text_count / _EMBEDDINGS_PER_SECOND if self.embedding is not None else 0.0
        return self.item_count / max(self.rows_per_second, 1.0) + embedding

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        share = self.sample.counts["refused"] / max(self.sample.counts["read"], 1)
        return {
            "source": self.info.name,
            "items": self.item_count,
            "counts": dict(self.info.counts),
            "size_bytes": self.info.size_bytes,
            "dims": self.info.dims,
            "sample": self.sample.as_data(),
            "expected_refusals": round(share * self.item_count),
            "rows_per_second": round(self.rows_per_second),
            "minutes": round(self.seconds / 60, 1),
            "embedding": None
            if self.embedding is None
            else {"texts": self.text_count, "tokens": self.embedding.tokens, "usd": self.embedding.usd},
        }

    def text(self) -> str:
        """Describe it for people."""
        data = self.as_data()
        counts = (
            ", ".join(f"{count:,} of kind {kind}" for kind, count in self.info.counts.items())
            or f"about {self.item_count:,} items"
        )
        size = "" if self.info.size_bytes is None else f", {size_text(self.info.size_bytes)}"
        lines = [f"source {self.info.name}: {counts}{size}"]
        lines.append(f"embeddings: {self.info.dims} dimensions there" if self.info.dims else "embeddings: none there")
        words = ("inserted", "updated", "same", "skipped", "not_chosen", "refused")
        became = ", ".join(f"{self.sample.counts[word]:,} {word.replace('_', ' ')}" for word in words)
        lines.append(f"of a sample of {self.sample.counts['read']:,}: {became}")
        lines += [f"refused as {reason}: {count:,}" for reason, count in sorted(self.sample.reasons.items())]
        lines.append(f"about {data['minutes']} minutes, at {data['rows_per_second']:,} rows a second")
        if self.embedding is not None:
            price = "" if self.embedding.usd is None else f", about {self.embedding.usd:.2f} USD"
            lines.append(f"to embed: {self.text_count:,} texts, about {self.embedding.tokens:,} tokens{price}")
        return "\n".join(lines)


def reckon_items(info: SourceInfo, sample_bytes: int, sample_count: int, size: int) -> int:
    """
    Say how many items there are, where the source knows; else reckon by its size.

    Args:
        info: What the source says of itself.
        sample_bytes: What the items of the sample take as JSON.
        sample_count: Items of the sample.
        size: Items that the sample was to have.

    >>> reckon_items(SourceInfo("file", "x", size_bytes=10_000), 500, 5, 5)
    100
    """
    if info.counts or sample_count < size or not info.size_bytes or not sample_bytes:
        return max(sum(info.counts.values()), sample_count)
    return round(info.size_bytes * sample_count / sample_bytes)


def make_plan(
    info: SourceInfo, report: Report, texts: Sequence[str], begun_at: float, model: str | None, item_count: int
) -> MigrationPlan:
    """
    Put a plan together from a sample.

    Args:
        info: What the source says of itself.
        report: What became of the sample.
        texts: Those of the sample that need an embedding.
        begun_at: When the sample was begun, by the monotonic clock.
        model: Which embeds; `None` for none.
        item_count: Items in all, as far as can be told.
    """
    read = max(report.counts["read"], 1)
    total = max(item_count, read)
    seconds = max(time.monotonic() - begun_at, 1e-6)
    needed = round(total * len(texts) / read)
    embedding = estimate(texts, model, text_count=needed) if model is not None and texts else None
    count = needed if embedding is not None else 0
    return MigrationPlan(info, report, total, read / seconds, embedding, count)
