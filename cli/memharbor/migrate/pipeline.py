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
from functools import partial
from hashlib import sha256
from itertools import islice
from typing import Any, Literal

from memharbor.errors import StateRefusedError, VerificationError
from memharbor.migrate.behind import Behind, Turn
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
_LEFT_OUT = {
    "same-id": "the same item again",
    "same-text": "the same text of the same owner",
    "same-change": "the same change again",
}


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
        self._folder, self._plan, self.output = folder, plan, output

    @property
    def plan(self) -> Plan:
        """What the run is made of."""
        return self._plan

    def run(
        self,
        until: Step,
        loader: Loader | None,
        target_texts: Callable[[], Iterator[Any]],
        *,
        second: Loader | None = None,
        dry_run: bool = False,
    ) -> None:
        """
        Do what is left to do, up to a step.

        Args:
            until: The last step.
            loader: Loads, for the steps `load` and `verify`.
            target_texts: Reads the texts of the target (`Seen.note_target`); called once a run.
            second: Loads every other segment, over a connection of its own, so that one is staged while the other is merged.
            dry_run: Judge what would be loaded; nothing is embedded or written to the target.

        Raises:
            StateRefusedError: The source is another one than the run began with.
            MemharborError: A step failed; the same call goes on from there.
        """
        wanted = STEP_ORDER[: STEP_ORDER.index(until) + 1]
        # What a dry run foretells is known to one connection only.
        loaders = [loader] if second is None or dry_run else [loader, second]
        last = max(self._folder.segments("transformed"), default=0)
        seen = Seen(self._folder.path / "seen.sqlite", segment=last)
        try:
            if "transform" in wanted:
                if not seen.knows_target:
                    seen.note_target(target_texts())
                for number in seen.missing:
                    self._note(number, seen)
            with (
                self.output.step(f"Migrate from {self._plan.info.name}"),
                self.output.percent() as on_percent,
                Behind(len(loaders)) as behind,
            ):
                for number, is_last in self._numbers():
                    begun_at = time.monotonic()
                    if "transform" in wanted:
                        self._transform(number, seen)
                    if "embed" in wanted:
                        self._embed(number, dry_run=dry_run)
                    by = loaders[number % len(loaders)]
                    if "load" in wanted and by is not None and not self._folder.has("loaded", number):
                        # While the database takes it, the next one is read and transformed.
                        behind.do(partial(self._load, number, self.records(number), by, dry_run=dry_run))
                    self._pace(number, begun_at, is_last=is_last)
                    self._tell(number, on_percent)
        finally:
            seen.close()
        if "load" in wanted and loader is not None and not dry_run:
            loader.finish()
        if "verify" in wanted and loader is not None and not dry_run:
            with self.output.step("Compare what was loaded with the database"):
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
        for line in self._folder.take_segment("read", number).lines:
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
        seen.commit(number)
        self._folder.write_segment("transformed", number, lines, {"counts": counts, "reasons": reasons})

    def _note(self, number: int, seen: Seen) -> None:
        """Note a segment that was transformed before."""
        seen.begin()
        for line in self._folder.read_segment("transformed", number):
            if "kind" in line:
                seen.meet(record_from_data(line), line, number, by_text=not self._plan.keep_duplicates)
        seen.commit(number)

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
        segment = self._folder.take_segment("transformed", number)
        lines = [line for line in segment.lines if "kind" in line]
        reasons: Counter[str] = Counter()
        wanted: dict[int, Mapping[str, Any]] = {}
        if self._plan.embedder is not None and not dry_run:
            wanted = {place: line for place, line in enumerate(lines) if "embedding" not in line and text_of(line)}
        if not wanted and not any(segment.end["counts"].values()):
            self._folder.pass_on(segment, "transformed", number, "embedded")
            return
        if self._plan.embedder is not None and wanted:
            answers = self._plan.embedder.embed([text_of(line) for line in wanted.values()])
            for (place, line), answer in zip(wanted.items(), answers, strict=True):
                if isinstance(answer, EmbeddingRefusal):
                    reasons[answer.reason] += 1
                    lines[place] = {"reason": answer.reason, "detail": answer.detail, "record": line}
                else:
                    lines[place] = {**line, "embedding": pack_vector(answer), "made": True}
        end = {"counts": {"refused": reasons.total()}, "reasons": reasons}
        self._folder.write_segment("embedded", number, lines, end)

    def records(self, number: int) -> list[Record]:
        """Read the records of a segment that are ready to be loaded."""
        lines = self._folder.take_segment("embedded", number).lines
        return [record_from_data(line) for line in lines if "kind" in line]

    def _load(self, number: int, records: Sequence[Record], loader: Loader, turn: Turn, *, dry_run: bool) -> None:
        loaded = loader.load(number, records, turn, dry_run=dry_run)
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
        found: list[str] = []
        with Behind(1) as behind:
            for number in self._folder.segments("loaded"):
                done = self._folder.read_json(f"loaded/{number:06}.json") or {}
                behind.do(partial(_verify_segment, self.records(number), done, loader, found))
        if found:
            raise VerificationError(
                f"{len(found):,} records are not in the database as they were loaded, the first one {found[0]}",
                hint=f"memharbor migrate compare {self._folder.path.name}",
            )

    def _tell(self, number: int, on_percent: Callable[[float], None]) -> None:
        """Say how far the run is, where the source knows how many items it has."""
        total = sum(self._plan.info.counts.values())
        if total:
            on_percent(min(100.0, 100 * number * self._plan.batch_size / total))

    def _pace(self, number: int, begun_at: float, *, is_last: bool) -> None:
        self.output.detail(f"segment {number}: {time.monotonic() - begun_at:.1f} s")
        if self._plan.max_rate and not is_last:
            time.sleep(max(0.0, self._plan.batch_size / self._plan.max_rate - (time.monotonic() - begun_at)))


def _verify_segment(records: list[Record], done: Mapping[str, Any], loader: Loader, found: list[str], _: Turn) -> None:
    not_loaded = {each["place"] for each in done["refused"]} | set(done["skipped"])
    for place, new_id in done["renumbered"].items():
        records[int(place)] = replace(records[int(place)], id=uuid.UUID(new_id))
    found += [f"{records[place].id} ({verdict})" for place, verdict in loader.judge(records) if place not in not_loaded]


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
