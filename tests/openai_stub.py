"""
A loopback stand-in for OpenAI: real embeddings of `memharbor.embedder`, canned chat completions.

Unmodified Mem0 reaches it through `OPENAI_BASE_URL`, so that `add(infer=True)` runs its whole pipeline. The facts that
the model "extracts" are set by the test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from memharbor.embedder import EmbeddingServer


class OpenAIStub(EmbeddingServer):
    """Serve embeddings and chat completions on 127.0.0.1."""

    def __init__(self, dims: int) -> None:
        super().__init__(dims)
        self.facts: Sequence[str] = ()
        self.chat_requests: list[Mapping[str, Any]] = []

    def answer(self, path: str, request: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Answer `/chat/completions` with the facts as Mem0's extraction prompt asks for them."""
        if path != "/chat/completions":
            return super().answer(path, request)
        self.chat_requests.append(request)
        memory = [{"id": str(number), "text": fact, "attributed_to": "user"} for number, fact in enumerate(self.facts)]
        return {
            "id": f"chatcmpl-{len(self.chat_requests)}",
            "object": "chat.completion",
            "created": 0,
            "model": request.get("model", "stub"),
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": json.dumps({"memory": memory})},
                }
            ],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }
