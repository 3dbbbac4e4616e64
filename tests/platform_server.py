"""
A loopback stand-in for Mem0 Platform: lists with pages and filters, adding, events, entities, a project, and faults.

It is written from the published description (docs.mem0.ai: API reference, Memory Filters, Entity-Scoped Memory, Direct
Import; mem0ai 2.2.1 `mem0/client/`), for tests only. Nobody has compared these parts with the live service:

- the order of a list (here: newest first), and that a page behind the last one answers 404;
- whether a filter by one entity hides memories that have another one too: the documents contradict each other, so
  `null_scoping` chooses;
- that `infer=false` keeps several ids on one memory, answers `results` at once, and answers none for a text that its
  scope has already;
- that v2 pages a bare array, that v1 and v2 take `show_expired`, and that `/v1/entities/` takes `page`;
- the words of errors, and that an event that is not there yet answers 404;
- which of the two documented shapes a queued write answers with where `infer=false` is queued at all: `queued` chooses;
- that a project shows all its settings whatever `fields` asks for, null for one that was never set, and that an update
  takes those it knows and passes over the others (`deaf` are passed over too).
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import SecretStr

from memharbor.migrate.http import Clock, HttpClient

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
KEY = "m0-loopbackKEYloopbackKEY"  # pragma: allowlist secret
ENTITIES = ("user_id", "agent_id", "app_id", "run_id")
PROJECT = "/api/v1/orgs/organizations/org-1/projects/proj-1/"
PROJECT_SETTINGS = ("custom_instructions", "custom_categories", "agent_custom_instructions", "multilingual", "decay")
_FILTER_FIELDS = {
    *ENTITIES,
    "created_at",
    "updated_at",
    "timestamp",
    "categories",
    "metadata",
    "keywords",
    "memory_ids",
}
_ADD_FIELDS = {"messages", *ENTITIES, "metadata", "infer", "custom_categories", "custom_instructions", "timestamp"}
_ADD_FIELDS |= {"agent_custom_instructions", "expiration_date", "structured_data_schema", "source"}


class RefusedError(Exception):
    """An answer with another status than 200."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


@dataclass
class Fault:
    """
    Something that goes wrong with one request.

    Args:
        kind: `status` answers one; `drop` closes the connection instead of answering; `late` does so after the work was
            done; `cut` does so in the middle of the body; `text` answers a page of HTML with status 200.
        path: Only requests of this path.
        skip: How many of these go well before.
        status: For `status`.
        headers: For `status`.
        body: For `status`.
    """

    kind: Literal["status", "drop", "late", "cut", "text"]
    path: str = ""
    skip: int = 0
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None


@dataclass(frozen=True)
class Request:
    """A request that came."""

    method: str
    path: str
    query: Mapping[str, str]
    body: Any
    headers: Mapping[str, str]


class PlatformServer:
    """
    Serve one project on 127.0.0.1, for as long as a `with` block lasts.

    Args:
        memories: As the lists show them, oldest first.
        versions: Which of v3, v2, v1 have a list; the others answer 404.
        null_scoping: Whether a filter that does not name an entity wants it to be null.
        page_size_max: More is cut to this.
        one_of_a_text: Whether a scope keeps one memory of a text.
        polls: How often an event is asked for before it is done; 0 answers results at once.
        event_ends: What an event comes to.
        queued: Where a write that is only queued tells its event: in the answer itself, or in its results.
    """

    def __init__(
        self,
        memories: Iterable[dict[str, Any]] = (),
        *,
        versions: Iterable[str] = ("v3", "v2", "v1"),
        null_scoping: bool = False,
        page_size_max: int = 200,
        one_of_a_text: bool = True,
        polls: int = 0,
        event_ends: str = "SUCCEEDED",
        queued: Literal["answer", "results", "both"] = "answer",
    ) -> None:
        self.memories = list(memories)
        self.versions = set(versions)
        self.null_scoping = null_scoping
        self.page_size_max, self.one_of_a_text = page_size_max, one_of_a_text
        self.polls, self.event_ends, self.queued = polls, event_ends, queued
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.project: dict[str, Any] = dict.fromkeys(PROJECT_SETTINGS)
        self.deaf: set[str] = set()
        self.limits: list[dict[str, str]] = []  # headers of answers, one after the other
        self._events: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def count(self, path: str) -> int:
        """Say how many requests of a path came."""
        return sum(request.path == path for request in self.requests)

    def fault_for(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.path in ("", path):
                    if fault.skip:
                        fault.skip -= 1
                        return None
                    self.faults.remove(fault)
                    return fault
        return None

    def answer(self, request: Request) -> Any:
        if request.headers.get("authorization") != f"Token {KEY}":
            raise RefusedError(401, f"Given token not valid: {request.headers.get('authorization')}")
        with self._lock:
            match (request.method, request.path):
                case ("GET", "/v1/ping/"):
                    return {"status": "ok", "org_id": "org-1", "project_id": "proj-1", "user_email": "me@example.com"}
                case ("POST", "/v3/memories/" | "/v2/memories/") | ("GET", "/v1/memories/"):
                    return self._list(request)
                case ("POST", "/v3/memories/add/"):
                    return self._add(request.body)
                case ("GET", "/v1/entities/"):
                    return self._entities(request)
                case ("GET", path) if path.startswith("/v1/event/"):
                    return self._event(path.split("/")[3])
                case ("GET", path) if path == PROJECT:
                    return {"id": 1, **self.project}
                case ("PATCH", path) if path == PROJECT:
                    known = set(self.project) - self.deaf
                    self.project |= {name: value for name, value in request.body.items() if name in known}
                    return {"message": "Updated custom instructions"}
        raise RefusedError(404, "Not found.")

    def _list(self, request: Request) -> Any:
        version = request.path.split("/")[1]
        if version not in self.versions:
            raise RefusedError(404, "Not found.")
        if version == "v1":
            filters: Any = {"AND": [{name: value} for name, value in request.query.items() if name in ENTITIES]}
            show_expired = request.query.get("show_expired") == "true"
        else:
            if set(request.body) & set(ENTITIES):
                raise RefusedError(400, "Top-level entity ids are not supported, use filters.")
            filters, show_expired = request.body.get("filters") or {}, request.body.get("show_expired", False)
        _check_filters(filters)
        if not _named(filters):
            raise RefusedError(400, "One of the filters: app_id, user_id, agent_id, run_id is required!")
        today = datetime.now(UTC).date().isoformat()
        found = [
            memory
            for memory in reversed(self.memories)
            if _matches(memory, filters, wildcards=version != "v1")
            and (show_expired or not memory.get("expiration_date") or memory["expiration_date"] >= today)
            and not (self.null_scoping and any(_value(memory, e) for e in set(ENTITIES) - _named(filters)))
        ]
        return self._paged(request, found, 100, bare=version == "v2")

    def _paged(self, request: Request, found: list[Any], default: int, *, bare: bool = False) -> Any:
        page, size = int(request.query.get("page", 1)), int(request.query.get("page_size", default))
        if size > 200:
            raise RefusedError(400, "page_size must be at most 200")
        size = min(size, self.page_size_max)
        results = found[(page - 1) * size : page * size]
        if page > 1 and not results:
            raise RefusedError(404, "Invalid page.")
        if bare:
            return results
        more = page * size < len(found)
        # An address that must not be followed: whoever does loses the key to it.
        following = f"http://127.0.0.1:1{request.path}?page={page + 1}&page_size={size}" if more else None
        return {"count": len(found), "next": following, "previous": None, "results": results}

    def _entities(self, request: Request) -> Any:
        named = [(f, str(_value(m, f))) for f in ENTITIES for m in self.memories if _value(m, f)]
        listed = [
            {"id": str(n), "name": name, "type": f.removesuffix("_id")}
            for n, (f, name) in enumerate(dict.fromkeys(named))
        ]
        return self._paged(request, listed, 50)

    def _add(self, body: Mapping[str, Any]) -> Any:
        ids = {name: body[name] for name in ENTITIES if body.get(name)}
        messages = body.get("messages")
        if set(body) - _ADD_FIELDS or not ids or not messages or body.get("infer") is not False:
            raise RefusedError(400, "Invalid input data.")
        if "[refuse]" in messages[0]["content"]:
            raise RefusedError(400, "Invalid input data: the content is not allowed.")
        text = messages[0]["content"]
        scope = [
            memory for memory in self.memories if {n: _value(memory, n) for n in ENTITIES if _value(memory, n)} == ids
        ]
        results: list[Any] = []
        if not self.one_of_a_text or not any(memory["memory"] == text for memory in scope):
            moment = datetime.fromtimestamp(body["timestamp"], UTC) if "timestamp" in body else datetime.now(UTC)
            stored = memory_of(text, metadata=body.get("metadata"), created_at=moment.isoformat(), **ids)
            stored["expiration_date"] = body.get("expiration_date")
            if not self.polls or self.event_ends == "SUCCEEDED":
                self.memories.append(stored)
            results = [{"id": stored["id"], "event": "ADD", "data": {"memory": text}}]
        if not self.polls:
            return {"results": results}
        event = str(uuid.uuid4())
        self._events[event] = {"left": self.polls, "results": results}
        queued = {"message": "Memory processing has been queued", "status": "PENDING", "event_id": event}
        if self.queued == "results":
            return {"results": [queued]}
        return {**queued, "results": []} if self.queued == "both" else queued

    def _event(self, name: str) -> Any:
        event = self._events[name]
        event["left"] -= 1
        if event["left"] > 1:
            raise RefusedError(404, "Not found.")  # not written yet
        if event["left"] == 1:
            return {"id": name, "status": "RUNNING", "results": None}
        return {"id": name, "status": self.event_ends, "results": event["results"]}


class FakeClock:
    """A clock on which waiting takes no time."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.seconds = 100.0

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds

    def clock(self) -> Clock:
        return Clock(self.sleep, lambda: self.seconds, lambda: NOW)


def client(server: PlatformServer, clock: FakeClock | None = None, **options: Any) -> HttpClient:
    """Make a client of a server, which waits on a fake clock."""
    return HttpClient(server.base_url, key=SecretStr(KEY), clock=(clock or FakeClock()).clock(), **options)


def memory_of(text: str, number: int | None = None, **fields: Any) -> dict[str, Any]:
    """Make a memory as the lists show it; `run_id` becomes `session_id`."""
    identity = uuid.uuid4() if number is None else uuid.UUID(int=number + 1)
    run = fields.pop("run_id", None)
    return {
        "id": str(identity),
        "memory": text,
        "user_id": None,
        "agent_id": None,
        "app_id": None,
        "session_id": run,
        "metadata": None,
        "categories": None,
        "structured_attributes": None,
        "replaced_by": None,
        "synthesized": False,
        "expiration_date": None,
        "created_at": "2026-01-15T10:30:00Z",
        "updated_at": "2026-01-15T10:30:00Z",
        **fields,
    }


def _value(memory: Mapping[str, Any], entity: str) -> Any:
    return memory.get("session_id" if entity == "run_id" else entity)


def _check_filters(filters: Mapping[str, Any]) -> None:
    for name, value in filters.items():
        if name in ("AND", "OR", "NOT"):
            if not isinstance(value, list):
                raise RefusedError(400, f"{name} takes a list")
            for each in value:
                _check_filters(each)
        elif name not in _FILTER_FIELDS:
            raise RefusedError(400, f"unknown filter {name}")


def _named(filters: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    for name, value in filters.items():
        if name in ("AND", "OR"):
            found = found.union(*map(_named, value))
        elif name in ENTITIES:
            found.add(name)
    return found


def _matches(memory: Mapping[str, Any], filters: Mapping[str, Any], *, wildcards: bool) -> bool:
    def one(name: str, wanted: Any) -> bool:
        if name == "AND":
            return all(_matches(memory, each, wildcards=wildcards) for each in wanted)
        if name == "OR":
            return any(_matches(memory, each, wildcards=wildcards) for each in wanted)
        if name == "NOT":
            return not any(_matches(memory, each, wildcards=wildcards) for each in wanted)
        found = _value(memory, name)
        return found is not None if wildcards and wanted == "*" else bool(found == wanted)

    return all(one(name, wanted) for name, wanted in filters.items())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, owner: PlatformServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.owner = owner

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, parts.path, query, json.loads(raw) if raw else None, headers)
        owner = self.server.owner
        owner.requests.append(request)
        fault = owner.fault_for(parts.path)
        if fault is not None and fault.kind == "drop":
            return self._hang_up()
        if fault is not None and fault.kind == "status":
            return self._send(fault.status, fault.body or {"detail": "try later"}, fault.headers)
        try:
            status, answer = 200, owner.answer(request)
        except RefusedError as exc:
            status, answer = exc.status, {"detail": exc.detail}
        if fault is not None and fault.kind == "late":
            return self._hang_up()
        if fault is not None and fault.kind == "text":
            return self._send(200, "<html>Sign in</html>", {"Content-Type": "text/html"})
        limits = owner.limits.pop(0) if owner.limits else {}
        return self._send(status, answer, limits, cut=fault is not None)

    do_GET = do_POST = do_PATCH = _serve  # noqa: N815 - the names of http.server

    def _send(self, status: int, answer: Any, headers: Mapping[str, str], *, cut: bool = False) -> None:
        body = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | dict(headers)).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Write no access log."""
