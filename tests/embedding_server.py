"""
A loopback embedding endpoint that has limits, and that fails on request, as OpenAI's and others do.

What it embeds with is `memharbor.embedder`, so that a test knows what each text must become.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from memharbor.embedder import BadRequestError, _Handler
from tests.openai_stub import OpenAIStub


@dataclass(frozen=True)
class Fault:
    """What is answered instead of embeddings; status 0 closes the connection without an answer."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": {"message": "try again"}}'


class StrictEmbeddingServer(OpenAIStub):
    """
    Serve embeddings on 127.0.0.1 within limits.

    Args:
        dims: Of the embeddings.
        inputs_max: Texts a request at most.
        tokens_max: Words a request at most.
        words_max: Words a text at most.

    Attributes:
        texts: How often each text was embedded.
        requests: The requests that were seen, refused ones included.
        keys: The `Authorization` headers that were seen.
        faults: Answered first, one a request.
        change: Changes an answer before it is sent.
        at_once: The most requests that were under way at the same time.
        gate: With a party for each request that must be under way before any is answered.
    """

    def __init__(self, dims: int, *, inputs_max: int = 2048, tokens_max: int = 300_000, words_max: int = 8192) -> None:
        super().__init__(dims)
        self.inputs_max, self.tokens_max, self.words_max = inputs_max, tokens_max, words_max
        self.texts: Counter[str] = Counter()
        self.requests: list[Mapping[str, Any]] = []
        self.keys: list[str | None] = []
        self.faults: list[Fault] = []
        self.change: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.gate: threading.Barrier | None = None
        self.refused_word: str | None = None
        self.at_once = 0
        self._under_way = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        super().__enter__()
        assert self._server is not None
        self._server.RequestHandlerClass = _FaultyHandler
        return self

    def answer(self, path: str, request: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if path != "/embeddings":
            return super().answer(path, request)
        with self._lock:
            self.requests.append(request)
            self._under_way += 1
            self.at_once = max(self.at_once, self._under_way)
        try:
            if self.gate is not None:
                self.gate.wait(timeout=30)
            self._check(request["input"])
            found = super().answer(path, request)
            with self._lock:
                self.texts.update(request["input"])
            changed: Mapping[str, Any] | None = self.change(dict(found or {}))
            return changed
        finally:
            with self._lock:
                self._under_way -= 1

    def take_fault(self) -> Fault | None:
        with self._lock:
            return self.faults.pop(0) if self.faults else None

    def _check(self, texts: list[str]) -> None:
        words = [len(text.split()) for text in texts]
        if len(texts) > self.inputs_max:
            raise BadRequestError(f"batch size {len(texts)} > maximum allowed batch size {self.inputs_max}")
        if max(words) > self.words_max:
            raise BadRequestError(
                f"This model's maximum context length is {self.words_max} tokens, however you requested {max(words)} tokens"
            )
        if sum(words) > self.tokens_max:
            raise BadRequestError(f"Requested {sum(words)} tokens, max {self.tokens_max} tokens per request")
        if self.refused_word is not None and any(self.refused_word in text for text in texts):
            raise BadRequestError("the content filter was triggered")


class _FaultyHandler(_Handler):
    def do_POST(self) -> None:  # noqa: N802 - the name that http.server calls
        owner: StrictEmbeddingServer = self.server.owner  # type: ignore[assignment]
        owner.keys.append(self.headers.get("Authorization"))
        fault = owner.take_fault()
        if fault is None:
            super().do_POST()
            return
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault.status == 0:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(fault.status)
        for name, value in fault.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(fault.body)))
        self.end_headers()
        self.wfile.write(fault.body)
