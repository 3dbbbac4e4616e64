"""
Take the first items of a source through every step of a migration, for real, and time each; nothing remains of it.

Nothing is sent to an embedding endpoint: only a model of this machine is timed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from memharbor.migrate.embedding.local import HASH_MODEL
from memharbor.migrate.embedding.model import Embedder, estimate_tokens
from memharbor.migrate.opening import EmbeddingSpec, open_embedder
from memharbor.migrate.pipeline import Pipeline, Report, Step
from memharbor.migrate.record import RawItem, Refusal, Source, SourceInfo
from memharbor.migrate.runs import Run, read_texts
from memharbor.migrate.workfolder import WorkFolder
from memharbor.output import Output

# Texts on which a model of this machine is timed.
PROBE_TEXTS = 64


class Sample:
    """
    The first items of a source, as a source; and after them, how many more there are.

    Args:
        source: The source.
        size: Items at most.
    """

    def __init__(self, source: Source, size: int) -> None:
        self._source, self._size = source, size
        self._items: Iterator[RawItem | Refusal] = iter(())
        self.count, self.seconds, self.is_at_end = 0, 0.0, False

    def describe(self) -> SourceInfo:
        """Say what the source says."""
        return self._source.describe()

    def read(self, after: str | None = None) -> Iterator[RawItem | Refusal]:
        """Read the first items; the time that the source takes for them is added up."""
        self._items = self._timed(self._source.read(after))
        return islice(self._items, self._size)

    def count_rest(self) -> None:
        """Read what comes behind the first items, and only count it."""
        deque(self._items, maxlen=0)

    def _timed(self, items: Iterator[RawItem | Refusal]) -> Iterator[RawItem | Refusal]:
        while True:
            begun_at = time.monotonic()
            item = next(items, None)
            self.seconds += time.monotonic() - begun_at
            if item is None:
                self.is_at_end = True
                return
            self.count += 1
            yield item


@dataclass
class Texts:
    """Texts that need an embedding: how many, of how many tokens, and a few of them."""

    count: int = 0
    tokens: float = 0.0
    some: dict[str, None] = field(default_factory=dict)

    def add(self, text: str) -> None:
        """Count one in."""
        self.count += 1
        self.tokens += max(1.0, estimate_tokens(text))
        if len(self.some) < PROBE_TEXTS:
            self.some[text] = None


@dataclass(frozen=True)
class Tried:
    """
    What became of a sample.

    Args:
        report: Its items by what became of them.
        texts: Those that need an embedding.
        seconds: That each step took.
        start_seconds: Of them, what `transform` took to note the texts that the target has.
        read_seconds: That the source took for the items of the sample alone.
    """

    report: Report
    texts: Texts
    seconds: Mapping[str, float]
    start_seconds: float
    read_seconds: float


class _Silent(Output):
    """Says nothing: the steps of a sample are one for who waits."""

    def note(self, text: str) -> None:
        """Say nothing."""


def try_sample(opened: Run, folder: WorkFolder, sample: Sample) -> Tried:
    """
    Take a sample through every step, one after the other; what is loaded is rolled back.

    Args:
        opened: The run that the sample is of.
        folder: Where its segments are put.
        sample: Its items.
    """
    # Waiting is reckoned, not done.
    pipeline = Pipeline(folder, replace(opened.pipeline.plan, source=sample, max_rate=0), _Silent("json"))
    start_seconds = 0.0

    def target_texts() -> Iterator[Any]:
        nonlocal start_seconds
        begun_at = time.monotonic()
        yield from read_texts(opened.connection)
        start_seconds = time.monotonic() - begun_at

    seconds: dict[str, float] = {}
    steps: tuple[Step, ...] = ("read", "transform", "embed", "load")
    for step in steps:
        begun_at = time.monotonic()
        pipeline.run(step, opened.loader, target_texts, dry_run=True)
        seconds[step] = time.monotonic() - begun_at
    texts, begun_at = Texts(), time.monotonic()
    for number in folder.segments("loaded"):
        records = pipeline.records(number)
        deque(opened.loader.judge(records), maxlen=0)
        for record in records:
            if record.embedding is None and record.text:
                texts.add(record.text)
    seconds["verify"] = time.monotonic() - begun_at
    return Tried(pipeline.report(), texts, seconds, start_seconds, sample.seconds)


def time_local_model(spec: EmbeddingSpec | None, texts: Iterable[str], folder: Path) -> float | None:
    """
    Time a model of this machine, by what it needs for one text; `None` for any other.

    Args:
        spec: Which model.
        texts: That it embeds.
        folder: For its embeddings, which are made anew, whatever is kept of them.

    Raises:
        ConfigError: The library or the model is not there.
        EmbeddingError: The model does not do what it says.
    """
    wanted = list(texts)
    if spec is None or not wanted or not (spec.is_local or spec.model == HASH_MODEL):
        return None
    with open_embedder(replace(spec, cache=str(folder))) as embedder:
        embedder.embed(["memory"])  # whatever a model does once
        return _seconds_a_text(embedder, wanted)


def _seconds_a_text(embedder: Embedder, texts: Sequence[str]) -> float:
    begun_at = time.monotonic()
    embedder.embed(texts)
    return (time.monotonic() - begun_at) / len(texts)
