"""
The loopback Platform with what Mem0's own clients call beside what Memharbor calls: search, exports, a summary, v1.

Nobody has compared these parts with the live service. Source: mem0ai 0.1.118, 1.0.11 and 2.2.1 `mem0/client/`;
docs.mem0.ai, API reference (Create and Get Memory Export, Search Memories). Not described there, so that nothing may be
concluded from it here: what a summary looks like (`summary`, a text), what a model makes of an export's schema (here:
the memories in its first list), and scores (here: the share of the question's words).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from tests.platform_server import ENTITIES, KEY, PlatformServer, RefusedError, Request, memory_of


class ClientPlatform(PlatformServer):
    """Serve one project to Mem0's clients of all releases."""

    def __init__(self) -> None:
        super().__init__()
        # What 0.1 and 1.x know of a project, and 2.x no longer sends.
        self.project |= dict.fromkeys(("retrieval_criteria", "enable_graph", "version"))
        self._exports: dict[str, Any] = {}

    def answer(self, request: Request) -> Any:
        if request.headers.get("authorization") != f"Token {KEY}":
            return super().answer(request)
        match (request.method, request.path.split("/")):
            case ("POST", ["", "v1", "memories", ""]):
                return self._add_as_before(request.body)
            case ("POST", ["", version, "memories", "search", ""]):
                found = self._search(request, version)
                return {"results": found} if version == "v3" else found
            case ("POST", ["", "v1", "exports", ""]):
                return self._create_export(request)
            case ("POST", ["", "v1", "exports", "get", ""]):
                return self._get_export(request.body)
            case ("POST", ["", "v1", "summary", ""]):
                return {"summary": f"{len(self._listed(request, request.body['filters']))} memories"}
        return super().answer(request)

    def _add_as_before(self, body: Mapping[str, Any]) -> Any:
        """Keep the messages as they are; the service would have a model write memories of them."""
        if body.get("output_format") != "v1.1":
            raise RefusedError(400, "Invalid output_format.")
        ids = {name: body[name] for name in ENTITIES if body.get(name)}
        added = [memory_of(each["content"], metadata=body.get("metadata"), **ids) for each in body["messages"]]
        self.memories += added
        return {"results": [{"id": each["id"], "memory": each["memory"], "event": "ADD"} for each in added]}

    def _search(self, request: Request, version: str) -> list[Any]:
        body = request.body
        above = {name: body[name] for name in ENTITIES if name in body}
        if above and version != "v1":
            raise RefusedError(400, "Top-level entity ids are not supported, use filters.")
        filters = {"AND": [{name: value} for name, value in above.items()]} if above else body.get("filters")
        words = set(body["query"].lower().split())
        scored = [
            {**memory, "score": len(words & set(memory["memory"].lower().split())) / len(words)}
            for memory in self._listed(request, filters)
        ]
        scored = [memory for memory in scored if memory["score"] > body.get("threshold", 0.0)]
        return sorted(scored, key=lambda memory: -float(memory["score"]))[: body.get("top_k", 10)]

    def _create_export(self, request: Request) -> Any:
        body = request.body
        filters = body.get("filters") or {"AND": [{name: body[name]} for name in ENTITIES if name in body]}
        name = next(name for name, each in body["schema"]["properties"].items() if each["type"] == "array")
        key = str(uuid.uuid4())
        self._exports[key] = {name: [{"content": each["memory"]} for each in self._listed(request, filters)]}
        return {"message": "Memory export request received. The export will be ready in a few seconds.", "id": key}

    def _get_export(self, body: Mapping[str, Any]) -> Any:
        if body.get("memory_export_id") not in self._exports:
            raise RefusedError(404, "No memory export request found")
        return self._exports[body["memory_export_id"]]

    def _listed(self, request: Request, filters: Any) -> list[Any]:
        asked = Request("POST", "/v3/memories/", {"page_size": "200"}, {"filters": filters}, request.headers)
        return list(super().answer(asked)["results"])
