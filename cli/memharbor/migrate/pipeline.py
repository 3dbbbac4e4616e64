"""
Run a migration: read, transform, embed, load, verify; segment by segment, each step reading what the one before wrote.

Nothing is held longer than a segment. What is done is what the work folder has (`memharbor.migrate.workfolder`), so that
a run that was killed goes on, and a step that is called by itself does what is there to do.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import Any, Literal

from memharbor.errors import StateRefusedError, VerificationError
from memharbor.migrate.embedding.model import Embedder, EmbeddingRefusal
from memharbor.migrate.load import Loader
from memharbor.migrate.record import (
    RawItem,
    Record,
    Refusal,
    Source,
    SourceInfo,
    item_as_data,
    item_from_data,
    pack_vector,
    record_as_data,
    record_from_data,
    text_of,
)
from memharbor.migrate.seen import Seen
from memharbor.migrate.transform import Choice, transform
from memharbor.migrate.workfolder import STEPS, WorkFolder, refusal_as_data
from memharbor.output import Output

Step = Literal["read", "transform", "embed", "load", "verify"]
STEP_ORDER: tuple[Step, ...] = ("read", "transform", "embed", "load", "verify")
_LEFT_OUT = {"same-id": "the same item again", "same-text": "the same text of the same owner"}


@dataclass(frozen=True)
class Plan:
    """
    What a run is made of.

    Args:
        source: Where items come from.
        info: What it said of itself when the run began.
        choice: Which items travel.
        batch_size: Items a segment.
        max_rate: Items a second that are loaded at most; 0 for no limit.
        embedder: Makes the embeddings that are missing; `None` leaves them out.
        erased: SHA-256 of the users that were erased here.
        keep_duplicates: Whether the same text of the same owner may come in under several ids.
    """

    source: Source
    info: SourceInfo
    choice: Choice
    batch_size: int = 1000
    max_rate: float = 0
    embedder: Embedder | None = None
    erased: frozenset[str] = frozenset()
    keep_duplicates: bool = False


@dataclass
class Report:
    """What a run did, or would do: items by what became of them, and refusals by reason."""

    counts: Counter[str]
    reasons: Counter[str]

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        words = ("read", "inserted", "updated", "same", "skipped", "not_chosen", "refused")
        return {**{word: self.counts[word] for word in words}, "reasons": dict(sorted(self.reasons.items()))}


class Pipeline:
    """
    Carry a plan out in a work folder.

    Args:
        folder: Of the run.
        plan: What it is made of.
        output: Where progress is said.
    """

    def __init__(self, folder: WorkFolder, plan: Plan, output: Output) -> None:
        self._folder, self._plan, self._output = folder, plan, output

    @property
    def plan(self) -> Plan:
        """What the run is made of."""
        return self._plan

    def run(
        self, until: Step, loader: Loader | None, target_texts: Callable[[], Iterator[Any]], *, dry_run: bool = False
    ) -> None:
        """
        Do what is left to do, up to a step.

        Args:
            until: The last step.
            loader: Loads, for the steps `load` and `verify`.
            target_texts: Reads the texts of the target (`Seen.note_target`); called once a run.
            dry_run: Judge what would be loaded; nothing is embedded or written to the target.

        Raises:
            StateRefusedError: The source is another one than the run began with.
            MemharborError: A step failed; the same call goes on from there.
        """
        wanted = STEP_ORDER[: STEP_ORDER.index(until) + 1]
        last = max(self._folder.segments("transformed"), default=0)
        seen = Seen(self._folder.path / "seen.sqlite", segment=last)
        try:
            if "transform" in wanted and not seen.knows_target:
                seen.note_target(target_texts())
            with self._output.step(f"Migrate from {self._plan.info.name}"), self._output.percent() as on_percent:
                for number, is_last in self._numbers():
                    begun_at = time.monotonic()
                    if "transform" in wanted:
                        self._transform(number, seen)
                    if "embed" in wanted:
                        self._embed(number, dry_run=dry_run)
                    if "load" in wanted and loader is not None:
                        self._load(number, loader, dry_run=dry_run)
                    self._pace(number, begun_at, is_last=is_last)
                    self._tell(number, on_percent)
        finally:
            seen.close()
        if "load" in wanted and loader is not None and not dry_run:
            loader.finish()
        if "verify" in wanted and loader is not None and not dry_run:
            with self._output.step("Compare what was loaded with the database"):
                self._verify(loader)

    def report(self) -> Report:
        """Add up what the work folder says."""
        counts: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for step in STEPS[:-1]:
            for number in self._folder.segments(step):
                end = self._folder.read_end(step, number)
                counts.update(end.get("counts", {}))
                reasons.update(end.get("reasons", {}))
        for number in self._folder.segments("loaded"):
            done = self._folder.read_json(f"loaded/{number:06}.json") or {}
            counts.update(done.get("counts", {}))
            reasons.update(each["reason"] for each in done.get("refused", []))
        return Report(counts, reasons)

    def _numbers(self) -> Iterator[tuple[int, bool]]:
        """Give the numbers of all segments, reading those that are not there yet."""
        known = self._folder.segments("read")
        yield from ((number, False) for number in known)
        if self._folder.is_read():
            return
        number = known[-1] if known else 0
        after = self._folder.read_end("read", number)["position"] if known else None
        items = self._plan.source.read(after)
        while part := list(islice(items, self._plan.batch_size)):
            number += 1
            self._write_read(number, part)
            yield number, len(part) < self._plan.batch_size
        self._folder.write_json("read/complete.json", {"segments": number})

    def _write_read(self, number: int, part: Sequence[RawItem | Refusal]) -> None:
        reasons = Counter(each.reason for each in part if isinstance(each, Refusal))
        last = part[-1].item if isinstance(part[-1], Refusal) else part[-1]
        lines = (refusal_as_data(each) if isinstance(each, Refusal) else item_as_data(each) for each in part)
        end = {
            "position": last.position,
            "counts": {"read": len(part), "refused": reasons.total()},
            "reasons": reasons,
        }
        self._folder.write_segment("read", number, lines, end)

    def _transform(self, number: int, seen: Seen) -> None:
        if self._folder.has("transformed", number):
            return
        counts: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        lines: list[dict[str, Any]] = []
        seen.begin()
        for line in self._folder.read_segment("read", number):
            if "reason" in line:
                continue
            found = self._transformed(item_from_data(line), seen, number)
            if found is None:
                counts["not_chosen"] += 1
            elif isinstance(found, Refusal):
                counts["refused"] += 1
                reasons[found.reason] += 1
                lines.append(refusal_as_data(found))
            elif isinstance(found, str):
                counts["skipped"] += 1
                lines.append({"left_out": found, "source_id": line["source_id"]})
            else:
                lines.append(found)
        seen.commit()
        self._folder.write_segment("transformed", number, lines, {"counts": counts, "reasons": reasons})

    def _transformed(self, item: RawItem, seen: Seen, number: int) -> dict[str, Any] | Refusal | str | None:
        made = transform(item, self._plan.info.name, self._plan.choice)
        if made is None or isinstance(made, Refusal):
            return made
        if made.user_id is not None and sha256(made.user_id.encode()).hexdigest() in self._plan.erased:
            return Refusal("erased-user", "its user was erased here", item)
        spelled = record_as_data(made)
        verdict = seen.meet(made, spelled, number, by_text=not self._plan.keep_duplicates)
        if verdict == "other-content":
            return Refusal("duplicate-id", f"another item of this run has the id {made.id}", item)
        return spelled if verdict == "new" else _LEFT_OUT[verdict]

    def _embed(self, number: int, *, dry_run: bool) -> None:
        if self._folder.has("embedded", number):
            return
        # Lines that have an embedding go on as they are: reading its values would take longer than all the rest.
        lines = [line for line in self._folder.read_segment("transformed", number) if "kind" in line]
        reasons: Counter[str] = Counter()
        if self._plan.embedder is not None and not dry_run:
            wanted = {place: line for place, line in enumerate(lines) if "embedding" not in line and text_of(line)}
            answers = self._plan.embedder.embed([text_of(line) for line in wanted.values()]) if wanted else []
            for (place, line), answer in zip(wanted.items(), answers, strict=True):
                if isinstance(answer, EmbeddingRefusal):
                    reasons[answer.reason] += 1
                    lines[place] = {"reason": answer.reason, "detail": answer.detail, "record": line}
                else:
                    lines[place] = {**line, "embedding": pack_vector(answer)}
        end = {"counts": {"refused": reasons.total()}, "reasons": reasons}
        self._folder.write_segment("embedded", number, lines, end)

    def records(self, number: int) -> list[Record]:
        """Read the records of a segment that are ready to be loaded."""
        return [record_from_data(line) for line in self._folder.read_segment("embedded", number) if "kind" in line]

    def _load(self, number: int, loader: Loader, *, dry_run: bool) -> None:
        if self._folder.has("loaded", number):
            return
        records = self.records(number)
        loaded = loader.load(number, records, dry_run=dry_run)
        refused = [{**each, "record": record_as_data(records[each["place"]])} for each in loaded.refused]
        self._folder.write_json(
            f"loaded/{number:06}.json", {**loaded.as_data(), "refused": refused, "records": len(records)}
        )

    def _verify(self, loader: Loader) -> None:
        """
        Compare every record with the database once more.

        Raises:
            VerificationError: One of them is not there as it was loaded.
        """
        different = 0
        first = ""
        for number in self._folder.segments("loaded"):
            done = self._folder.read_json(f"loaded/{number:06}.json") or {}
            not_loaded = {each["place"] for each in done["refused"]} | set(done["skipped"])
            records = self.records(number)
            for place, new_id in done["renumbered"].items():
                records[int(place)] = replace(records[int(place)], id=uuid.UUID(new_id))
            for place, verdict in loader.judge(records):
                if place not in not_loaded:
                    different += 1
                    first = first or f"{records[place].id} ({verdict})"
        if different:
            raise VerificationError(
                f"{different:,} records are not in the database as they were loaded, the first one {first}",
                hint=f"memharbor migrate compare {self._folder.path.name}",
            )

    def _tell(self, number: int, on_percent: Callable[[float], None]) -> None:
        """Say how far the run is, where the source knows how many items it has."""
        total = sum(self._plan.info.counts.values())
        if total:
            on_percent(min(100.0, 100 * number * self._plan.batch_size / total))

    def _pace(self, number: int, begun_at: float, *, is_last: bool) -> None:
        self._output.detail(f"segment {number}: {time.monotonic() - begun_at:.1f} s")
        if self._plan.max_rate and not is_last:
            time.sleep(max(0.0, self._plan.batch_size / self._plan.max_rate - (time.monotonic() - begun_at)))


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Digest what decides about a run's result, so that `resume` notices when it is another one."""
    return sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def refuse_changed_source(run: Mapping[str, Any], info: SourceInfo) -> None:
    """
    Refuse to go on with another source than a run began with.

    Raises:
        StateRefusedError: It is another one, or it was changed.
    """
    if run["source"]["identity"] != info.identity:
        raise StateRefusedError(
            "the source is not what it was when this run began",
            hint="begin a new run: what is there already stays as it is",
        )
