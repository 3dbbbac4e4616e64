"""Which rows are embedded, how hard an endpoint is asked, and what a source wants to be read."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest

from memharbor.commands.migrate_embed import STATES
from memharbor.embedder import embed
from memharbor.errors import UsageError
from memharbor.migrate.embedding.cache import EmbeddingCache
from memharbor.migrate.embedding.endpoint import EndpointEmbedder
from memharbor.migrate.embedding.model import Embedding
from memharbor.migrate.embedding.rows import RowChoice, choose_rows, parse_ids
from memharbor.migrate.fetching import fetch
from memharbor.migrate.http import Clock
from memharbor.migrate.opening import EmbeddingSpec, Pace, SourceSpec, open_embedder
from memharbor.migrate.record import RawItem, Refusal, SourceInfo, State
from memharbor.migrate.runs import RunSettings
from memharbor.output import Output
from tests.embedding_server import Fault, StrictEmbeddingServer

DIMS = 8
MODEL = "nomic-embed"
WAIT_SECONDS = 30


@pytest.fixture
def server() -> Iterator[StrictEmbeddingServer]:
    with StrictEmbeddingServer(DIMS) as started:
        yield started


def numbered(count: int) -> list[str]:
    return [f"memory number {number}" for number in range(count)]


def expected(texts: Sequence[str]) -> list[tuple[float, ...]]:
    return [tuple(embed(text, DIMS)) for text in texts]


# Which rows


def test_the_states_of_the_command_are_those_that_a_memory_has() -> None:
    assert tuple(STATES) == get_args(State)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"user_id": ""}, "`--user` is empty"),
        ({"user_id": " "}, "`--user` is empty"),
        ({"agent_id": ""}, "`--agent` is empty"),
        ({"updated_since": "soon"}, "`--updated-since` is no moment: soon"),
        ({"updated_before": "2026-13-01"}, "`--updated-before` is no moment"),
        ({"updated_since": "2026-02-01", "updated_before": "2026-02-01"}, "nothing was changed between"),
        ({"updated_since": "2026-02-01T01:00+01:00", "updated_before": "2026-01-31"}, "nothing was changed between"),
    ],
)
def test_what_chooses_nothing_is_refused(asked: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose_rows("all", **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "asked",
    [
        {"user_id": "a"},
        {"agent_id": "a"},
        {"updated_since": "2026-01-01"},
        {"updated_before": "2026-01-01"},
        {"states": ["active"]},
        {"ids": [str(uuid.uuid4())]},
    ],
)
def test_only_what_leaves_no_other_embedding_is_everything(asked: dict[str, Any]) -> None:
    assert choose_rows("all").is_everything
    assert not choose_rows("missing").is_everything
    assert not choose_rows("all", **asked).is_everything


def test_what_an_entity_does_not_have_chooses_none_of_them() -> None:
    assert choose_rows(states=["active"]).condition("entities") == ("false", {})
    assert choose_rows("all", updated_since="2026-01-01").condition("entities") == ("false", {})
    assert RowChoice(agent_id="bot").condition("entities")[1] == {"agent_id": "bot"}


@pytest.mark.parametrize("spelled", ["{}", "{}\n", "  {}\r\n", "\n\n{}\n\n"])
def test_ids_are_read_line_by_line(spelled: str) -> None:
    one = uuid.uuid4()
    assert list(parse_ids(spelled.format(one).splitlines(keepends=True))) == [one]
    assert list(parse_ids([one.hex])) == [one], "as OpenMemory has them"


@pytest.mark.parametrize(
    ("lines", "words"),
    [([], "names no id"), (["\n", " "], "names no id"), ([str(uuid.uuid4()), "mem_7"], "line 2 of `--ids` is no id")],
)
def test_a_line_that_is_no_id_is_refused_with_its_number(lines: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        list(parse_ids(lines))


# How hard an endpoint is asked


def opened(server: StrictEmbeddingServer, folder: Path, texts: Sequence[str], **pace: Any) -> list[Embedding]:
    spec = EmbeddingSpec(MODEL, DIMS, server.base_url, cache=str(folder)).at_pace(Pace(**pace))
    with open_embedder(spec, environ={}) as embedder:
        return embedder.embed(texts)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_under_way_than_allowed(
    server: StrictEmbeddingServer, tmp_path: Path, concurrency: int
) -> None:
    texts = numbered(40 * concurrency)
    server.gate = threading.Barrier(concurrency)  # nothing is answered before as many requests are there
    assert opened(server, tmp_path, texts, concurrency=concurrency) == expected(texts)
    assert (server.at_once, len(server.requests)) == (concurrency, concurrency)


def test_a_rate_fills_the_requests_rather_than_spreading_the_texts(
    server: StrictEmbeddingServer, tmp_path: Path
) -> None:
    texts = numbered(128)
    assert opened(server, tmp_path / "free", texts) == expected(texts)
    assert len(server.requests) == 4
    assert opened(server, tmp_path / "paced", texts, max_rate=1000) == expected(texts)
    assert len(server.requests) == 5


class Turning:
    """Time that goes on only when it is told to: to the next moment for which somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self._wakes: list[float] = []
        self._changed = threading.Condition()

    def sleep(self, seconds: float) -> None:
        with self._changed:
            wake_at = self.now + seconds
            self._wakes.append(wake_at)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self.now >= wake_at, WAIT_SECONDS)

    def turn(self) -> None:
        """Wait until somebody sleeps, and wake the first of them."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(wake > self.now for wake in self._wakes), WAIT_SECONDS)
            self.now = min(wake for wake in self._wakes if wake > self.now)
            self._changed.notify_all()


def test_all_requests_together_keep_to_the_rate_however_many_are_under_way(
    server: StrictEmbeddingServer, tmp_path: Path
) -> None:
    """Also at the beginning: three that are sent at once would be over it."""
    time, texts = Turning(), numbered(6)
    answered = threading.Semaphore(0)
    found: list[Embedding] = []

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        answered.release()
        return answer

    def work() -> None:
        clock = Clock(time.sleep, lambda: time.now)
        options: dict[str, Any] = {"batch_size": 1, "concurrency": 3, "max_rate": 2.0, "clock": clock}
        with (
            EmbeddingCache(tmp_path, MODEL, DIMS) as cache,
            EndpointEmbedder(server.base_url, MODEL, DIMS, cache=cache, **options) as embedder,
        ):
            found.extend(embedder.embed(texts))

    server.change = change
    worker = threading.Thread(target=work)
    worker.start()
    assert answered.acquire(timeout=WAIT_SECONDS)
    for count in range(1, 6):
        assert len(server.requests) == count, "no place is given twice"
        time.turn()
        assert time.now == count / 2
        assert answered.acquire(timeout=WAIT_SECONDS)
    worker.join(WAIT_SECONDS)
    assert found == expected(texts)
    assert len(server.requests) == 6


def test_a_retry_needs_a_place_too(server: StrictEmbeddingServer, tmp_path: Path) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    server.faults = [Fault(429, {"Retry-After": "0"})] * 3
    with (
        EmbeddingCache(tmp_path, MODEL, DIMS) as cache,
        EndpointEmbedder(
            server.base_url, MODEL, DIMS, cache=cache, concurrency=1, max_rate=0.01, clock=Clock(sleep, lambda: now[0])
        ) as embedder,
    ):
        assert embedder.embed(["one"]) == expected(["one"])
    assert len(server.keys) == 4
    assert now[0] == pytest.approx(300)


def test_a_pace_changes_only_what_it_says() -> None:
    spec = EmbeddingSpec(MODEL, DIMS, max_rate=3, concurrency=2)
    assert spec.at_pace(Pace()) == spec
    assert (spec.at_pace(Pace(max_rate=0)).max_rate, spec.at_pace(Pace(max_rate=0)).concurrency) == (0, 2)
    assert (spec.at_pace(Pace(concurrency=7)).max_rate, spec.at_pace(Pace(concurrency=7)).concurrency) == (3, 7)


def test_a_run_that_was_begun_before_there_was_a_pace_goes_on() -> None:
    data = RunSettings(SourceSpec("file", ("x",)), embedding=EmbeddingSpec(MODEL, DIMS)).as_data()
    assert RunSettings.from_data(data).embedding == EmbeddingSpec(MODEL, DIMS)
    del data["embedding"]["max_rate"], data["embedding"]["concurrency"]
    assert RunSettings.from_data(data).embedding == EmbeddingSpec(MODEL, DIMS)


# What a source wants to be read


class Noting:
    """A source of one item, with something to say once it was asked what it is."""

    notes: tuple[str, ...] = ()

    def describe(self) -> SourceInfo:
        self.notes = ("the table has another name",)
        return SourceInfo("noting", "1")

    def read(self, after: str | None = None) -> Iterator[RawItem | Refusal]:
        yield RawItem("memory", "1", {"memory": "likes tea", "user_id": "alice"}, "1")


def test_what_a_source_noticed_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(Noting(), tmp_path / "out.jsonl", Output("json"))
    said = capsys.readouterr()
    assert said.err.count("note: the table has another name\n") == 1
    assert "another name" not in said.out


def test_the_pace_is_no_secret_and_is_kept_with_the_run() -> None:
    spec = EmbeddingSpec(MODEL, DIMS).at_pace(Pace(max_rate=2.5, concurrency=9))
    assert {**asdict(EmbeddingSpec(MODEL, DIMS)), "max_rate": 2.5, "concurrency": 9} == asdict(spec)
