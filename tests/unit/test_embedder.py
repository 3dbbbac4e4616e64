from __future__ import annotations

import base64
import json
import math
import os
import struct
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memharbor.embedder import EMBEDDER_NAME, EmbeddingServer, embed
from tests.openai_stub import OpenAIStub


def post(base_url: str, path: str, body: Any) -> dict[str, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(base_url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        decoded: dict[str, Any] = json.load(answer)
    return decoded


def cosine(one: str, other: str) -> float:
    return sum(a * b for a, b in zip(embed(one, 384), embed(other, 384), strict=True))


def test_the_vectors_are_the_same_on_every_machine() -> None:
    vector = embed("Alice likes hiking in the Alps; Zoë likes 東京.", 384)
    digest = sha256(struct.pack("<384f", *vector)).hexdigest()
    assert (EMBEDDER_NAME, digest[:16]) == ("memharbor-hash-v1", "46bbc4a139b9c7f8")  # pragma: allowlist secret


@given(text=st.text(max_size=200), dims=st.integers(1, 400))
def test_every_text_has_a_vector_of_length_one_in_float32(text: str, dims: int) -> None:
    vector = embed(text, dims)
    assert len(vector) == dims
    assert math.isclose(sum(value * value for value in vector), 1.0, rel_tol=1e-5)
    assert list(struct.unpack(f"<{dims}f", struct.pack(f"<{dims}f", *vector))) == vector


@pytest.mark.parametrize("dims", [1, 2, 3, 8, 1536, 3072, 4000])
def test_every_dimension_that_a_stack_can_have_is_served(dims: int) -> None:
    assert math.isclose(sum(value * value for value in embed("one two three", dims)), 1.0, rel_tol=1e-5)


@pytest.mark.parametrize("dims", [0, -1, 4001])
def test_other_dimensions_are_refused(dims: int) -> None:
    with pytest.raises(ValueError, match="dims must be 1 to 4000"):
        embed("text", dims)


def test_texts_that_share_words_are_nearer_than_others() -> None:
    likes = "Alice likes hiking in the Alps"
    assert cosine(likes, "where does Alice like to hike?") > 0.3
    assert abs(cosine(likes, "Bob is allergic to peanuts")) < 0.15
    assert cosine("The dog sleeps", "the DOG sleeps!") == pytest.approx(1.0, abs=1e-6)


def test_the_server_answers_one_text_and_a_batch_in_order() -> None:
    with EmbeddingServer(16) as server:
        one = post(server.base_url, "/embeddings", {"input": "a", "model": "m"})
        batch = post(server.base_url, "/embeddings", {"input": ["b", "a"], "model": "m"})
    assert one["data"] == [{"object": "embedding", "index": 0, "embedding": embed("a", 16)}]
    assert [item["embedding"] for item in batch["data"]] == [embed("b", 16), embed("a", 16)]
    assert batch["model"] == EMBEDDER_NAME


def test_base64_and_float_carry_the_same_vector() -> None:
    with EmbeddingServer(16) as server:
        request = {"input": "text", "encoding_format": "base64", "dimensions": 5}
        encoded = post(server.base_url, "/embeddings", request)["data"][0]["embedding"]
    assert list(struct.unpack("<5f", base64.b64decode(encoded))) == embed("text", 5)


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[]",
        {},
        {"input": []},
        {"input": [1, 2]},
        {"input": "a", "dimensions": 4001},
        {"input": "a", "dimensions": "many"},
        {"input": "a", "encoding_format": "hex"},
    ],
)
def test_a_wrong_request_is_answered_as_openai_would(body: Any) -> None:
    with EmbeddingServer(4) as server, pytest.raises(urllib.error.HTTPError) as caught:
        post(server.base_url, "/embeddings", body)
    with caught.value as answer:
        assert answer.code == 400
        assert json.load(answer)["error"]["type"] == "invalid_request_error"


def test_an_unknown_endpoint_is_not_found() -> None:
    with EmbeddingServer(4) as server, pytest.raises(urllib.error.HTTPError) as caught:
        post(server.base_url, "/chat/completions", {})
    with caught.value as answer:
        assert answer.code == 404


def test_many_clients_are_served_at_once() -> None:
    with EmbeddingServer(32) as server, ThreadPoolExecutor(8) as clients:
        texts = [f"text {number}" for number in range(64)]
        answers = clients.map(lambda text: post(server.base_url, "/embeddings", {"input": text}), texts)
        assert [answer["data"][0]["embedding"] for answer in answers] == [embed(text, 32) for text in texts]


def test_the_server_has_an_address_inside_its_block_only() -> None:
    server = EmbeddingServer(4)
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        _ = server.base_url
    with server:
        base_url = server.base_url
    with pytest.raises(urllib.error.URLError):
        post(base_url, "/embeddings", {"input": "a"})


def test_loopback_is_exempt_from_proxies_while_the_server_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.delenv("no_proxy", raising=False)
    with EmbeddingServer(4):
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.org,127.0.0.1"
    assert os.environ["NO_PROXY"] == "example.org"
    assert "no_proxy" not in os.environ


def test_the_stub_answers_chats_with_the_facts_that_a_test_sets() -> None:
    with OpenAIStub(4) as stub:
        stub.facts = ["Alice likes tea"]
        answer = post(stub.base_url, "/chat/completions", {"model": "m", "messages": []})
        embedding = post(stub.base_url, "/embeddings", {"input": "a"})["data"][0]["embedding"]
    assert json.loads(answer["choices"][0]["message"]["content"]) == {
        "memory": [{"id": "0", "text": "Alice likes tea", "attributed_to": "user"}]
    }
    assert embedding == embed("a", 4)
