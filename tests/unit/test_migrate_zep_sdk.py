"""
The unmodified SDK `zep-cloud`, as `>=4,<5` installs today, on the loopback server: it reads what our target wrote, and
sends what our target sends.

So the target, the server and Zep's own client agree on the format. The SDK lives in an environment of its own: nothing of
Memharbor needs it (`memharbor.migrate.targets.zep_client` says why).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memharbor.migrate.record import Record
from memharbor.migrate.targets.zep_migrator import Mem0ToZepMigrator
from tests import zep_server
from tests.platform_server import Request
from tests.zep_records import record, turn, words, write
from tests.zep_server import Fault, ZepServer, client

SDK = "zep-cloud>=4,<5"
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def python() -> Path:
    """Make an environment with the SDK, once for this machine; the package index is asked for it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "memharbor" / "zep-environments" / "4"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        uv = Path(sys.executable).parent / "uv"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        for command in (
            [uv, "venv", "--quiet", "--python", version, folder],
            [uv, "pip", "install", "--quiet", "--python", folder / "bin" / "python", SDK],
        ):
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=600)
            assert done.returncode == 0, f"{SDK} cannot be installed: {done.stderr}"
        (folder / "complete").touch()
    return folder / "bin" / "python"


def run(python: Path, program: str, server: ZepServer, given: Any) -> Any:
    """Run a program with the SDK on a server: it reads `given` and prints JSON."""
    environ = {"ZEP_API_KEY": zep_server.KEY, "NO_PROXY": "127.0.0.1", "PATH": os.defpath}
    done = subprocess.run(
        [str(python), "-c", PRELUDE + program, server.base_url],
        input=json.dumps(given),
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PRELUDE = """
import json, sys
from importlib.metadata import version
from zep_cloud import AddMessage, BatchItemInput, Zep
zep = Zep(base_url=sys.argv[1])
given = json.load(sys.stdin)
assert version("zep-cloud").startswith("4."), version("zep-cloud")
def told(thing):
    assert not thing.model_extra, thing.model_extra  # what the SDK has no name for
    return {name: value for name, value in thing.model_dump().items() if value is not None}
"""

READING = """
found = {"project": told(zep.project.get()), "users": {}, "batches": []}
for name in given:
    user = zep.user.lookup(user_id=name)
    threads = list(zep.thread.list(user_uuid=user.uuid_))
    found["users"][name] = {
        "user": told(user),
        "episodes": [told(each) for each in zep.graph.episode.list(user.graph_uuid, page_size=7)],
        "threads": [[told(each) for each in zep.thread.list_messages(thread.uuid_, page_size=7)] for thread in threads],
    }
for batch in zep.batch.list(status="succeeded"):
    found["batches"].append([told(each) for each in zep.batch.list_items(batch.uuid_)])
print(json.dumps(found))
"""

# What our target sent, said once more by the SDK; ids of users, threads and batches are those that it was answered.
SENDING = """
ids = {}
def own(text):
    return ids.get(text, text)
for path, body, answer in given:
    match path.strip("/").split("/"):
        case ["users"]:
            made = zep.user.create(**body)
            ids[answer["uuid"]], ids[answer["graph_uuid"]] = made.uuid_, made.graph_uuid
        case ["threads"]:
            ids[answer["uuid"]] = zep.thread.create(user_uuid=own(body["user_uuid"])).uuid_
        case ["threads", thread, "messages"]:
            zep.thread.add_messages(own(thread), messages=[AddMessage(**each) for each in body["messages"]])
        case ["graphs", graph, "episodes"]:
            zep.graph.episode.add(own(graph), **body)
        case ["batches"]:
            ids[answer["uuid"]] = zep.batch.create(**body).uuid_
        case ["batches", batch, "items"]:
            items = [{**each, **{name: own(each[name]) for name in ("user_uuid", "thread_uuid") if name in each}}
                     for each in body["items"]]
            zep.batch.add_items(own(batch), items=[BatchItemInput(**each) for each in items])
        case ["batches", batch, "process"]:
            zep.batch.process(own(batch))
        case other:
            raise SystemExit(f"not said: {other}")
print(json.dumps(None))
"""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def memories() -> list[Record]:
    rich = {"memory_type": "preferences", "agent_id": "bot", "categories": ["food", "drink"], "app_id": 7}
    return [
        *(record(n, user_id="alice") for n in range(8)),
        record(8, "A sentence of many. " * 900, user_id="alice", **rich),
        *(turn(n, **({"memory_type": "insights"} if n % 2 else rich)) for n in range(20, 60)),
        turn(60, run_id="other", text="Another conversation, with an é and a 😀"),
        record(61, user_id="bob"),
    ]


@pytest.mark.parametrize("batch_items", [0, 40])
def test_the_sdk_reads_what_our_target_wrote(python: Path, tmp_path: Path, batch_items: int) -> None:
    with ZepServer() as server:
        with client(server) as http:
            migrator = Mem0ToZepMigrator(http, tmp_path, memories, threads=True, batch_items=batch_items)
            alice = {"id": "alice", "name": "Alice Doe", "email": "alice@example.com"}
            there = migrator.migrate_user(alice, role="user")
            assert migrator.migrate_all()["refused"] == 0
            speller = migrator._target.speller
        found = run(python, READING, server, ["alice", "bob"])
    assert found["project"]["uuid_"] == server.project
    user = found["users"]["alice"]["user"]
    assert (user["uuid_"], user["first_name"], user["last_name"]) == (there, "Alice", "Doe")
    assert (user["email"], user["metadata"]) == ("alice@example.com", {"role": "patient"})
    pieces = [piece for each in memories() for piece in speller.pieces(each)]
    for name in ("alice", "bob"):
        sent = {piece.key: piece for piece in pieces if piece.user_id == name}
        episodes = {key_of(each): each for each in found["users"][name]["episodes"]}
        assert len(found["users"][name]["episodes"]) == len(episodes)
        assert episodes.keys() == sent.keys()
        for key, episode in episodes.items():
            body = sent[key].body
            assert episode["content"] == body.get("data", body.get("content"))
            assert (episode["metadata"], episode["reference_time"]) == (body["metadata"], body["reference_time"])
            assert episode.get("source_description") == body.get("source_description")
            assert episode.get("role_name") == body.get("name")
        said = [each for thread in found["users"][name]["threads"] for each in thread]
        assert {key_of(each) for each in said} == {key for key, piece in sent.items() if piece.is_message}
        for message in said:
            body = sent[key_of(message)].body
            assert {field: message[field] for field in body} == body
    assert sorted(map(len, found["users"]["alice"]["threads"])) == [1, 40]
    items = [item for batch in found["batches"] for item in batch]
    assert bool(items) == bool(batch_items)
    assert {item["status"] for item in items} <= {"succeeded"}
    known = {episode["uuid_"] for user in found["users"].values() for episode in user["episodes"]}
    assert {item["episode_uuid"] for item in items} <= known


def key_of(item: Any) -> tuple[str, int]:
    return item["metadata"]["memharbor_id"], item["metadata"].get("memharbor_part", 1)


@pytest.mark.parametrize("batch_items", [0, 40])
def test_the_sdk_sends_what_our_target_sends(python: Path, tmp_path: Path, batch_items: int) -> None:
    ours: list[tuple[Request, Any]] = []

    class Recording(ZepServer):
        def answer(self, request: Request) -> Any:
            answer = super().answer(request)
            if is_write(request):
                ours.append((request, answer))
            return answer

    with Recording() as server, client(server) as http:
        migrator = Mem0ToZepMigrator(http, tmp_path, memories, threads=True, batch_items=batch_items)
        migrator.migrate_user({"id": "alice", "name": "Alice Doe", "email": "alice@example.com"}, role="user")
    with ZepServer() as server:
        run(python, SENDING, server, [(request.path, request.body, answer) for request, answer in ours])
        theirs = server.requests
    assert normal([request for request, _ in ours]) == normal(theirs)
    assert len(theirs) > 4
    for request in (*theirs, *(each for each, _ in ours)):
        assert request.headers["authorization"] == f"Api-Key {zep_server.KEY}"
    named = {name for request, _ in ours for name in request.headers if "idempotency" in name}
    assert named == {"idempotency-key"}


def is_write(request: Request) -> bool:
    return request.method == "POST" and not request.path.endswith(("/lookup", "/list"))


def normal(requests: list[Request]) -> list[str]:
    """Spell requests with ids by the order in which they come up."""
    order: dict[str, str] = {}
    spelled = []
    for request in requests:
        text = json.dumps([request.method, request.path, request.query, request.body], sort_keys=True)
        spelled.append(UUID.sub(lambda found: order.setdefault(found.group(), f"id {len(order)}"), text))
    return spelled


def test_the_sdk_doubles_a_write_whose_answer_is_lost_and_we_do_not(python: Path, tmp_path: Path) -> None:
    """Why the target does not use it: whether the service knows a write again is documented nowhere."""
    program = """
user = zep.user.create(user_id="alice")
zep.graph.episode.add(user.graph_uuid, data="likes tea")
print(json.dumps(None))
"""
    with ZepServer(keeps_keys=False) as server:
        server.faults = [Fault("late", "/graphs/*/episodes")]
        run(python, program, server, None)
        assert server.texts() == ["likes tea", "likes tea"]
    with ZepServer(keeps_keys=False) as server:
        server.faults = [Fault("late", "/graphs/*/episodes")]
        assert words(write(server, tmp_path, [record(1, "likes tea")])) == {"inserted": 1}
        assert server.texts() == ["likes tea"]
