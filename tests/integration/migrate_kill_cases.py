"""What is killed: a command that writes, on enough items for many segments, and all that stands before it."""

from __future__ import annotations

import gzip
import json
import sqlite3
import struct
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from mem0.memory.storage import SQLiteManager

from memharbor.migrate.record import pack_vector
from tests.containers import Server
from tests.integration.test_migrate_sources import (
    SOURCES,
    USERS,
    Arguments,
    identity,
    of_lines,
    payload,
    spell,
    vector,
)
from tests.platform_server import KEY, PlatformServer, memory_of
from tests.schema_databases import DIMS

# Items of a source, and of a segment.
COUNT, BATCH = 60, 5
# Those that a source of `SOURCES` does not have.
MORE = range(12, COUNT)
EMBED = ["--model", "memharbor-hash"]
AT_ONCE = ["migrate", "run", "--no-checkpoint"]
RUN = [*AT_ONCE, "--batch-size", str(BATCH)]


@dataclass(frozen=True)
class Case:
    """
    A command that is killed.

    Args:
        command: The words after `memharbor`.
        environ: Variables that it needs.
        before: Commands that made what it meets; they are left alone.
        goes_on: Whether `resume` goes on with it; else the same again.
        result: A file that is there when all is done, and not before.
    """

    command: Sequence[str]
    environ: dict[str, str] = field(default_factory=dict)
    before: Sequence[Sequence[str]] = ()
    goes_on: bool = True
    result: str | None = None

    @property
    def is_one_step(self) -> bool:
        """Whether it is no run of the pipeline."""
        return not self.goes_on

    @property
    def with_checkpoint(self) -> Case:
        """The same, after which the database can be rolled back."""
        return Case([each for each in self.command if each != "--no-checkpoint"], self.environ, self.before)


def grow_export(path: Path, _: dict[str, str]) -> None:
    found = json.loads(gzip.decompress(path.read_bytes()))
    found["results"] += [
        {"id": identity(n), "memory": f"fact {n}", "user_id": USERS[n % 2], "metadata": {"n": n}} for n in MORE
    ]
    path.write_bytes(gzip.compress(json.dumps(found).encode()))


def grow_lines(path: Path, _: dict[str, str]) -> None:
    lines = [json.dumps({"id": identity(n), **payload(n), "embedding": pack_vector(vector(n))}) for n in MORE]
    path.write_text("\n".join([path.read_text(), *lines]))


def grow_points(path: Path, _: dict[str, str]) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for n in MORE:
            data = {"data": f"fact {n}", "user_id": USERS[n % 2], "createdAt": f"2025-01-15T10:00:{n:02}.000Z"}
            packed = struct.pack(f"<{DIMS}f", *vector(n))
            # Ids of its own making, too.
            row = (identity(n) if n % 2 else f"p{n}", packed, json.dumps(data))
            connection.execute("insert into vectors values (?, ?, ?)", row)


def grow_history(path: Path, _: dict[str, str]) -> None:
    manager = SQLiteManager(str(path))
    for n in MORE:
        manager.add_history(identity(n), "before", f"fact {n}", "UPDATE", created_at=f"2025-01-15T10:00:{n:02}-08:00")
        manager.add_history(identity(n - 3), f"fact {n - 3}", None, "DELETE", is_deleted=1)
    manager.connection.close()


def grow_chatsg(path: Path, _: dict[str, str]) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        for n in MORE:
            row = (f"m{n}", n % 2 + 1, "s", f"fact {n}", struct.pack(f"<{DIMS}f", *vector(n)), "{}", "2025-01-15", None)
            connection.execute("insert into mem0_memories values (?, ?, ?, ?, ?, ?, ?, ?)", row)
            change = (n, f"m{n}", n % 2 + 1, "UPDATE", "old", f"fact {n}", "{}", f"2025-01-15 10:00:{n:02}")
            connection.execute("insert into mem0_history values (?, ?, ?, ?, ?, ?, ?, ?)", change)


def grow_openmemory(path: Path, _: dict[str, str]) -> None:
    at = "2026-01-01 10:00:00.000000"
    owners = [uuid.UUID(int=900 + n).hex for n in range(2)]
    app, category = uuid.UUID(int=990).hex, uuid.UUID(int=991).hex
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("insert into categories values (?, 'work', null, ?, ?)", (category, at, at))
        for n in MORE:
            state = ("active", "paused", "archived", "deleted")[n % 4]
            memory = uuid.UUID(int=n + 1).hex
            row = (memory, owners[n % 2], app, f"fact {n}", None, '{"n": 1}', state, at, at)
            moments = (at if state == "archived" else None, at if state == "deleted" else None)
            connection.execute("insert into memories values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, *moments))
            connection.execute("insert into memory_categories values (?, ?)", (memory, category))
            change = (uuid.UUID(int=5000 + n).hex, memory, owners[n % 2], "active", state, f"2026-01-01 10:00:{n:02}")
            connection.execute("insert into memory_status_history values (?, ?, ?, ?, ?, ?)", change)


def in_database(environ: dict[str, str]) -> closing[psycopg.Connection[Any]]:
    return closing(psycopg.connect(environ["MEMHARBOR_SOURCE_DSN"], autocommit=True))


def grow_mem0(_: Path | None, environ: dict[str, str]) -> None:
    with in_database(environ) as connection:
        for n in MORE:
            row = (identity(n), spell(vector(n)), json.dumps(payload(n)))
            connection.execute("insert into mymem values (%s, %s, %s)", row)
            entity = {"data": f"place {n}", "user_id": USERS[n % 2], "linked_memory_ids": [identity(n)]}
            connection.execute(
                "insert into mymem_entities values (%s, %s, %s)",
                (identity(100 + n), spell(vector(n)), json.dumps(entity)),
            )


def grow_vecs(_: Path | None, environ: dict[str, str]) -> None:
    with in_database(environ) as connection:
        for n in MORE:
            row = (f"memory:{n}", spell(vector(n)), json.dumps(payload(n)))
            connection.execute("insert into vecs.mem0 values (%s, %s, %s)", row)


def grow_canonical(_: Path | None, environ: dict[str, str]) -> None:
    with in_database(environ) as connection:
        for n in MORE:
            connection.execute(
                "insert into memories values"
                " (%s, %s, null, null, %s, null, '{\"n\": 1.5}', '{a,b}', %s, '2025-01-15', '2025-02-01')",
                (identity(n), USERS[n % 2], f"fact {n}", spell(vector(n))),
            )
            connection.execute(
                "insert into memory_relationships values (%s, %s, %s, 'related_to', 0.5, '{}', %s, '2025-01-15')",
                (identity(100 + n), identity(n), identity(n - 2), USERS[n % 2]),
            )


GROWN: dict[str, Callable[[Any, dict[str, str]], None]] = {
    "export": grow_export,
    "lines": grow_lines,
    "points": grow_points,
    "history": grow_history,
    "chatsg": grow_chatsg,
    "openmemory": grow_openmemory,
    "mem0": grow_mem0,
    "vecs": grow_vecs,
    "canonical": grow_canonical,
}
# Sources without embeddings, for which they are made.
EMBEDDED = ("export", "openmemory", "platform")


def grown(name: str, folder: Path, stack: ExitStack, server: Server) -> Arguments:
    """A source of `SOURCES` with more items."""
    if name == "platform":
        return platform(folder, stack)
    arguments, environ = SOURCES[name][0](folder, stack, server)
    path = Path(arguments[arguments.index("--input") + 1]) if "--input" in arguments else None
    GROWN[name](path, environ)
    return arguments, environ


def platform(_: Path, stack: ExitStack) -> Arguments:
    memories = [memory_of(f"fact {n}", n, user_id=USERS[n % 2], run_id="r" if n % 4 else None) for n in range(COUNT)]
    memories.append(memory_of("of an agent only", COUNT, agent_id="helper", expiration_date="2020-01-01"))
    memories.append(memory_of("of an app only", COUNT + 1, app_id="app"))
    server = stack.enter_context(PlatformServer(memories))
    return ["--from", "platform", "--url", server.base_url], {"MEM0_API_KEY": KEY}


def written(path: Path, data: Any) -> list[str]:
    path.write_text(json.dumps(data))
    return ["--from", "file", "--input", str(path)]


def plain_list(folder: Path, *, text: str = "fact") -> list[str]:
    """A list without embeddings, some of it with an owner, a time or an id that is none."""
    items: list[dict[str, Any]] = [
        {"id": identity(n), "memory": f"{text} {n}", "user_id": USERS[n % 2], "created_at": f"2025-01-15T10:00:{n:02}Z"}
        for n in range(COUNT)
    ]
    for n in range(3, COUNT, 11):
        items[n]["created_at"] = "soon"
    return written(folder / f"{text}.json", items)


def everything(folder: Path) -> list[str]:
    """Items of every kind in lines of our own: with and without embeddings, the same ones again, and bad ones."""

    def line(kind: str, source_id: str, data: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"memharbor_item": 1, "source": "elsewhere", "kind": kind, "source_id": source_id, "data": data, **more}

    lines = []
    for n in range(COUNT // 4):
        user = USERS[n % 2]
        carried = {} if n % 3 == 0 else {"vector": pack_vector(vector(n))}
        memory = line("memory", identity(n), payload(n), **carried)
        lines.append(memory)
        entity = {"data": f"place {n}", "user_id": user, "linked_memory_ids": [identity(n)]}
        lines.append(line("entity", identity(100 + n), entity))
        edge = {"source_memory_id": identity(n), "target_memory_id": identity(max(n - 4, n % 2)), "user_id": user}
        at = {"created_at": f"2025-01-16T10:00:{n:02}+00:00"}
        lines.append(line("relationship", identity(200 + n), {**edge, **at, "relationship_type": "next"}))
        change = {"memory_id": identity(n), "operation": "update", "old_value": {"data": "before"}, "user_id": user}
        lines.append(line("history", f"h{n}", {**change, "changed_at": f"2025-01-14T10:00:{n:02}+00:00"}))
        # Of the database's own time, once a memory.
        lines.append(line("history", f"g{n}", {**change, "old_value": {"data": "long before"}, "actor": f"a{n}"}))
        if n % 4 == 3:
            earlier = n - 3
            lines.append(lines[5 * (n // 4)])
            lines.append(line("memory", identity(300 + n), payload(earlier), vector=pack_vector(vector(earlier))))
            lines.append(line("memory", identity(earlier), {**payload(earlier), "data": "another"}))
            lines.append(line("memory", identity(400 + n), {"data": "", "user_id": user}))
    path = folder / "everything.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return ["--from", "file", "--input", str(path)]


def retry(folder: Path) -> Case:
    """What a run refused, and a person has mended."""
    items = [{"id": f"mem_{n}", "memory": f"fact {n}", "metadata": {"n": n}} for n in range(COUNT)]
    source = written(folder / "without-owner.json", items)
    letters = [
        {
            "step": "transformed",
            "segment": n // BATCH + 1,
            "reason": "no-owner",
            "detail": "it has none of user_id, agent_id and run_id",
            "item": {
                "kind": "memory",
                "source_id": f"mem_{n}",
                # Some stay as they are.
                "data": item | ({"user_id": USERS[n % 2]} if n % 9 else {}),
                "position": str(n + 1),
            },
        }
        for n, item in enumerate(items)
    ]
    mended = folder / "mended.jsonl"
    mended.write_text("".join(json.dumps(each) + "\n" for each in letters))
    return Case(["migrate", "retry", "--input", str(mended)], before=[[*AT_ONCE, *source, *EMBED]])


def make_case(name: str, folder: Path, stack: ExitStack, server: Server) -> Case:
    """Make what a case needs, and say what is killed."""
    if name in SOURCES:
        arguments, environ = grown(name, folder, stack, server)
        before = []
        if name == "history":
            memories, _ = of_lines(folder, stack, server)
            grow_lines(Path(memories[-1]), {})
            before = [[*AT_ONCE, *memories]]
        return Case([*RUN, *arguments, *(EMBED if name in EMBEDDED else [])], environ, before)
    simple: dict[str, Callable[[], Case]] = {
        "list": lambda: Case([*RUN, *plain_list(folder), *EMBED]),
        "everything": lambda: Case([*RUN, *everything(folder), *EMBED]),
        "retry": lambda: retry(folder),
        "embed": lambda: Case(["migrate", "embed", *EMBED], before=[[*AT_ONCE, *everything(folder)]], goes_on=False),
        "embed-all": lambda: Case(
            ["migrate", "embed", "--filter", "all", *EMBED], before=[[*AT_ONCE, *everything(folder)]], goes_on=False
        ),
    }
    if name in simple:
        return simple[name]()
    kind, _, detail = name.partition("-")
    if kind == "conflict":
        lines, _ = grown("lines", folder, stack, server)
        before = [[*AT_ONCE, *plain_list(folder, text="other"), *EMBED]]
        return Case([*RUN, *lines, "--on-conflict", detail], before=before)
    if kind == "read":
        arguments, environ = grown(detail, folder, stack, server)
        return Case(["migrate", "read", *arguments, "--output-file", "read.jsonl"], environ, goes_on=False)
    out = {"file": "out.jsonl.gz", "sqlite": "out.db"}[detail]
    command = ["migrate", "export", "--to", detail, "--output-file", out]
    return Case(command, before=[[*AT_ONCE, *everything(folder), *EMBED]], goes_on=False, result=out)


CASES = (
    *SOURCES,
    *("list", "everything", "retry", "embed", "embed-all", "conflict-overwrite", "conflict-new-id"),
    *("read-lines", "read-platform", "read-canonical", "export-file", "export-sqlite"),
)
