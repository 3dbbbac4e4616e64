"""
A small deterministic embedder, and a loopback server that lets unmodified Mem0 use it.

It is for trying, validating and testing without an API key or a model: it knows shared words and word parts, no meaning.
Text becomes a hashed bag of words and character trigrams, of length one. The same text gives the same vector, bit for
bit, on every machine: hashes are BLAKE2, values are rounded to float32, which is what pgvector stores.

The server answers `POST /v1/embeddings` as OpenAI's API does, so that Mem0's own client talks to it through
`openai_base_url`. It listens on 127.0.0.1 only. Source: OpenAI API reference, Create embeddings.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import sys
import threading
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from memharbor.settings import EMBEDDING_DIMS_MAX

EMBEDDER_NAME = "memharbor-hash-v1"  # part of every answer; a change of the vectors is a new name
ANY_KEY = "unused"  # OpenAI's client wants a key; this server asks for none

# Short words are mostly articles and pronouns, so they say little of what a text is about.
_SHORT_WORD_LETTERS = 3
_SHORT_WORD_WEIGHT = 0.25
_TRIGRAM_WEIGHT = 0.35
_WORD = re.compile(r"\w+")


@lru_cache(maxsize=1 << 16)
def _feature_hash(feature: str) -> int:
    return int.from_bytes(blake2b(feature.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@lru_cache(maxsize=1 << 15)
def _word_features(word: str) -> tuple[tuple[int, float], ...]:
    weight = _SHORT_WORD_WEIGHT if len(word) <= _SHORT_WORD_LETTERS else 1.0
    padded = f" {word} "
    trigrams = [padded[start : start + 3] for start in range(len(padded) - 2)]
    features = [(_feature_hash("word:" + word), weight)]
    features += [(_feature_hash("part:" + trigram), weight * _TRIGRAM_WEIGHT) for trigram in trigrams]
    return tuple(features)


def embed(text: str, dims: int) -> list[float]:
    """
    Embed one text.

    Args:
        text: Any text; one without words (empty, or signs only) has a vector of its own too.
        dims: Length of the vector, 1 to 4000.

    Returns:
        `dims` floats of length one, each exactly a float32.

    Raises:
        ValueError: `dims` is out of range.

    >>> vector = embed("Alice likes hiking", 8)
    >>> len(vector), round(sum(value * value for value in vector), 6)
    (8, 1.0)
    """
    if not 1 <= dims <= EMBEDDING_DIMS_MAX:
        raise ValueError(f"dims must be 1 to {EMBEDDING_DIMS_MAX}, not {dims}")
    sums: dict[int, float] = {}
    for word in _WORD.findall(text.lower()):
        for hashed, weight in _word_features(word):
            position = (hashed >> 1) % dims
            sums[position] = sums.get(position, 0.0) + (weight if hashed & 1 else -weight)
    length = math.sqrt(math.fsum(value * value for value in sums.values()))
    if length < 1e-9:  # no word, or all cancelled out: a zero vector has no direction, and cosine distance is NaN
        sums, length = {_feature_hash("text:" + text) % dims: 1.0}, 1.0
    vector = array("f", bytes(4 * dims))
    for position, value in sums.items():
        vector[position] = value / length
    return vector.tolist()


class BadRequestError(Exception):
    """A request that the server cannot answer; its text goes back to the client."""


class EmbeddingServer:
    """
    Serve `embed` on 127.0.0.1 as an OpenAI-compatible endpoint, for as long as a `with` block lasts.

    Proxies from the environment would be asked for loopback addresses too, so `NO_PROXY` names 127.0.0.1 meanwhile.

    Args:
        dims: Length of the vectors where a request does not name `dimensions`.

    >>> with EmbeddingServer(8) as server:
    ...     server.base_url.startswith("http://127.0.0.1:")
    True
    """

    def __init__(self, dims: int) -> None:
        self.dims = dims
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None
        self._proxies = _without_proxy_for_loopback()

    @property
    def base_url(self) -> str:
        """The value for `openai_base_url`, with the port that the system chose."""
        if self._server is None:
            raise RuntimeError("the embedding server runs inside its `with` block only")
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def answer(self, path: str, request: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """
        Answer one request; a subclass may add endpoints.

        Args:
            path: Path below `/v1`, for instance `/embeddings`.
            request: The decoded body.

        Returns:
            The body of the answer, or `None` where there is no such endpoint.

        Raises:
            BadRequestError: The request is not one that can be answered.
        """
        return embeddings_answer(request, self.dims) if path == "/embeddings" else None

    def __enter__(self) -> Self:
        """Begin to listen on a free port."""
        self._proxies.__enter__()
        self._server = _LoopbackServer(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="embedder", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop listening; connections that clients keep open end with their threads."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = self._thread = None
        self._proxies.__exit__(kind, error, traceback)


def embeddings_answer(request: Mapping[str, Any], dims: int) -> dict[str, Any]:
    """
    Answer a request for embeddings in the shape of OpenAI's API.

    Args:
        request: `input` (a text or a list of texts), and optionally `model`, `dimensions`, `encoding_format`.
        dims: Length of the vectors where `dimensions` is absent.

    Raises:
        BadRequestError: `input` is no text, or a value is out of range.
    """
    given = request.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise BadRequestError("`input` must be a text or a list of texts")
    wanted = request.get("dimensions") or dims
    if not isinstance(wanted, int) or not 1 <= wanted <= EMBEDDING_DIMS_MAX:
        raise BadRequestError(f"`dimensions` must be 1 to {EMBEDDING_DIMS_MAX}")
    encoding = request.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise BadRequestError("`encoding_format` must be `float` or `base64`")
    encode = _encode_base64 if encoding == "base64" else list
    tokens = sum(len(text.split()) for text in texts)
    return {
        "object": "list",
        "model": EMBEDDER_NAME,
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(embed(text, wanted))}
            for index, text in enumerate(texts)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _encode_base64(vector: list[float]) -> str:
    """Encode as little-endian float32, as OpenAI's API does."""
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode("ascii")


class _LoopbackServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # clients keep their connections open, and their threads wait for the next request

    def __init__(self, owner: EmbeddingServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.owner = owner

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away in the middle of an answer."""


class _Handler(BaseHTTPRequestHandler):
    server: _LoopbackServer
    protocol_version = "HTTP/1.1"  # keep connections, as the OpenAI client does
    wbufsize = -1  # head and body in one packet, or a delayed acknowledgement costs 40 ms an answer
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            request = json.loads(body)
            if not isinstance(request, dict):
                raise BadRequestError("the body must be a JSON object")
            answer = self.server.owner.answer(self.path.removeprefix("/v1"), request)
        except (BadRequestError, ValueError) as exc:
            self._send(400, {"error": {"message": str(exc), "type": "invalid_request_error"}})
            return
        if answer is None:
            self._send(404, {"error": {"message": f"no endpoint {self.path}", "type": "invalid_request_error"}})
        else:
            self._send(200, answer)

    def _send(self, status: int, answer: Mapping[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no access log: stderr belongs to the program that runs the server."""


@contextmanager
def _without_proxy_for_loopback() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ("NO_PROXY", "no_proxy")}
    exempt = ",".join(filter(None, [before["NO_PROXY"] or before["no_proxy"], "127.0.0.1"]))
    os.environ.update(dict.fromkeys(before, exempt))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
