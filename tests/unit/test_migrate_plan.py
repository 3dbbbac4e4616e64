"""What a plan reckons from a sample: how many items there are, what will be refused, and how long each step takes."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memharbor.errors import SourceDataError
from memharbor.migrate.opening import EmbeddingSpec, SourceSpec
from memharbor.migrate.pipeline import Report
from memharbor.migrate.planning import SEED_SIZES, MigrationPlan, StepTime, Timeline, make_plan
from memharbor.migrate.record import RawItem, Refusal, SourceInfo, pack_vector
from memharbor.migrate.runs import RunSettings
from memharbor.migrate.sampling import PROBE_TEXTS, Sample, Texts, Tried, time_local_model
from memharbor.migrate.sources.files import FileSource

STEPS = ("read", "transform", "embed", "load", "verify")
# What each step is said to have needed for a sample; of `read`, beside what the source needed.
SECONDS = {"read": 1, "transform": 1, "embed": 2, "load": 3, "verify": 4}
HASH = EmbeddingSpec("memharbor-hash", 8)
OPENAI = EmbeddingSpec("text-embedding-3-small", 8)
SIZE = 50


def memories(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"id": str(number), "memory": f"fact {number}", "user_id": "alice", **fields} for number in range(count)]


def packed_vector(number: int, dims: int) -> str | None:
    draw = random.Random(number)
    return pack_vector([draw.uniform(-1, 1) for _ in range(dims)])


def as_lines(path: Path) -> int:
    path.write_text("".join(json.dumps(each) + "\n" for each in memories(1_234)))
    return 1_234


def as_lines_with_embeddings(path: Path) -> int:
    """As `migrate export` writes them: without their embeddings the lines would be a fiftieth of the size."""
    lines = ({**each, "embedding": packed_vector(int(each["id"]), 1536)} for each in memories(321))
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return 321


def as_gzip(path: Path) -> int:
    path.write_bytes(gzip.compress(json.dumps(memories(1_234, metadata={"same": "words " * 50})).encode()))
    return 1_234


def as_users(path: Path) -> int:
    path.write_text(json.dumps({f"user-{n}": {"results": memories(37)} for n in range(9)}))
    return 333


def with_growing_items(path: Path) -> int:
    """The first ones say nothing about the size of the others."""
    path.write_text(json.dumps([{**each, "memory": "word " * int(each["id"])} for each in memories(400)]))
    return 400


def with_bad_items(path: Path) -> int:
    lines = [json.dumps(each) for each in memories(200)]
    path.write_text("".join(f"{line}\n" if number % 10 else "{broken\n" for number, line in enumerate(lines)))
    return 200


def tried_of(sample: Sample, *, texts: int = 0, reasons: dict[str, int] | None = None, start: float = 0.0) -> Tried:
    """A sample of which each step took a known time; the source's own is what it took."""
    read = sum(1 for _ in sample.read())
    refused = Counter(reasons or {})
    counts = Counter(read=read, refused=refused.total(), inserted=read - refused.total())
    seconds = {**SECONDS, "read": sample.seconds + SECONDS["read"]}
    needed = Texts()
    for number in range(texts):
        needed.add(f"fact number {number}")
    return Tried(Report(counts, refused), needed, seconds, start, sample.seconds)


def planned(
    source: Any,
    *,
    spec: EmbeddingSpec | None = None,
    size: int = SIZE,
    model_seconds: float | None = None,
    **tried: Any,
) -> MigrationPlan:
    sample = Sample(source, size)
    done = tried_of(sample, **tried)
    info = source.describe()
    if not info.counts and info.size_bytes is not None:
        sample.count_rest()
    return make_plan(info, sample, done, RunSettings(SourceSpec("file"), embedding=spec), model_seconds)


class Numbers:
    """A source that says what it is told to say."""

    def __init__(self, count: int, **info: Any) -> None:
        self.count, self.taken = count, 0
        self._info = SourceInfo("numbers", "1", **info)

    def describe(self) -> SourceInfo:
        return self._info

    def read(self, after: str | None = None) -> Iterator[RawItem | Refusal]:
        for number in range(int(after or 0), self.count):
            self.taken += 1
            yield RawItem("memory", str(number), {"memory": "x", "user_id": "alice"}, str(number + 1))


# How many there are


@pytest.mark.parametrize(
    "write", [as_lines, as_lines_with_embeddings, as_gzip, as_users, with_growing_items, with_bad_items]
)
def test_the_items_of_a_file_are_counted_whatever_they_look_like(write: Callable[[Path], int], tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    count = write(path)
    plan = planned(FileSource(path))
    assert (plan.item_count, plan.is_counted, plan.sample.counts["read"]) == (count, True, SIZE)
    data = plan.as_data()
    assert (data["items"], data["timeline"][0]["items"]) == (count, count)
    assert f"{count:,} items" in plan.text()


@pytest.mark.parametrize(("count", "size"), [(0, 5), (1, 5), (4, 5), (5, 5), (6, 5)])
def test_a_small_file_is_counted_exactly(count: int, size: int, tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    path.write_text(json.dumps(memories(count)))
    plan = planned(FileSource(path), size=size, texts=min(count, size), spec=OPENAI)
    assert (plan.item_count, plan.is_counted, plan.text_count) == (count, True, count)


def test_an_empty_source_needs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "export.jsonl"
    path.write_text("")
    plan = planned(FileSource(path), spec=OPENAI)
    data = plan.as_data()
    assert (data["items"], data["expected_refusals"], data["minutes"]) == (0, 0, 0)
    assert data["embedding"]["texts"] == data["embedding"]["tokens"] == data["embedding"]["usd"] == 0
    assert [row["items"] for row in data["timeline"]] == [0], "nothing is known of a thousand like none"
    assert "0 items" in plan.text()


def test_a_file_that_ends_too_early_is_found_by_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    path.write_text(json.dumps(memories(500))[:-20])
    with pytest.raises(SourceDataError, match="ends inside the value"):
        planned(FileSource(path))


def test_what_a_source_says_is_believed_and_no_more_of_it_is_read() -> None:
    source = Numbers(1_000, counts={"memory": 900, "history": 100}, size_bytes=10)
    plan = planned(source)
    assert (plan.item_count, plan.is_counted, source.taken) == (1_000, True, SIZE)
    assert "900 of kind memory, 100 of kind history" in plan.text()


def test_what_was_read_to_its_end_is_believed_more() -> None:
    assert planned(Numbers(7, counts={"memory": 900})).item_count == 7


def test_a_service_that_does_not_say_is_not_asked_for_everything() -> None:
    source = Numbers(1_000)
    plan = planned(source)
    assert (plan.item_count, plan.is_counted, source.taken) == (SIZE, False, SIZE)
    assert plan.as_data()["items_are_counted"] is False
    assert f"at least {SIZE} items" in plan.text()


def test_counting_holds_few_items(tmp_path: Path) -> None:
    path = tmp_path / "export.jsonl"
    with path.open("w") as file:
        for number in range(4_000):
            file.write(json.dumps({"id": str(number), "memory": "word " * 400, "user_id": "alice"}) + "\n")
    sample = Sample(FileSource(path), 10)
    assert len(list(sample.read())) == 10
    tracemalloc.start()
    try:
        sample.count_rest()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sample.count == 4_000
    assert peak < path.stat().st_size / 4


# What becomes of them


def test_refusals_are_reckoned_by_reason() -> None:
    reasons = {"no-owner": 2, "bad-time": 2, "wrong-dims": 1}
    plan = planned(Numbers(1_000, counts={"memory": 1_000}), reasons=reasons)
    data = plan.as_data()
    assert data["expected_reasons"] == {"bad-time": 40, "no-owner": 40, "wrong-dims": 20}
    assert data["expected_refusals"] == 100
    assert data["sample"]["refused"] == 5
    assert "refused as no-owner: 2, of all about 40" in plan.text()


@pytest.mark.parametrize("count", [3, 50])
def test_refusals_of_a_source_that_was_tried_whole_are_exact(count: int) -> None:
    plan = planned(Numbers(count, counts={"memory": count}), reasons={"no-text": 3})
    assert plan.expected_reasons == {"no-text": 3}


def test_texts_and_tokens_are_reckoned_and_priced() -> None:
    small = planned(Numbers(1_000, counts={"memory": 1_000}), texts=25, spec=OPENAI)
    large = planned(Numbers(100_000, counts={"memory": 100_000}), texts=25, spec=OPENAI)
    assert (small.text_count, large.text_count) == (500, 50_000)
    assert small.embedding is not None
    assert large.embedding is not None
    assert large.embedding.tokens == pytest.approx(100 * small.embedding.tokens, rel=0.01)
    assert large.embedding.usd == pytest.approx(100 * (small.embedding.usd or 0), rel=0.01)
    # "fact number 7" has thirteen letters, of which four are a token.
    assert small.embedding.tokens == pytest.approx(500 * 13.6 / 4, rel=0.01)
    assert "to embed: 500 texts, about 1,700 tokens, less than 0.01 USD" in small.text()
    dear = planned(Numbers(100_000_000, counts={"memory": 100_000_000}), texts=25, spec=OPENAI)
    assert "about 170,000,000 tokens, about 3.40 USD" in dear.text()
    unpriced = planned(Numbers(1_000, counts={"memory": 1_000}), texts=25, spec=HASH, model_seconds=0.1)
    assert "about 1,700 tokens\n" in unpriced.text()


def test_texts_without_a_model_are_named() -> None:
    plan = planned(Numbers(100, counts={"memory": 100}), texts=50)
    data = plan.as_data()
    assert (data["embedding"], data["without_embedding"]) == (None, 100)
    assert "without an embedding: 100; name a `--model`" in plan.text()


# How long it takes


def adds_up(row: dict[str, Any]) -> bool:
    parts = [row[f"{step}_seconds"] or 0 for step in STEPS]
    return bool(row["total_seconds"] == pytest.approx(sum(parts)))


def test_the_steps_add_up_and_grow_with_the_items() -> None:
    plan = planned(Numbers(5_000, counts={"memory": 5_000}), texts=50, spec=HASH, model_seconds=0.25, start=0.5)
    data = plan.as_data()
    rows = data["timeline"]
    assert [row["items"] for row in rows] == [5_000, *SEED_SIZES]
    assert all(map(adds_up, rows))
    assert data["minutes"] == pytest.approx(rows[0]["total_seconds"] / 60, abs=0.05)
    for step, once in {"read": 0, "transform": 0.5, "embed": 0, "load": 0, "verify": 0}.items():
        for one, other in itertools.pairwise(rows[1:]):
            assert other[f"{step}_seconds"] - once == pytest.approx(10 * (one[f"{step}_seconds"] - once), abs=0.01)
    # The sample was a hundredth of all; half a second of its `transform` was for none of them.
    assert rows[0]["read_seconds"] == pytest.approx(100 * 1, abs=0.5)
    assert rows[0]["transform_seconds"] == pytest.approx(0.5 + 100 * 0.5, abs=0.5)
    assert rows[0]["embed_seconds"] == pytest.approx(100 * 2 + 5_000 * 0.25, abs=0.5)
    assert rows[0]["load_seconds"] == pytest.approx(100 * 3, abs=0.5)
    assert rows[0]["verify_seconds"] == pytest.approx(100 * 4, abs=0.5)


def test_what_the_source_needs_is_that_of_all_items_it_was_read_for() -> None:
    sample = Sample(Numbers(400, size_bytes=10), SIZE)
    done = tried_of(sample)
    sample.count_rest()
    assert sample.seconds > done.read_seconds > 0
    sample.seconds = 200.0
    plan = make_plan(SourceInfo("numbers", "1"), sample, done, RunSettings(SourceSpec("file")), None)
    assert plan.rows()[0]["read_seconds"] == pytest.approx(200 + 400 / SIZE * SECONDS["read"])


def test_a_size_that_the_seeds_have_too_is_one_row() -> None:
    plan = planned(Numbers(1_000, counts={"memory": 1_000}))
    assert [row["items"] for row in plan.rows()] == list(SEED_SIZES)


def test_a_rate_of_items_is_waited_for() -> None:
    steps = {"read": StepTime(1.0), "transform": StepTime(0.25), "embed": StepTime(0.25), "load": StepTime(0.5)}
    assert Timeline(steps, max_rate=2).row(10)["load_seconds"] == 5, "it takes longer than the rate asks for"
    slow = Timeline(steps, max_rate=0.5).row(10)
    assert (slow["load_seconds"], slow["total_seconds"]) == (15, 30)


def test_a_model_of_this_machine_is_timed_and_nothing_of_it_is_kept(tmp_path: Path) -> None:
    spec = EmbeddingSpec("memharbor-hash", 8, cache=str(tmp_path / "kept"))
    seconds = time_local_model(spec, ["one", "two"], tmp_path / "scratch")
    assert seconds is not None
    assert seconds > 0
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("spec", [None, OPENAI, EmbeddingSpec("nomic-embed", 8, "http://127.0.0.1:9/v1")])
def test_no_endpoint_is_asked(spec: EmbeddingSpec | None, tmp_path: Path) -> None:
    assert time_local_model(spec, ["one"], tmp_path / "scratch") is None
    assert not (tmp_path / "scratch").exists()


def test_few_texts_are_kept_for_the_model() -> None:
    texts = Texts()
    for number in range(1_000):
        texts.add(f"fact {number % 500}")
    assert (texts.count, len(texts.some)) == (1_000, PROBE_TEXTS)


@pytest.mark.parametrize(
    ("spec", "texts", "timed_by"),
    [
        (None, 50, "nothing"),
        (OPENAI, 0, "nothing"),
        (OPENAI, 50, "limits"),
        (EmbeddingSpec("nomic-embed", 8, "http://127.0.0.1:9/v1"), 50, "unknown"),
        # A price is known, but not what another's endpoint lets through.
        (EmbeddingSpec("text-embedding-3-small", 8, "http://127.0.0.1:9/v1"), 50, "unknown"),
        (EmbeddingSpec("nomic-embed", 8, "http://127.0.0.1:9/v1", max_rate=2), 50, "limits"),
    ],
)
def test_it_says_where_the_time_for_embeddings_is_from(spec: EmbeddingSpec | None, texts: int, timed_by: str) -> None:
    plan = planned(Numbers(5_000, counts={"memory": 5_000}), texts=texts, spec=spec)
    (row, *_) = plan.rows()
    assert plan.timed_by == timed_by
    assert (row["embed_seconds"] is None) == (timed_by == "unknown")
    assert adds_up(row)
    text = plan.text()
    assert ("not known" in text) == (timed_by == "unknown")
    assert ("≥" in text) == (timed_by in ("unknown", "limits"))


def test_an_endpoint_takes_no_less_than_its_limits() -> None:
    def needed(**spec: Any) -> float:
        plan = planned(Numbers(5_000, counts={"memory": 5_000}), texts=50, spec=EmbeddingSpec(OPENAI.model, 8, **spec))
        without = planned(Numbers(5_000, counts={"memory": 5_000}), texts=0)
        return float(plan.rows()[0]["embed_seconds"] - without.rows()[0]["embed_seconds"])

    # 5,000 texts of about 3.4 tokens, a million tokens a minute; and one request, which has a segment, in a hundred seconds.
    assert needed() == pytest.approx(5_000 * 3.45 * 60 / 1e6, abs=0.1)
    assert needed(max_rate=0.01) == pytest.approx(500, abs=0.1)


def test_the_table_has_a_column_for_every_step_and_a_line_for_every_size() -> None:
    plan = planned(Numbers(5_000, counts={"memory": 5_000}), texts=50, spec=HASH, model_seconds=0.25)
    lines = plan.text().split("\n\n", 1)[1].splitlines()
    assert lines[0].split() == ["items", "export", "transform", "embeddings", "import", "verify", "total"]
    assert [line.split()[0] for line in lines[1:6]] == ["5,000", "1,000", "10,000", "100,000", "1,000,000"]
    assert len({len(line) for line in lines[:6]}) == 1
    assert lines[6].startswith("embeddings: timed on")
