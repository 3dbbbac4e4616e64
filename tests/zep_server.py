"""
A loopback stand-in for Zep Cloud's API v4: users, episodes, threads, batches, lists with cursors, limits, and faults.

It is written from the published description (zep-cloud 4.0.1, help.getzep.com: SDK reference v4 and changelog 2026), for
tests only. `tests/unit/test_migrate_zep_sdk.py` runs the unmodified SDK against it. Nobody has compared these parts with the
live service:

- that a looked-up user that is not there answers 404, and one that is made twice 409;
- that an episode is in the lists, and in metadata filters, at once (the SDK says that it is readable immediately), and an
  item of a batch only when it was processed;
- that a list of episodes has the messages too, with their metadata and thread (in the words of the message, or others);
- how long an idempotency key is kept: `keeps_keys` chooses between for ever and not at all;
- the statuses of refusals (400 for a text or metadata over a limit, 409 for a batch that is no draft any more), and that
  one bad item refuses a whole call; that an account without batches answers 403;
- that `sequence_index` counts from 0, and that characters are counted as Python counts them;
- the words of errors.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import SecretStr

from memharbor.migrate.targets.zep_client import ZepClient
from tests.platform_server import FakeClock, RefusedError, Request

KEY = "z_loopbackKEY.loopbackKEY"  # pragma: allowlist secret
PROJECT = "0a4c6d1e-0000-4000-8000-000000000001"
_ROLES = {"system", "assistant", "user", "function", "tool"}


@dataclass
class Fault:
    """
    Something that goes wrong with one request.

    Args:
        kind: `status` answers one; `drop` closes the connection before anything is done; `late` does so after the work;
            `cut` in the middle of the answer; `text` answers a page of HTML.
        path: Below `/api/v4`, `*` for anything.
        skip: How many of these go well before.
        status, headers, body: For `status`.
        method: Only of this one; empty for any.
    """

    kind: Literal["status", "drop", "late", "cut", "text"]
    path: str = "*"
    skip: int = 0
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    method: str = ""


class ZepServer:
    """
    Serve one project on 127.0.0.1, for as long as a `with` block lasts.

    Args:
        has_batches: Whether the account may make batches.
        page_size_max: More is cut to this.
        keeps_keys: Whether a write with an idempotency key that was seen is answered, and not done.
        message_characters: Of the account.
        slow: How often a batch is asked for until it has ended.
        project: UUID of the key's project.
    """

    def __init__(
        self,
        *,
        has_batches: bool = True,
        page_size_max: int = 100,
        keeps_keys: bool = False,
        message_characters: int = 2500,
        slow: int = 0,
        project: str = PROJECT,
    ) -> None:
        self.has_batches, self.page_size_max, self.keeps_keys = has_batches, page_size_max, keeps_keys
        self.message_characters, self.slow, self.project = message_characters, slow, project
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.users: dict[str, dict[str, Any]] = {}
        self.threads: dict[str, dict[str, Any]] = {}
        self.episodes: list[dict[str, Any]] = []
        self.batches: dict[str, dict[str, Any]] = {}
        self.failing: set[str] = set()  # texts that batches cannot ingest
        self._answered: dict[tuple[str, str], Any] = {}
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
        return f"http://127.0.0.1:{self._server.server_port}/api/v4"

    def count(self, path: str, method: str = "POST") -> int:
        """Say how many requests of a path came; `*` stands for anything."""
        return sum(request.method == method and fnmatchcase(request.path, path) for request in self.requests)

    def texts(self, user_id: str | None = None) -> list[str]:
        """List what is in the graphs, or in one."""
        owners = {user["uuid"] for user in self.users.values() if user_id in (None, user["user_id"])}
        return [episode["content"] for episode in self.episodes if episode["user_uuid"] in owners]

    def keys(self) -> list[tuple[str, int]]:
        """List the memories and parts that are in the graphs."""
        marks = [episode["metadata"] for episode in self.episodes]
        return [(each["memharbor_id"], each.get("memharbor_part", 1)) for each in marks]

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fnmatchcase(path, fault.path) and fault.method in ("", method):
                    if fault.skip:
                        fault.skip -= 1
                        return None
                    self.faults.remove(fault)
                    return fault
        return None

    def answer(self, request: Request) -> Any:
        if request.headers.get("authorization") != f"Api-Key {KEY}":
            raise RefusedError(401, f"unknown key {request.headers.get('authorization')}")
        with self._lock:
            sent = request.path, request.headers.get("idempotency-key", "")
            if self.keeps_keys and sent[1] and sent in self._answered:
                return self._answered[sent]
            answer = self._route(request)
            if sent[1]:
                self._answered[sent] = answer
            return answer

    def _route(self, request: Request) -> Any:
        match request.method, request.path.strip("/").split("/"):
            case "GET", ["project"]:
                return {"uuid": self.project, "name": "test"}
            case "POST", ["users"]:
                return self._add_user(request.body)
            case "POST", ["users", "lookup"]:
                found = [user for user in self.users.values() if user["user_id"] == request.body.get("user_id")]
                if not found:
                    raise RefusedError(404, "user not found")
                return found[0]
            case "POST", ["graphs", owner, "episodes"]:
                return self._add_episode(owner, request.body)
            case "POST", ["graphs", owner, "episodes", "list"]:
                return self._list_episodes(owner, request)
            case "POST", ["threads"]:
                return self._add_thread(request.body)
            case "GET", ["threads"]:
                user = request.query.get("user_uuid")
                return self._paged(request, [each for each in self.threads.values() if each["user_uuid"] == user])
            case "GET", ["threads", thread, "messages"]:
                found = [each for each in self.episodes if each.get("thread_uuid") == thread]
                return self._paged(request, [_shown(each, user_uuid="", source="") for each in found])
            case "POST", ["threads", thread, "messages"]:
                return self._add_messages(thread, request.body)
            case _, ["batches", *rest]:
                if not self.has_batches:
                    raise RefusedError(403, "the batch API is not in your plan")
                return self._batch(request, rest)
        raise RefusedError(404, "not found")

    def _add_user(self, body: Mapping[str, Any]) -> Any:
        user_id = body.get("user_id") or ""
        if len(user_id) > 500 or "[refuse]" in user_id:
            raise RefusedError(400, "user_id is not valid")
        if any(user["user_id"] == user_id for user in self.users.values()):
            raise RefusedError(409, "user_id is taken")
        made = {"uuid": str(uuid.uuid4()), "graph_uuid": str(uuid.uuid4()), **body}
        self.users[made["uuid"]] = made
        return made

    def _user(self, owner: str) -> dict[str, Any]:
        found = [user for user in self.users.values() if owner in (user["uuid"], user["graph_uuid"])]
        if not found:
            raise RefusedError(404, "graph not found")
        return found[0]

    def _add_episode(self, owner: str, body: Mapping[str, Any]) -> Any:
        user = self._user(owner)
        if set(body) - {"data", "type", "metadata", "reference_time", "source_description"}:
            raise RefusedError(400, "unknown field")
        self._check(body["data"], 10_000, body)
        return {"episode": self._store(user, body["data"], body), "task": {"uuid": str(uuid.uuid4())}}

    def _store(self, user: Mapping[str, Any], text: str, body: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        made = {
            "uuid": str(uuid.uuid4()),
            "content": text,
            "metadata": body.get("metadata"),
            "source": "message" if more else "text",
            "reference_time": body.get("reference_time") or datetime.now(UTC).isoformat(),
            "user_uuid": user["uuid"],
            "processed": False,
            **more,
            **({"source_description": body["source_description"]} if "source_description" in body else {}),
        }
        self.episodes.append(made)
        return made

    def _check(self, text: str, limit: int, body: Mapping[str, Any]) -> None:
        if not text or len(text) > limit or "[refuse]" in text:
            raise RefusedError(400, f"the text is not allowed, or longer than {limit} characters")
        metadata = body.get("metadata") or {}
        if len(metadata) > 10:
            raise RefusedError(400, "metadata has more than 10 keys")
        for value in metadata.values():
            for each in value if isinstance(value, list) else [value]:
                if not isinstance(each, str | int | float | bool):
                    raise RefusedError(400, "metadata values must be scalars or arrays of scalars")
        if body.get("reference_time"):
            datetime.fromisoformat(body["reference_time"])

    def _list_episodes(self, owner: str, request: Request) -> Any:
        user = self._user(owner)
        found = [episode for episode in self.episodes if episode["user_uuid"] == user["uuid"]]
        group = ((request.body or {}).get("filters") or {}).get("metadata_filters") or {"filters": []}
        for wanted in group["filters"]:
            if wanted["operator"] != "in" or len(wanted["value"]) > 1000:
                raise RefusedError(400, "the filter is not valid")
            name, values = wanted["property_name"], wanted["value"]
            found = [episode for episode in found if (episode["metadata"] or {}).get(name) in values]
        return self._paged(request, [_shown(each, name="role_name") for each in found])

    def _add_thread(self, body: Mapping[str, Any]) -> Any:
        made = {"uuid": str(uuid.uuid4()), "user_uuid": self._user(body["user_uuid"])["uuid"]}
        self.threads[made["uuid"]] = made
        return made

    def _add_messages(self, thread: str, body: Mapping[str, Any]) -> Any:
        messages = body["messages"]
        if thread not in self.threads:
            raise RefusedError(404, "thread not found")
        if not 0 < len(messages) <= 30:
            raise RefusedError(400, "at most 30 messages")
        for message in messages:
            self._check_message(message)
        user = self._user(self.threads[thread]["user_uuid"])
        return {"messages": [self._store_message(user, thread, message) for message in messages]}

    def _check_message(self, message: Mapping[str, Any]) -> None:
        if message.get("role") not in _ROLES:
            raise RefusedError(400, "the role is not valid")
        self._check(message["content"], self.message_characters, message)

    def _store_message(self, user: Mapping[str, Any], thread: str, body: Mapping[str, Any]) -> dict[str, Any]:
        said = {"role": body["role"], "name": body.get("name")}
        return self._store(user, body["content"], body, thread_uuid=thread, **said)

    def _batch(self, request: Request, rest: list[str]) -> Any:
        match request.method, rest:
            case "GET", []:
                status = request.query.get("status")
                return self._paged(request, [each for each in self.batches.values() if each["status"] == status])
            case "POST", []:
                made = {"uuid": str(uuid.uuid4()), "status": "draft", "metadata": request.body.get("metadata")}
                self.batches[made["uuid"]] = {**made, "items": [], "left": self.slow}
                return made
        if rest[0] not in self.batches:
            raise RefusedError(404, "batch not found")
        batch = self.batches[rest[0]]
        match request.method, rest[1:]:
            case "GET", []:
                self._go_on(batch)
                return {name: batch[name] for name in ("uuid", "status", "metadata")}
            case "GET", ["items"]:
                return self._paged(request, [each["shown"] for each in batch["items"]])
        if batch["status"] != "draft":
            raise RefusedError(409, "the batch is no draft")
        match request.method, rest[1:]:
            case "DELETE", []:
                del self.batches[rest[0]]
                return None
            case "POST", ["items"]:
                return self._add_items(batch, request.body["items"])
            case "POST", ["process"] if batch["items"]:
                batch["status"] = "queued"
                if not self.slow:
                    self._go_on(batch)
                return {"batch": {"uuid": batch["uuid"], "status": "queued"}, "task": {"uuid": str(uuid.uuid4())}}
        raise RefusedError(400, "not possible")

    def _add_items(self, batch: dict[str, Any], items: list[dict[str, Any]]) -> Any:
        if not 0 < len(items) <= 500 or len(batch["items"]) + len(items) > 50_000:
            raise RefusedError(400, "too many items")
        for item in items:
            if item["type"] == "thread_message":
                self._check_message(item)
            else:
                self._check(item["data"], 10_000, item)
        added, rejected = [], []
        for index, item in enumerate(items):
            owner = self.threads.get(item.get("thread_uuid", ""), item).get("user_uuid")
            if owner not in self.users:
                rejected.append({"index": index, "reason": "graph not found"})
                continue
            shown = {"uuid": str(uuid.uuid4()), "sequence_index": len(batch["items"]), "status": "pending"}
            batch["items"].append({"item": item, "owner": owner, "shown": shown})
            added.append(shown)
        return {"items": added, "rejected_items": rejected}

    def _go_on(self, batch: dict[str, Any]) -> None:
        if batch["status"] not in ("queued", "processing"):
            return
        batch["left"] -= 1
        if batch["left"] >= 0:
            batch["status"] = "processing"
            return
        for each in batch["items"]:
            item, user = each["item"], self.users[each["owner"]]
            text = item.get("data") or item["content"]
            if text in self.failing:
                each["shown"] |= {"status": "failed", "error": {"code": "rate_limited", "message": "later"}}
                continue
            is_message = item["type"] == "thread_message"
            made = self._store_message(user, item["thread_uuid"], item) if is_message else self._store(user, text, item)
            each["shown"] |= {"status": "succeeded", "episode_uuid": made["uuid"]}
        batch["status"] = (
            "partial" if any(each["shown"]["status"] == "failed" for each in batch["items"]) else "succeeded"
        )

    def _paged(self, request: Request, found: list[Any]) -> Any:
        size = min(int(request.query.get("page_size", 50)), self.page_size_max)
        start = int(request.query.get("cursor", "c0").removeprefix("c"))
        page = {"items": found[start : start + size]}
        return page | ({"next_cursor": f"c{start + size}"} if start + size < len(found) else {})


def _shown(item: Mapping[str, Any], **names: str) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in item.items() if names.get(name, name)}


def client(server: ZepServer, clock: FakeClock | None = None, **options: Any) -> ZepClient:
    """Make a client of a server, which waits on a fake clock."""
    return ZepClient(SecretStr(KEY), server.base_url, clock=(clock or FakeClock()).clock(), **options)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, owner: ZepServer) -> None:
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
        path = parts.path.removeprefix("/api/v4")
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, path, query, json.loads(raw) if raw else None, headers)
        owner = self.server.owner
        owner.requests.append(request)
        fault = owner.fault_for(self.command, path)
        if fault is not None and fault.kind == "drop":
            return self._hang_up()
        if fault is not None and fault.kind == "status":
            body = fault.body or {"error": {"code": "fault", "message": "try later"}}
            return self._send(fault.status, body, fault.headers)
        try:
            answer = owner.answer(request)
            status = 204 if answer is None else 200
        except RefusedError as exc:
            status, answer = exc.status, {"error": {"code": "refused", "message": exc.detail}}
        if fault is not None and fault.kind == "late":
            return self._hang_up()
        if fault is not None and fault.kind == "text":
            return self._send(200, "<html>Sign in</html>", {"Content-Type": "text/html"})
        return self._send(status, answer, {}, cut=fault is not None)

    do_GET = do_POST = do_DELETE = _serve  # noqa: N815 - the names of http.server

    def _send(self, status: int, answer: Any, headers: Mapping[str, str], *, cut: bool = False) -> None:
        body = b"" if answer is None else answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | dict(headers)).items():
            self.send_header(name, value)
        if status != 204:
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
