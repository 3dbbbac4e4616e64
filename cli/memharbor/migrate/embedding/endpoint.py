"""
Embed through an OpenAI-compatible endpoint: in batches, several at once, each text once and paid for once.

A batch that is too large for the endpoint is halved until it fits, and the smaller size is kept for what follows; a text
that is too large alone is refused, and the others go on. Every answer is in the cache before the next request is sent:
a process that is killed loses at most the answers that were under way.
Sources: OpenAI API reference, Create embeddings (2,048 inputs and 300,000 tokens a request, 8,192 tokens an input);
langchain-ai/langchain#31227 (how the limits are worded); huggingface/text-embeddings-inference, HTTP 413 and 422.
"""

from __future__ import annotations

import base64
import binascii
import math
import queue
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
from pydantic import SecretStr

from memharbor.errors import ConfigError, ConnectError, EmbeddingError, SourceDataError
from memharbor.migrate.embedding.cache import EmbeddingCache, unpack
from memharbor.migrate.embedding.local import checked_vector
from memharbor.migrate.embedding.model import Embedding, EmbeddingRefusal
from memharbor.migrate.http import Clock, HttpClient, words_of

INPUTS_MAX = 2048
TOKENS_MAX = 300_000
_BALANCED_TEXTS_MIN = 32  # smaller batches cost more in requests than they win by going side by side
_BYTES_PER_TOKEN_MIN = 2  # fewer are rare (emoji, random text), and a batch of them is halved
_REFUSED = (400, 413, 422)
_TOO_LONG = re.compile(
    r"context (length|size|window)|too (long|large|many|big)|n_ctx|tokens per request|(must have less|no more) than"
    r"|exceed.*(length|limit|max|context|tokens|size)|(length|tokens|size).*exceed|maximum (allowed|input|sequence|number)",
    re.IGNORECASE,
)
_PROBE = "memory"


@dataclass
class Usage:
    """
    What embedding took so far.

    Args:
        requests: That were answered.
        tokens: That the endpoint counted.
        embedded: Texts that it embedded.
        cached: Texts that were in the cache.
    """

    requests: int = 0
    tokens: int = 0
    embedded: int = 0
    cached: int = 0


class _RefusedError(Exception):
    """The endpoint does not take a batch; carries its words."""


class _Pace:
    """Lets requests go one interval apart, whichever thread sends them."""

    def __init__(self, max_rate: float | None, clock: Clock) -> None:
        self._interval = 1.0 / max_rate if max_rate else 0.0
        self._clock = clock
        self._next_at = -math.inf
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Wait for the next place."""
        if not self._interval:
            return
        with self._lock:
            now = self._clock.monotonic()
            place_at = max(now, self._next_at)
            self._next_at = place_at + self._interval
        if place_at > now:
            self._clock.sleep(place_at - now)


class _PacedClient(HttpClient):
    """A client that keeps to a pace with others, in every attempt."""

    def __init__(self, pace: _Pace, base_url: str, **options: Any) -> None:
        super().__init__(base_url, **options)
        self._pace = pace

    def _send(self, method: str, path: str, params: Mapping[str, Any] | None, body: Any) -> httpx.Response:
        self._pace.wait()
        return super()._send(method, path, params, body)


class EndpointEmbedder:
    """
    Embed through an OpenAI-compatible endpoint. A context manager.

    Args:
        base_url: Its address up to `/v1`, without a key.
        model: As the endpoint calls it.
        dims: Of its embeddings; sent for the models that make shorter ones on request.
        key: What the endpoint knows the caller by; `None` where it asks for none.
        cache: Where embeddings are kept.
        batch_size: Texts a request at most.
        batch_tokens: Tokens a request at most, by a guess that is on the high side.
        concurrency: Requests at once.
        max_rate: Requests a second at most of all together, retries included; `None` for as fast as answers come.
        encoding: `float`, which every endpoint knows, or `base64`, which is a third of the size.
        key_variable: The environment variable that the key came from, for hints.
        attempts: How often one request is tried at most.
        timeout_seconds: For a connection, and between two pieces of an answer.
        clock: Time.

    Raises:
        ConfigError: The address or the key is none, or the key would go over an open network in the clear.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        dims: int,
        key: SecretStr | None = None,
        *,
        cache: EmbeddingCache,
        batch_size: int = INPUTS_MAX,
        batch_tokens: int = TOKENS_MAX,
        concurrency: int = 4,
        max_rate: float | None = None,
        encoding: str = "float",
        key_variable: str = "OPENAI_API_KEY",
        attempts: int = 8,
        timeout_seconds: float = 120.0,
        clock: Clock | None = None,
    ) -> None:
        self.model = model
        self.dims = dims
        self.usage = Usage()
        self._cache = cache
        self._batch_size = batch_size
        self._batch_tokens = batch_tokens
        self._concurrency = concurrency
        self._is_balanced = max_rate is None
        self._lock = threading.Lock()
        self._request: dict[str, Any] = {"model": model, "encoding_format": encoding}
        if model.rpartition("/")[2].startswith("text-embedding-3"):
            self._request["dimensions"] = dims
        pace = _Pace(max_rate, clock or Clock())
        self._clients = [
            _PacedClient(
                pace,
                base_url,
                key=key,
                key_variable=key_variable,
                scheme="Bearer",
                attempts=attempts,
                timeout_seconds=timeout_seconds,
                clock=clock,
            )
            for _ in range(concurrency)
        ]
        self._address = self._clients[0].base_url
        self._free: queue.SimpleQueue[HttpClient] = queue.SimpleQueue()
        for client in self._clients:
            self._free.put(client)

    def __repr__(self) -> str:
        return f"EndpointEmbedder({self._address!r}, {self.model!r}, {self.dims})"

    def __enter__(self) -> Self:
        """Lend the embedder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections; the cache stays open."""
        for client in self._clients:
            client.close()

    def embed(self, texts: Sequence[str]) -> list[Embedding]:
        """
        Embed texts; see `Embedder`. The first failure ends it, after what is under way is answered and kept.

        Raises:
            EmbeddingError: The endpoint fails, or answers with the wrong shape.
            ConfigError: It refuses the key, or does not know the model.
        """
        unique = list(dict.fromkeys(text for text in texts if text.strip()))
        found: dict[str, Embedding] = dict(self._cache.find(unique))
        missing = [text for text in unique if text not in found]
        with self._lock:
            self.usage.cached += len(found)
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="embed")
        try:
            for made in pool.map(self._embed_batch, self._batches(missing)):
                found |= made
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        empty = EmbeddingRefusal("no-text", "it has no text to embed")
        return [found.get(text, empty) for text in texts]

    def _batches(self, texts: Sequence[str]) -> list[list[str]]:
        size = self._batch_size
        if self._is_balanced:
            size = min(size, max(_BALANCED_TEXTS_MIN, -(-len(texts) // self._concurrency)))
        batches: list[list[str]] = []
        tokens = 0
        for text in texts:
            cost = _tokens_at_most(text)
            if not batches or len(batches[-1]) >= size or tokens + cost > self._batch_tokens:
                batches.append([])
                tokens = 0
            batches[-1].append(text)
            tokens += cost
        return batches

    def _embed_batch(self, texts: list[str]) -> dict[str, Embedding]:
        """Embed a batch, in pieces where it is refused whole."""
        if len(texts) > self._batch_size:
            return self._halved(texts)
        try:
            return self._ask(texts)
        except _RefusedError as exc:
            if len(texts) == 1:
                return {texts[0]: self._refuse(str(exc))}
        made = self._halved(texts)
        if not any(isinstance(embedding, EmbeddingRefusal) for embedding in made.values()):
            # No text was to blame, so the batch was too large.
            with self._lock:
                self._batch_size = min(self._batch_size, -(-len(texts) // 2))
        return made

    def _halved(self, texts: list[str]) -> dict[str, Embedding]:
        middle = -(-len(texts) // 2)
        return self._embed_batch(texts[:middle]) | self._embed_batch(texts[middle:])

    def _refuse(self, words: str) -> EmbeddingRefusal:
        if _TOO_LONG.search(words):
            return EmbeddingRefusal("text-too-long", f"the endpoint does not take it: {words}")
        if not self._is_answering():
            raise EmbeddingError(
                f"`{self._address}` embeds nothing with model `{self.model}`: {words}",
                hint="check the model, its dimensions and the address",
            )
        return EmbeddingRefusal("rejected", f"the endpoint does not take it: {words}")

    def _is_answering(self) -> bool:
        """Tell one bad text from an endpoint that takes none."""
        try:
            return self.usage.requests > 0 or bool(self._ask([_PROBE]))
        except _RefusedError:
            return False

    def _ask(self, texts: list[str]) -> dict[str, Embedding]:
        """Send one request and keep its answer."""
        with self._client() as client:
            answer = client.request(
                "POST", "/embeddings", body={**self._request, "input": texts}, allow=(*_REFUSED, 404)
            )
        if answer.status == 404:
            raise ConfigError(
                f"`{self._address}` has no model `{self.model}`, or no embeddings: {words_of(answer.data)}",
                hint="check the model and the address, which ends in `/v1` for most endpoints",
            )
        if answer.status in _REFUSED:
            raise _RefusedError(words_of(answer.data) or f"status {answer.status}")
        made = dict(zip(texts, self._embeddings(answer.data, len(texts)), strict=True))
        self._cache.store((text, vector) for text, vector in made.items() if not isinstance(vector, EmbeddingRefusal))
        with self._lock:
            self.usage.requests += 1
            self.usage.tokens += _counted_tokens(answer.data)
            self.usage.embedded += len(made)
        return made

    @contextmanager
    def _client(self) -> Iterator[HttpClient]:
        client = self._free.get()
        try:
            yield client
        except (ConnectError, SourceDataError) as exc:
            raise EmbeddingError(exc.message, hint=exc.hints) from exc
        finally:
            self._free.put(client)

    def _embeddings(self, data: Any, count: int) -> list[Embedding]:
        """Check an answer and put its embeddings into the order of the texts."""
        listed = data.get("data") if isinstance(data, Mapping) else None
        if not isinstance(listed, list) or not all(isinstance(each, Mapping) for each in listed):
            raise self._wrong("no list of embeddings")
        by_index = {str(each.get("index", number)): each.get("embedding") for number, each in enumerate(listed)}
        if len(listed) != count or set(by_index) != {str(index) for index in range(count)}:
            raise self._wrong(f"{len(listed)} embeddings for {count} texts, or not one for each")
        return [self._embedding(by_index[str(index)]) for index in range(count)]

    def _embedding(self, given: Any) -> Embedding:
        if isinstance(given, str):
            try:
                packed = base64.b64decode(given, validate=True)
            except (binascii.Error, ValueError):
                raise self._wrong("an embedding that is no base64") from None
            given = list(unpack(packed[: len(packed) // 4 * 4]))
        if not isinstance(given, list):
            raise self._wrong("an embedding that is no list of numbers")
        if len(given) != self.dims:
            raise EmbeddingError(
                f"`{self._address}` gives embeddings of {len(given)} dimensions for `{self.model}`, not of {self.dims}",
                hint="name a model of the schema's dimensions; nothing was loaded",
            )
        return checked_vector(given)

    def _wrong(self, what: str) -> EmbeddingError:
        return EmbeddingError(f"`{self._address}` answers with {what}", hint="check that it is OpenAI-compatible")


def _tokens_at_most(text: str) -> int:
    return -(-len(text.encode("utf-8", "surrogatepass")) // _BYTES_PER_TOKEN_MIN)


def _counted_tokens(data: Any) -> int:
    usage = data.get("usage") if isinstance(data, Mapping) else None
    tokens = usage.get("total_tokens") if isinstance(usage, Mapping) else None
    return tokens if isinstance(tokens, int) else 0
