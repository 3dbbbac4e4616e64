"""
Say what a migration will take, before it is done. Pure.

From what the source says of itself, and from its first items, which `memharbor.migrate.sampling` took through every step:
what a step needed for one of them is reckoned for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from memharbor.migrate.embedding.endpoint import INPUTS_MAX
from memharbor.migrate.embedding.model import Estimate, estimate_cost, find_model
from memharbor.migrate.opening import OPENAI_URL, EmbeddingSpec
from memharbor.migrate.pipeline import Report
from memharbor.migrate.record import SourceInfo
from memharbor.migrate.runs import RunSettings
from memharbor.migrate.sampling import PROBE_TEXTS, Sample, Texts, Tried
from memharbor.output import age_text, size_text

# The sizes of the seeds' table "Estimated Durations".
SEED_SIZES = (1_000, 10_000, 100_000, 1_000_000)
# What OpenAI lets a new account embed, with each of its models. It may answer slower; nobody measured that here.
# Source: github.com/openai/openai-cookbook, examples/data/oai_docs/tier-one.txt, "Tier 1 rate limits".
OPENAI_TOKENS_A_MINUTE = 1_000_000

TimedBy = Literal["measured", "limits", "unknown", "nothing"]
_EMBED_NOTES: Mapping[TimedBy, str] = {
    "measured": f"embeddings: timed on up to {PROBE_TEXTS} texts with the model of this machine",
    "limits": "embeddings: no less than that, by the limits alone; a plan sends nothing to an endpoint",
    "unknown": "embeddings: their time is not known and not in the total; a plan sends nothing to an endpoint",
    "nothing": "",
}
_COLUMNS = {"read": "export", "transform": "transform", "embed": "embeddings", "load": "import", "verify": "verify"}


@dataclass(frozen=True)
class StepTime:
    """
    What a step needs.

    Args:
        item_seconds: For one item.
        start_seconds: Once, however many there are.
    """

    item_seconds: float
    start_seconds: float = 0.0

    def seconds(self, count: int) -> float:
        """
        Reckon it for some items.

        >>> StepTime(0.5, start_seconds=2).seconds(10)
        7.0
        """
        return self.start_seconds + self.item_seconds * count


@dataclass(frozen=True)
class Timeline:
    """
    What each step needs, by its name.

    Args:
        steps: `read`, `transform`, `embed`, `load` and `verify`; `None` for one of which nobody knows.
        max_rate: Items a second at most; 0 for no limit.
    """

    steps: Mapping[str, StepTime | None]
    max_rate: float = 0

    def row(self, count: int) -> dict[str, Any]:
        """
        Reckon it for some items: seconds by step, and in all. What `--max-rate` waits is a part of the load.

        >>> steps = {"read": StepTime(1), "transform": StepTime(0.5, 2), "embed": None, "load": StepTime(1)}
        >>> Timeline(steps).row(10)["total_seconds"]
        27.0
        >>> Timeline(steps, max_rate=0.1).row(10)["load_seconds"]
        93.0
        """
        seconds = {name: None if step is None else step.seconds(count) for name, step in self.steps.items()}
        if self.max_rate:
            paced = sum(seconds.get(name) or 0.0 for name in ("transform", "embed", "load"))
            seconds["load"] = (seconds["load"] or 0.0) + max(0.0, count / self.max_rate - paced)
        rounded = {f"{name}_seconds": None if each is None else round(each, 3) for name, each in seconds.items()}
        return {"items": count, **rounded, "total_seconds": round(sum(each or 0.0 for each in rounded.values()), 3)}


@dataclass(frozen=True)
class MigrationPlan:
    """
    What a migration will take.

    Args:
        info: What the source says of itself.
        sample: What became of the sample.
        item_count: Items in all.
        is_counted: Whether these are all; else nobody knows how many there are beyond the sample.
        text_count: Texts that need an embedding, in all.
        embedding: What embedding them takes; `None` where no model is named.
        timeline: What each step needs.
        timed_by: Where the time for embeddings is from.
    """

    info: SourceInfo
    sample: Report
    item_count: int
    is_counted: bool
    text_count: int
    embedding: Estimate | None
    timeline: Timeline
    timed_by: TimedBy

    @property
    def expected_reasons(self) -> dict[str, int]:
        """Refusals to expect, by reason: as many of all items as there are in the sample."""
        read = max(self.sample.counts["read"], 1)
        return {reason: round(count * self.item_count / read) for reason, count in sorted(self.sample.reasons.items())}

    def rows(self) -> list[dict[str, Any]]:
        """Reckon the timeline: first for what is there, then for the seeds' sizes, as if there were so many like it."""
        sizes = [size for size in SEED_SIZES if size != self.item_count] if self.sample.counts["read"] else []
        return [self.timeline.row(count) for count in (self.item_count, *sizes)]

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        timeline = self.rows()
        others = (step for name, step in self.timeline.steps.items() if name != "embed" and step is not None)
        item_seconds = sum(step.item_seconds for step in others)
        embedding = None
        if self.embedding is not None:
            embedding = {
                "texts": self.text_count,
                "tokens": self.embedding.tokens,
                "usd": self.embedding.usd,
                "price_source": self.embedding.price_source,
                "timed_by": self.timed_by,
            }
        return {
            "source": self.info.name,
            "items": self.item_count,
            "items_are_counted": self.is_counted,
            "counts": dict(self.info.counts),
            "size_bytes": self.info.size_bytes,
            "dims": self.info.dims,
            "sample": self.sample.as_data(),
            "expected_refusals": sum(self.expected_reasons.values()),
            "expected_reasons": self.expected_reasons,
            "rows_per_second": round(1 / item_seconds) if item_seconds else None,
            "minutes": round(timeline[0]["total_seconds"] / 60, 1),
            "timeline": timeline,
            "without_embedding": self.text_count,
            "embedding": embedding,
        }

    def text(self) -> str:
        """Describe it for people."""
        kinds = ", ".join(f"{count:,} of kind {kind}" for kind, count in self.info.counts.items())
        counts = f"{self.item_count:,} items" if self.is_counted else f"at least {self.item_count:,} items"
        size = "" if self.info.size_bytes is None else f", {size_text(self.info.size_bytes)}"
        lines = [f"source {self.info.name}: {counts}{f' ({kinds})' if kinds else ''}{size}"]
        lines.append(f"embeddings: {self.info.dims} dimensions there" if self.info.dims else "embeddings: none there")
        words = ("inserted", "updated", "same", "skipped", "not_chosen", "refused")
        became = ", ".join(f"{self.sample.counts[word]:,} {word.replace('_', ' ')}" for word in words)
        lines.append(f"of a sample of {self.sample.counts['read']:,}: {became}")
        for reason, count in self.expected_reasons.items():
            lines.append(f"refused as {reason}: {self.sample.reasons[reason]:,}, of all about {count:,}")
        if self.embedding is not None:
            price = _price_text(self.embedding.usd)
            lines.append(f"to embed: {self.text_count:,} texts, about {self.embedding.tokens:,} tokens{price}")
        elif self.text_count:
            lines.append(f"without an embedding: {self.text_count:,}; name a `--model`, or Mem0 does not meet them")
        table = ["", *self._table(), _EMBED_NOTES[self.timed_by]]
        return "\n".join([*lines, *table]).rstrip()

    def _table(self) -> list[str]:
        """Draw the timeline with the columns of the seeds' table, and the step that they do not have."""
        at_least = "≥ " if self.timed_by in ("limits", "unknown") else ""
        cells = [["items", *_COLUMNS.values(), "total"]]
        for row in self.rows():
            seconds = [_seconds_text(row[f"{name}_seconds"]) for name in _COLUMNS]
            if self.timed_by == "limits":
                seconds[2] = at_least + seconds[2]
            cells.append([f"{row['items']:,}", *seconds, at_least + _seconds_text(row["total_seconds"])])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def _price_text(usd: float | None) -> str:
    if usd is None:
        return ""
    return f", about {usd:.2f} USD" if usd >= 0.01 else ", less than 0.01 USD"


def _seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    return age_text(seconds) if seconds >= 1 else "< 1 s"


def make_plan(
    info: SourceInfo, sample: Sample, tried: Tried, settings: RunSettings, model_seconds: float | None
) -> MigrationPlan:
    """
    Put a plan together from a sample.

    Args:
        info: What the source says of itself.
        sample: Its items, and how many there are.
        tried: What became of it.
        settings: Of the run.
        model_seconds: That a model of this machine needs for a text; `None` for another model, or none.
    """
    read = tried.report.counts["read"]
    # What was read to its end is counted, whatever it said.
    total = sample.count if sample.is_at_end else max(sum(info.counts.values()), sample.count)
    share = total / read if read else 0.0
    spec, texts = settings.embedding, tried.texts
    text_seconds, timed_by = _embedding_time(spec, texts, settings.batch_size, model_seconds)
    timeline = Timeline(
        _step_times(tried, sample, None if text_seconds is None else text_seconds * texts.count), settings.max_rate
    )
    embedding = None if spec is None else estimate_cost(texts.tokens * share, spec.model)
    is_counted = sample.is_at_end or bool(info.counts)
    text_count = round(texts.count * share)
    return MigrationPlan(info, tried.report, total, is_counted, text_count, embedding, timeline, timed_by)


def _step_times(tried: Tried, sample: Sample, embed_seconds: float | None) -> dict[str, StepTime | None]:
    """Say what each step needs for one item; the source's own time is that of all items that it was asked for."""
    read = max(tried.report.counts["read"], 1)
    written = max(0.0, tried.seconds["read"] - tried.read_seconds) / read
    embedded = None if embed_seconds is None else StepTime((tried.seconds["embed"] + embed_seconds) / read)
    return {
        "read": StepTime(sample.seconds / max(sample.count, 1) + written),
        "transform": StepTime(max(0.0, tried.seconds["transform"] - tried.start_seconds) / read, tried.start_seconds),
        "embed": embedded,
        "load": StepTime(tried.seconds["load"] / read),
        "verify": StepTime(tried.seconds["verify"] / read),
    }


def _embedding_time(
    spec: EmbeddingSpec | None, texts: Texts, batch_size: int, model_seconds: float | None
) -> tuple[float | None, TimedBy]:
    """
    Say what a text needs, and how that is known. Of an endpoint, what its limits and the given pace leave no way around.

    >>> spec, texts = EmbeddingSpec("text-embedding-3-small", 1536), Texts(10, 1_000.0)
    >>> _embedding_time(spec, texts, 1000, None)
    (0.006, 'limits')
    """
    if spec is None or not texts.count:
        return 0.0, "nothing"
    if model_seconds is not None:
        return model_seconds, "measured"
    limits: list[float] = []
    if spec.url == OPENAI_URL and find_model(spec.model) is not None:
        limits.append(texts.tokens / texts.count * 60 / OPENAI_TOKENS_A_MINUTE)
    if spec.max_rate:
        limits.append(1 / (spec.max_rate * min(batch_size, INPUTS_MAX)))
    return (max(limits), "limits") if limits else (None, "unknown")
