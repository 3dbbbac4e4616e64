from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr

from memharbor.embedder import embed
from memharbor.errors import ConfigError, EmbeddingError, StateRefusedError
from memharbor.migrate.embedding.cache import FILE, EmbeddingCache, cache_key, pack, unpack
from memharbor.migrate.embedding.endpoint import EndpointEmbedder
from memharbor.migrate.embedding.local import HASH_MODEL, LocalEmbedder
from memharbor.migrate.embedding.model import (
    REEMBED_COMMAND,
    Embedding,
    EmbeddingRefusal,
    check_fit,
    estimate,
    estimate_tokens,
)
from memharbor.migrate.http import Clock
from memharbor.migrate.key import find_key
from memharbor.migrate.reasons import REASONS
from tests.embedding_server import Fault, StrictEmbeddingServer

DIMS = 8
MODEL = "text-embedding-3-small"
KEY = "sk-test-0123456789"  # pragma: allowlist secret


@pytest.fixture
def server() -> Iterator[StrictEmbeddingServer]:
    with StrictEmbeddingServer(DIMS) as started:
        yield started


class Run:
    """Embedders over one server and one cache folder, and the pauses that they made."""

    def __init__(self, server: StrictEmbeddingServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.pauses: list[float] = []
        self.now = 0.0

    def embed(self, texts: Sequence[str], **options: Any) -> list[Embedding]:
        dims, model = options.pop("dims", DIMS), options.pop("model", MODEL)
        options = {"concurrency": 1, "clock": Clock(self.pause, lambda: self.now), **options}
        key = options.pop("key", SecretStr(KEY))
        with (
            EmbeddingCache(self.folder, model, dims) as cache,
            EndpointEmbedder(self.server.base_url, model, dims, key, cache=cache, **options) as embedder,
        ):
            found = embedder.embed(texts)
            self.usage = embedder.usage
            return found

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def run(server: StrictEmbeddingServer, tmp_path: Path) -> Run:
    return Run(server, tmp_path / "cache")


def expected(texts: Sequence[str]) -> list[tuple[float, ...]]:
    return [tuple(embed(text, DIMS)) for text in texts]


def numbered(count: int) -> list[str]:
    return [f"memory number {number}" for number in range(count)]


def reason_of(embedding: Embedding) -> str:
    assert isinstance(embedding, EmbeddingRefusal), embedding
    assert embedding.reason in REASONS
    return embedding.reason


# The endpoint: batches, order, shape


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_texts_are_embedded_in_their_order(run: Run, encoding: str) -> None:
    texts = numbered(50)
    run.server.change = lambda answer: answer | {"data": answer["data"][::-1]}
    assert run.embed(texts, encoding=encoding, batch_size=7) == expected(texts)
    assert [len(request["input"]) for request in run.server.requests] == [7] * 7 + [1]
    assert set(run.server.keys) == {f"Bearer {KEY}"}


def test_a_text_is_asked_once_however_often_it_comes(run: Run) -> None:
    texts = ["one", "two", "one", "one", "two"]
    assert run.embed(texts) == expected(texts)
    assert run.server.texts == {"one": 1, "two": 1}


def test_an_empty_text_is_refused_and_never_sent(run: Run) -> None:
    found = run.embed(["", "one", " \n"])
    assert [reason_of(found[0]), found[1], reason_of(found[2])] == ["no-text", *expected(["one"]), "no-text"]
    assert run.server.texts == {"one": 1}


@pytest.mark.parametrize(
    ("model", "sent"),
    [(MODEL, DIMS), ("openai/text-embedding-3-large", DIMS), ("text-embedding-ada-002", None), ("nomic-embed", None)],
)
def test_dimensions_are_sent_only_to_models_that_know_them(run: Run, model: str, sent: int | None) -> None:
    run.embed(["one"], model=model)
    assert [request.get("dimensions") for request in run.server.requests] == [sent]


def test_a_batch_holds_no_more_tokens_than_the_endpoint_takes(run: Run) -> None:
    texts = [f"{number} " + "x" * 1000 for number in range(10)]
    assert run.embed(texts, batch_tokens=2_100) == expected(texts)
    assert max(len(request["input"]) for request in run.server.requests) == 4


@pytest.mark.parametrize(
    ("limits", "smallest"), [({"inputs_max": 5}, 5), ({"tokens_max": 15}, 5), ({"inputs_max": 1}, 1)]
)
def test_a_batch_that_is_too_large_is_halved_until_it_fits(
    tmp_path: Path, limits: dict[str, int], smallest: int
) -> None:
    texts = numbered(64)
    with StrictEmbeddingServer(DIMS, **limits) as server:
        assert Run(server, tmp_path).embed(texts) == expected(texts)
        assert set(server.texts.values()) == {1}
        answered = [len(request["input"]) for request in server.requests if len(request["input"]) <= smallest]
        assert sum(answered) == 64


def test_the_size_that_fits_is_kept(run: Run) -> None:
    run.server.inputs_max = 8
    run.embed(numbered(64), batch_size=16)
    refused = [request for request in run.server.requests if len(request["input"]) > 8]
    assert len(refused) == 1


def test_a_text_that_is_too_long_alone_is_refused_and_the_others_are_embedded(run: Run) -> None:
    run.server.words_max = 20
    texts = numbered(30)
    texts[13] = "word " * 21
    found = run.embed(texts)
    assert reason_of(found[13]) == "text-too-long"
    assert [vector for number, vector in enumerate(found) if number != 13] == expected(texts[:13] + texts[14:])


@pytest.mark.parametrize("position", [0, 11])
def test_a_text_that_the_endpoint_rejects_for_itself_does_not_end_the_run(run: Run, position: int) -> None:
    run.server.refused_word = "forbidden"
    texts = numbered(12)
    texts[position] = "forbidden"
    found = run.embed(texts)
    assert reason_of(found[position]) == "rejected"
    assert sum(isinstance(each, tuple) for each in found) == 11


def test_an_endpoint_that_rejects_everything_is_an_error(run: Run) -> None:
    run.server.refused_word = ""
    with pytest.raises(EmbeddingError, match="embeds nothing with model `text-embedding-3-small`: the content filter"):
        run.embed(numbered(4))


# The endpoint: wrong answers


def without_last(answer: dict[str, Any]) -> dict[str, Any]:
    return answer | {"data": answer["data"][:-1]}


def same_index(answer: dict[str, Any]) -> dict[str, Any]:
    return answer | {"data": [each | {"index": 0} for each in answer["data"]]}


def odd_index(answer: dict[str, Any]) -> dict[str, Any]:
    return answer | {"data": [each | {"index": [1]} for each in answer["data"]]}


def no_numbers(answer: dict[str, Any]) -> dict[str, Any]:
    return answer | {"data": [each | {"embedding": None} for each in answer["data"]]}


def no_base64(answer: dict[str, Any]) -> dict[str, Any]:
    return answer | {"data": [each | {"embedding": "?"} for each in answer["data"]]}


@pytest.mark.parametrize(
    "change", [without_last, same_index, odd_index, no_numbers, no_base64, lambda _: {"data": None}, lambda _: {}]
)
def test_an_answer_of_the_wrong_shape_is_an_error_and_is_not_kept(run: Run, change: Any) -> None:
    run.server.change = change
    with pytest.raises(EmbeddingError, match="answers with"):
        run.embed(["one", "two"])
    run.server.change = lambda answer: answer
    assert run.embed(["one", "two"]) == expected(["one", "two"])
    assert run.server.texts == {"one": 2, "two": 2}


def test_embeddings_of_other_dimensions_are_an_error(run: Run) -> None:
    with pytest.raises(EmbeddingError, match="gives embeddings of 8 dimensions for `mini`, not of 16"):
        run.embed(["one"], dims=16, model="mini")


@pytest.mark.parametrize("value", [None, math.inf, math.nan, 1e39, "x"])
def test_a_value_that_is_no_finite_float32_refuses_its_text_alone(run: Run, value: Any) -> None:
    def change(answer: dict[str, Any]) -> dict[str, Any]:
        answer["data"][1]["embedding"][3] = value
        return answer

    run.server.change = change
    found = run.embed(["one", "two", "three"])
    assert reason_of(found[1]) == "bad-vector"
    assert [found[0], found[2]] == expected(["one", "three"])


def test_an_embedding_of_zeros_is_refused(run: Run) -> None:
    run.server.change = lambda answer: answer | {"data": [{"index": 0, "embedding": [0.0] * DIMS}]}
    assert [reason_of(each) for each in run.embed(["one"])] == ["bad-vector"]


# The endpoint: failures


@pytest.mark.parametrize("status", [429, 500, 502, 503, 0])
def test_a_failure_that_may_pass_is_tried_again(run: Run, status: int) -> None:
    run.server.faults = [Fault(status), Fault(status)]
    assert run.embed(["one"]) == expected(["one"])
    assert len(run.pauses) == 2
    assert run.server.texts == {"one": 1}


def test_an_endpoint_that_asks_for_a_pause_gets_it(run: Run) -> None:
    run.server.faults = [Fault(429, {"Retry-After": "17"})]
    assert run.embed(["one"]) == expected(["one"])
    assert run.pauses == [17.0]


def test_an_endpoint_that_goes_on_failing_is_an_error_and_keeps_what_it_answered(run: Run) -> None:
    texts = numbered(4)
    run.embed(texts[:2])
    run.server.faults = [Fault(503)] * 3
    with pytest.raises(EmbeddingError, match="503 try again, 3 times"):
        run.embed(texts, attempts=3)
    assert run.embed(texts) == expected(texts)
    assert set(run.server.texts.values()) == {1}


def test_what_other_requests_answered_is_kept_when_one_fails(run: Run) -> None:
    texts = numbered(100)
    run.server.change = lambda answer: answer if len(run.server.requests) < 3 else {}
    with pytest.raises(EmbeddingError):
        run.embed(texts, batch_size=10)
    run.server.change = lambda answer: answer
    assert run.embed(texts) == expected(texts)
    assert [count for text, count in run.server.texts.items() if text in texts[:20]] == [1] * 20


@pytest.mark.parametrize(("status", "words"), [(401, "refuses the key"), (404, "has no model")])
def test_a_wrong_key_or_model_is_a_setting_to_be_changed(run: Run, status: int, words: str) -> None:
    run.server.faults = [Fault(status, body=f'{{"error": {{"message": "not {KEY}"}}}}'.encode())]
    with pytest.raises(ConfigError, match=words) as raised:
        run.embed(["one"])
    assert status == 404 or KEY not in raised.value.message
    assert run.pauses == []


def test_no_key_is_in_a_representation_or_sent_in_the_clear(run: Run, tmp_path: Path) -> None:
    with EmbeddingCache(tmp_path, MODEL, DIMS) as cache:
        with EndpointEmbedder(run.server.base_url, MODEL, DIMS, SecretStr(KEY), cache=cache) as embedder:
            assert KEY not in repr(embedder) + repr(vars(embedder))
        with pytest.raises(ConfigError, match="in the clear"):
            EndpointEmbedder("http://embeddings.example/v1", MODEL, DIMS, SecretStr(KEY), cache=cache)


def test_an_endpoint_without_a_key_gets_none(run: Run) -> None:
    assert run.embed(["one"], key=None) == expected(["one"])
    assert run.server.keys == [None]


# Concurrency and rate


def test_requests_are_under_way_at_once_and_no_more_than_allowed(run: Run) -> None:
    texts = numbered(12)
    run.server.gate = threading.Barrier(3)  # nothing is answered before three requests are there
    assert run.embed(texts, concurrency=3, batch_size=2) == expected(texts)
    assert run.server.at_once == 3


def test_a_few_texts_are_spread_over_the_requests_that_may_be_under_way(run: Run) -> None:
    texts = numbered(128)
    assert run.embed(texts, concurrency=4) == expected(texts)
    assert sorted(len(request["input"]) for request in run.server.requests) == [32] * 4


def test_requests_keep_to_the_rate(run: Run) -> None:
    texts = numbered(30)
    assert run.embed(texts, batch_size=10, max_rate=2.0) == expected(texts)
    assert len(run.server.requests) == 3
    assert sum(run.pauses) == pytest.approx(1.0)


# The cache


def test_nothing_is_paid_for_twice(run: Run) -> None:
    texts = numbered(40)
    first = run.embed(texts, batch_size=9)
    asked = len(run.server.requests)
    assert run.embed(texts[::-1]) == first[::-1] == expected(texts)[::-1]
    assert len(run.server.requests) == asked
    assert (run.usage.cached, run.usage.requests) == (40, 0)


@pytest.mark.parametrize("options", [{"model": "text-embedding-3-large"}, {"dims": 4}])
def test_another_model_or_other_dimensions_are_another_embedding(run: Run, options: dict[str, Any]) -> None:
    run.embed(["one"])
    run.embed(["one"], **options)
    assert run.server.texts == {"one": 2}


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_an_embedding_is_kept_bit_for_bit(values: list[float]) -> None:
    assert pack(unpack(pack(values))) == pack(values)
    assert unpack(pack(values)) == tuple(values)


@given(st.tuples(st.text(), st.integers(), st.text()), st.tuples(st.text(), st.integers(), st.text()))
@example(("m", 1, "2x"), ("m", 12, "x"))
@example(("m1", 2, "x"), ("m", 12, "x"))
def test_no_two_things_to_embed_share_a_key(one: tuple[str, int, str], other: tuple[str, int, str]) -> None:
    assert (cache_key(*one) == cache_key(*other)) == (one == other)


def test_no_text_is_in_the_cache_and_only_its_owner_reads_it(run: Run) -> None:
    run.embed(["a most private memory"])
    files = list(run.folder.iterdir())
    assert files
    assert all(b"private" not in file.read_bytes() for file in files)
    assert (run.folder / FILE).stat().st_mode & 0o077 == 0


def test_a_cached_embedding_of_the_wrong_length_is_asked_for_again(run: Run) -> None:
    run.embed(["one"])
    with sqlite3.connect(run.folder / FILE) as connection:
        connection.execute("update embeddings set vector = substr(vector, 1, 7)")
    connection.close()
    assert run.embed(["one"]) == expected(["one"])
    assert run.server.texts == {"one": 2}


@pytest.mark.parametrize("damage", ["text", "format"])
def test_a_file_that_is_no_cache_is_refused_with_the_way_out(tmp_path: Path, damage: str) -> None:
    if damage == "text":
        (tmp_path / FILE).write_text("this is no database " * 100)
    else:
        connection = sqlite3.connect(tmp_path / FILE)
        connection.execute("pragma user_version = 99")
        connection.close()
    with pytest.raises(ConfigError) as raised:
        EmbeddingCache(tmp_path, MODEL, DIMS)
    assert any("delete" in hint for hint in raised.value.hints)


KILLED = """
import os, signal, sys
from pathlib import Path
from memharbor.migrate.embedding.cache import EmbeddingCache
cache = EmbeddingCache(Path(sys.argv[1]), "m", 2)
for number in range(1000000):
    cache.store([(f"text {number} {part}", (float(number), float(part))) for part in range(20)])
    print(number, flush=True)
"""


def test_a_killed_process_leaves_whole_batches_and_all_that_it_said(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": "cli"},
    )
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if int(line) == 30:
                process.send_signal(signal.SIGKILL)
                break
        said = [30, *(int(line) for line in process.stdout if line.endswith("\n"))]
    process.wait()
    with EmbeddingCache(tmp_path, "m", 2) as cache:
        for number in range(max(said) + 2):
            found = cache.find(f"text {number} {part}" for part in range(20))
            assert len(found) in ((20,) if number <= max(said) else (0, 20))
            assert all(vector == (float(number), float(text.rpartition(" ")[2])) for text, vector in found.items())


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    with EmbeddingCache(tmp_path, "m", 1) as one, EmbeddingCache(tmp_path, "m", 1) as other:
        one.store([("a", (1.0,))])
        other.store([("b", (2.0,)), ("a", (1.0,))])
        assert one.find(["a", "b", "c"]) == {"a": (1.0,), "b": (2.0,)}


# Local models


def test_the_built_in_model_embeds_without_a_network(tmp_path: Path) -> None:
    texts = ["one", "", "two", "one"]
    with EmbeddingCache(tmp_path, HASH_MODEL, DIMS) as cache:
        for _ in range(2):
            found = LocalEmbedder(HASH_MODEL, DIMS, cache=cache).embed(texts)
            assert reason_of(found.pop(1)) == "no-text"
            assert found == expected(["one", "two", "one"])
    with pytest.raises(ConfigError, match="1 to 4000"):
        LocalEmbedder(HASH_MODEL, 4001)


def test_a_local_model_without_its_library_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fastembed", "sentence_transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="neither is installed") as raised:
        LocalEmbedder("BAAI/bge-small-en-v1.5", 384)
    assert raised.value.hints[0] == "pip install 'memharbor[local]'"


class FakeFastembed:
    """As much of `fastembed.TextEmbedding` as is used; source: fastembed, Supported Models."""

    values = 4

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name

    @staticmethod
    def list_supported_models() -> list[dict[str, Any]]:
        return [{"model": "small", "dim": 4}]

    def embed(self, documents: list[str], batch_size: int) -> Iterator[list[float]]:
        return ([float(len(document))] * self.values for document in documents)


class FakeTransformer:
    """As much of `sentence_transformers.SentenceTransformer` as is used."""

    def __init__(self, name: str) -> None:
        if name == "none":
            raise OSError("none is not a local folder")

    def get_sentence_embedding_dimension(self) -> int:
        return 4

    def encode(self, texts: list[str], batch_size: int, show_progress_bar: bool) -> list[list[float]]:
        return [[float(len(text))] * 4 for text in texts]


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastembed", SimpleNamespace(TextEmbedding=FakeFastembed))
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=FakeTransformer))


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("model", ["small", "another"])
def test_a_local_model_embeds_in_order(model: str) -> None:
    texts = ["x" * (1 + number % 90) for number in range(200)]
    assert LocalEmbedder(model, 4).embed(texts) == [(float(len(text)),) * 4 for text in texts]


@pytest.mark.usefixtures("libraries")
def test_a_local_model_of_other_dimensions_is_refused_before_it_embeds(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("small", "another"):
        with pytest.raises(ConfigError, match="4 dimensions, not of 8"):
            LocalEmbedder(model, 8)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        LocalEmbedder("none", 4)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match="`fastembed` does not know `another`"):
        LocalEmbedder("another", 4)
    monkeypatch.setattr(FakeFastembed, "values", 3)
    with pytest.raises(EmbeddingError, match=r"\[3\] dimensions"):
        LocalEmbedder("small", 4).embed(["one"])


# Keys, fit, estimates


def test_a_key_is_found_in_a_file_before_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    named = {"OPENAI_API_KEY": "other", "OPENAI_API_KEY_FILE": str(file)}  # pragma: allowlist secret
    for found in (find_key("OPENAI_API_KEY", named), find_key("OPENAI_API_KEY", {}, file)):
        assert found is not None
        assert found.get_secret_value() == KEY
    assert find_key("OTHER", named) is None
    file.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        find_key("OPENAI_API_KEY", named)
    with pytest.raises(ConfigError, match="cannot be read"):
        find_key("OPENAI_API_KEY", {}, tmp_path / "nowhere")


FITS = {"schema_dims": 1536, "schema_distance": "cosine"}


@pytest.mark.parametrize(
    ("model", "dims", "options"),
    [
        (MODEL, 1536, FITS),
        ("text-embedding-3-large", 1536, FITS),
        ("text-embedding-ada-002", 1536, FITS | {"recorded_model": "text-embedding-ada-002"}),
        ("unknown", 1536, FITS | {"schema_distance": "l2", "distance": "l2"}),
        ("multi-qa-mpnet-base-dot-v1", 768, {"schema_dims": 768, "schema_distance": "inner_product"}),
    ],
)
def test_a_model_that_fits_is_let_through(model: str, dims: int, options: dict[str, Any]) -> None:
    check_fit(model, dims, **options)


@pytest.mark.parametrize(
    ("model", "dims", "options", "words"),
    [
        (MODEL, 768, FITS, "768 dimensions do not fit the schema, which has 1536"),
        (MODEL, 3072, FITS | {"schema_dims": 3072}, "at most 1536 dimensions, not of 3072"),
        ("text-embedding-ada-002", 512, FITS | {"schema_dims": 512}, "of 1536 dimensions, not of 512"),
        ("unknown", 1536, FITS | {"distance": "l2"}, "compared by l2, and the schema compares by cosine"),
        ("multi-qa-mpnet-base-dot-v1", 1536, FITS, "compared by inner_product"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(model: str, dims: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_fit(model, dims, **options)


def test_a_changed_model_is_refused_with_the_command_that_embeds_everything_again() -> None:
    with pytest.raises(StateRefusedError, match="were made by `text-embedding-ada-002`") as raised:
        check_fit(MODEL, 1536, **FITS, recorded_model="text-embedding-ada-002")
    assert raised.value.hints == (f"{REEMBED_COMMAND} --model {MODEL}",)


def test_an_estimate_is_scaled_from_a_sample_and_says_where_the_price_is_from() -> None:
    found = estimate(["word " * 80] * 5, MODEL, text_count=1000)
    assert (found.tokens, found.usd) == (100_000, pytest.approx(0.002))
    assert found.price_source is not None
    assert found.price_source.endswith("2026-11-21")
    assert estimate(["word " * 80], "unknown").usd is None
    assert estimate(["word " * 80], "unknown", usd_per_million_tokens=1.0).usd == pytest.approx(0.0001)
    assert (estimate([], MODEL).tokens, estimate([], MODEL).usd) == (0, 0.0)


@given(st.text(max_size=300))
def test_no_text_has_fewer_than_its_bytes_by_four_tokens(text: str) -> None:
    size_bytes = len(text.encode("utf-8", "surrogatepass"))
    assert size_bytes / 4 <= estimate_tokens(text) <= size_bytes
