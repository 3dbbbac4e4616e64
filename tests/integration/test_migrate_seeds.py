"""
Every command, call and check of the seeds' migration guides has its row in the docs, and what stands right of it runs.

The left side is held equal to `tests/data/seed-migrations.txt`, which was taken from the guides.
"""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from memharbor.commands import cli
from memharbor.migrate.targets import zep_client
from memharbor.migrate.targets.zep_migrator import Mem0ToZepMigrator
from tests.command_line import ok
from tests.integration.test_migrate_chatsg import PGVECTOR, ChatSG
from tests.integration.test_migrate_commands import ids
from tests.integration.test_migrate_sources import vector
from tests.memory_database import Server
from tests.platform_server import KEY, PlatformServer, memory_of
from tests.schema_databases import DIMS, admin_connection, scratch_database
from tests.zep_server import KEY as ZEP_KEY
from tests.zep_server import ZepServer

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "seed-migrations.md"
LIST = ROOT / "tests" / "data" / "seed-migrations.txt"
SEEDS = ("000", "001", "002", "003", "004")
# How a row begins that has nothing to run and nowhere to look.
ANSWERS = ("Not here: ", "Not needed: ", "None on a command line", "The same: ")
SAME_STATEMENT = "The same statement"


@dataclass(frozen=True)
class Row:
    """A row: what stands in the code of its left side, and its right side."""

    there: tuple[str, ...]
    here: str

    @property
    def code(self) -> list[str]:
        return re.findall(r"`([^`]+)`", self.here)


@cache
def rows(seed: str) -> list[Row]:
    """Read the rows of one seed."""
    section = next(part for part in PAGE.read_text().split("\n## ") if f"\nSeed {seed}" in part)
    found = []
    for line in section.splitlines():
        cells = re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))
        if line.startswith("| ") and cells != ["There", "Here"]:
            assert len(cells) == 2, line
            left = [code.replace(r"\|", "|") for code in re.findall(r"`([^`]+)`", cells[0])]
            assert "".join(left) == re.sub(r"`|<br>", "", cells[0]).replace(r"\|", "|"), line
            found.append(Row(tuple(left), cells[1]))
    return found


def lines(seed: str) -> list[str]:
    """Read what the guide of a seed says."""
    section = next(part for part in LIST.read_text().split("\n## ") if part.startswith(seed))
    return [line.removesuffix("  # pragma: allowlist secret") for line in section.splitlines()[1:] if line]


def anchors(page: Path) -> set[str]:
    """List what a link can lead to, as GitHub spells it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# The page itself


@pytest.mark.parametrize("seed", SEEDS)
def test_every_line_of_a_seed_has_one_row(seed: str) -> None:
    there = [line for row in rows(seed) for line in row.there]
    assert sorted(there) == sorted(lines(seed))
    assert len(set(there)) == len(there)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_has_something_to_run_a_page_or_a_reason(seed: str) -> None:
    for row in rows(seed):
        runs = any(code.startswith(("memharbor ", "jq ")) for code in row.code)
        assert runs or row.here.startswith((*ANSWERS, SAME_STATEMENT)) or "](" in row.here, row.there


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", PAGE.read_text())
    assert links
    for path, anchor in links:
        page = (PAGE.parent / path).resolve()
        assert page.is_file(), path
        assert not anchor or anchor in anchors(page), f"{path}#{anchor}"


def test_calls_stand_in_pages_whose_code_is_executed() -> None:
    """Those of Mem0 by `test_mem0_config.py`, those of Zep by `test_migrate_zep.py`, or they are methods."""
    executed = "".join(
        (ROOT / "docs" / "how-to" / name).read_text() for name in ("upgrade-mem0.md", "migrate-to-zep.md")
    )
    begins = ("memory.", "client.", "MemoryClient(", "migrator", "validation =", "report =", "zep =")
    calls = {code for seed in SEEDS for row in rows(seed) for code in row.code if code.startswith(begins)}
    assert len(calls) >= 12
    for call in calls:
        name = call.partition(".")[2]
        is_method = name.isidentifier() and callable(getattr(Mem0ToZepMigrator, name, None))
        assert is_method or call.removesuffix('["results"]') in executed, call


def test_options_that_are_named_are_there() -> None:
    shown = CliRunner().invoke(cli, ["migrate", "run", "--help"]).output
    named = {code for seed in SEEDS for row in rows(seed) for code in row.code if code.startswith("--")}
    for option in named - {"--output-dir", "--supabase-url", "--stack"}:
        assert option in shown, option


def test_a_client_of_zep_waits_as_long_as_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEP_API_KEY", ZEP_KEY)
    for client in (zep_client.connect(), zep_client.connect(timeout_seconds=60)):
        with closing(client):
            assert client._client.timeout.read == 60


# What stands right


@dataclass
class Surroundings:
    """What a person has who types the commands of one seed, and what they answered."""

    dsn: str
    server: Server
    stack: ExitStack
    environ: dict[str, str] = field(default_factory=dict)
    urls: dict[str, str] = field(default_factory=dict)
    answers: dict[str, list[Any]] = field(default_factory=dict)
    platform: PlatformServer | None = None
    zep: ZepServer | None = None

    def run(self, command: str) -> None:
        """Run one command of the page; services are on this machine."""
        arguments = shlex.split(command.removeprefix("memharbor "))
        if "--help" in arguments:
            done = CliRunner().invoke(cli, arguments)
            assert done.exit_code == 0
            self.answers.setdefault(command, []).append(done.output)
            return
        for word, url in self.urls.items():
            arguments += ["--url", url] if word in arguments else []
        self.answers.setdefault(command, []).append(ok(self.dsn, *arguments, **self.environ))

    def answer(self, begin: str, number: int = 0) -> Any:
        """Get what the only command that begins so answered."""
        (found,) = [answers for command, answers in self.answers.items() if command.startswith(begin)]
        return found[number]

    def select(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement of theirs as the service, and take back what it did."""
        with closing(psycopg.connect(self.dsn)) as connection:
            connection.execute("set local role memharbor_service")
            return connection.execute(statement.encode()).fetchall()

    def load(self, users: dict[str, int]) -> None:
        """Let users have memories before the first command, in two sessions."""
        memories = [
            {"memory": f"{user} said {n}", "user_id": user, "metadata": {"role": "user"}, "id": f"{user} {n}"}
            | {"created_at": "2026-01-15T10:30:00Z", "run_id": f"{user.partition('-')[0]}-session-{455 + n % 2}"}
            for user, count in users.items()
            for n in range(count)
        ]
        Path("before.json").write_text(json.dumps(memories))
        ok(self.dsn, "migrate", "run", "--from", "file", "--input", "before.json", "--no-checkpoint")


def with_platform(to: Surroundings, memories: list[dict[str, Any]]) -> None:
    to.platform = to.stack.enter_context(PlatformServer(memories))
    to.environ["MEM0_API_KEY"] = KEY
    to.urls |= {"platform": to.platform.base_url, "sync-platform": to.platform.base_url}


def full_platform(to: Surroundings) -> None:
    with_platform(to, [memory_of(f"fact {n}", n, user_id=f"user-{n % 3 + 1}") for n in range(1500)])


def after_platform(to: Surroundings) -> None:
    assert to.answer("memharbor migrate read --from platform --output-file")["items"] == {"memory": 1500}
    assert to.answer("jq ") == 1500
    assert to.answer("memharbor migrate read --from platform --users user-1")["items"] == {"memory": 500}
    assert to.answer("memharbor migrate run --from file --input platform-export-20250127.jsonl")["inserted"] == 0
    assert to.answer("memharbor migrate resume --until embed")["inserted"] == 0
    (resumed,) = to.answers["memharbor migrate resume"]
    assert (resumed["read"], resumed["inserted"]) == (1500, 1500)
    assert to.answer("memharbor migrate run --from platform")["same"] == 1500
    states = {each["name"]: each["state"] for each in to.answer("memharbor validate")}
    assert states["memory count"] == "ok"
    statements = {
        statement: to.select(statement) for row in rows("000") for statement in row.there if "SELECT" in statement
    }
    assert [statements[text] for text in list(statements)[:3]] == [[(1500,)], [(0,)], [(3,)]]
    assert len(statements) == 5
    assert to.answer("memharbor config mem0 --server")
    assert to.answer("memharbor migrate embed")["embedded"] == 0
    judged = to.answer("memharbor migrate run --from file --input platform-export.jsonl --dry-run")
    assert (judged["same"], judged["inserted"], judged["skipped"]) == (1500, 0, 0)
    assert to.answer("memharbor migrate compare")["different"] == 0
    with closing(psycopg.connect(to.dsn)) as connection:
        insert = next(line for line in lines("000") if line.startswith("INSERT"))
        values = "values (gen_random_uuid(), 'user-123', 'dark mode', '{\"category\": \"x\"}'::jsonb, null, '2025-01-15T10:00:00Z')"
        connection.execute("set local role memharbor_service")
        assert connection.execute(f"{insert} {values}".encode()).rowcount == 1
        connection.rollback()


def old_program(to: Surroundings) -> None:
    with_platform(to, [])
    to.load({"user123": 12, "other": 3})
    old = {"embedder": "openai", "vector_store": "qdrant", "llm": "openai"}
    Path("old-config.json").write_text(json.dumps(old))
    Path("platform.json").write_text('{"custom_instructions": "Only facts about food."}')


def after_old_program(to: Surroundings) -> None:
    assert to.platform is not None
    assert to.answer("memharbor migrate export --users user123")["memories"] == 12
    first, second = to.answers["memharbor migrate export --to platform --users user123"]
    assert (first["counts"]["inserted"], second["counts"]["inserted"], second["counts"]["same"]) == (12, 0, 12)
    assert len(to.platform.memories) == 12
    assert to.answer("memharbor config sync-platform")
    assert "openai" in json.dumps(to.answer("memharbor config convert"))
    assert to.answer("memharbor schema verify") is not None
    assert len(ids(to.dsn)) == 15


def program_before_zep(to: Surroundings) -> None:
    to.zep = to.stack.enter_context(ZepServer())
    to.environ["ZEP_API_KEY"] = ZEP_KEY
    to.urls["zep"] = to.zep.base_url
    to.load({"mem0-user-123": 6, "zep-user-123": 5, "user-id": 4})
    name = to.stack.enter_context(scratch_database(to.server, rolled_out=False))
    with closing(admin_connection(to.server, name)) as connection:
        connection.execute("create extension vector")
        connection.execute(f"create table mem0 (id uuid primary key, vector vector({DIMS}), payload jsonb)".encode())
        for n in range(3):
            payload = json.dumps({"data": f"of Mem0 {n}", "user_id": "mem0-user"})
            connection.execute("insert into mem0 values (gen_random_uuid(), null, %s)", (payload,))
    to.environ["MEMHARBOR_SOURCE_DSN"] = to.server.admin_dsn(name)


def after_zep(to: Surroundings) -> None:
    assert to.zep is not None
    assert to.answer("memharbor migrate export --to zep --users nobody")["inserted"] == 0
    assert "/project" in {request.path for request in to.zep.requests}
    assert to.answer("memharbor migrate export --to zep --users mem0-user-123 --session")["inserted"] == 3
    assert len(to.zep.threads) == 2, "one session of two users"
    assert to.answer("memharbor migrate read")["items"] == {"memory": 3}
    assert to.answer("memharbor migrate export --to zep --input mem0-export.jsonl")["inserted"] == 3
    for user in ("zep-user-123 --session zep-session-456 --threads", "user-id"):
        done = to.answer(f"memharbor migrate export --to zep --users {user} --validate")
        assert done["validation"]["is_complete"]
    assert len(to.zep.episodes) == 3 + 2 + 3 + 4
    assert "--mapping" in to.answer("memharbor migrate export --help")


def after_supabase(to: Surroundings) -> None:
    foretold = to.answer("memharbor migrate run --from file --input platform-export.jsonl --dry-run")
    (done,) = to.answers["memharbor migrate run --from file --input platform-export.jsonl"]
    assert foretold["inserted"] == done["inserted"] == 1500
    assert to.answer("memharbor migrate embed")["embedded"] == 1500
    assert {each["state"] for each in to.answer("memharbor migrate status")} == {"complete"}
    assert to.answer("memharbor migrate rollback")
    assert ids(to.dsn) == set()


def chatsg_files(to: Surroundings) -> None:
    Path("backend").mkdir()
    with closing(sqlite3.connect("backend/vector_store.db")) as file, file:
        file.execute("create table vectors (id text primary key, vector blob not null, payload text not null)")
        for n in range(7):
            payload = json.dumps({"data": f"of the file {n}", "userId": "bob@example.org"})
            file.execute(
                "insert into vectors values (?, ?, ?)", (f"p{n}", struct.pack(f"<{DIMS}f", *vector(n)), payload)
            )
    with closing(sqlite3.connect("backend/memory.db")) as file, file:
        file.execute(
            "create table memory_history (id integer primary key, memory_id text, previous_value text, new_value text,"
            " action text, created_at text, updated_at text, is_deleted integer)"
        )
        change = ("00000000-0000-0000-0000-000000000001", "old", "fact 0", "UPDATE", "2026-01-15T10:30:00Z")
        file.execute(
            "insert into memory_history (memory_id, previous_value, new_value, action, created_at) values (?, ?, ?, ?, ?)",
            change,
        )
    name = to.stack.enter_context(scratch_database(to.server, rolled_out=False))
    to.environ["MEMHARBOR_SOURCE_DSN"] = ChatSG(to.server, name, PGVECTOR).dsn


def after_chatsg(to: Surroundings) -> None:
    assert to.answer("memharbor migrate run --from sqlite --input backend/vector_store.db")["inserted"] == 7
    # Whose the change is nobody can tell before its memory is there.
    assert to.answer("memharbor migrate run --from sqlite --input backend/memory.db")["reasons"] == {"dangling": 1}
    assert to.answer("memharbor migrate run --from canonical")["inserted"] == 24
    assert to.answer("memharbor migrate export --to sqlite")
    with closing(sqlite3.connect("chatsg.db")) as file:
        counts = dict(
            file.execute("select u.name, count(*) from users u join mem0_memories m on m.user_id = u.id group by 1")
        )
    assert counts == {"alice@example.org": 6, "bob@example.org": 13}


STORIES: dict[str, tuple[Callable[[Surroundings], None], Callable[[Surroundings], None]]] = {
    "000": (full_platform, after_platform),
    "001": (old_program, after_old_program),
    "002": (program_before_zep, after_zep),
    "003": (full_platform, after_supabase),
    "004": (chatsg_files, after_chatsg),
}


@pytest.fixture
def surroundings(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Surroundings]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MEMHARBOR_EMBEDDING_DIMS", str(DIMS))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for role in ("app", "service"):
        monkeypatch.setenv(f"MEMHARBOR_{role.upper()}_PASSWORD", server.passwords[role])
    with ExitStack() as stack:
        name = stack.enter_context(scratch_database(server))
        yield Surroundings(server.admin_dsn(name), server, stack)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_stands_right_runs_in_the_order_of_the_page(seed: str, surroundings: Surroundings) -> None:
    prepare, check = STORIES[seed]
    prepare(surroundings)
    for row in rows(seed):
        for code in row.code:
            if code.startswith("memharbor "):
                surroundings.run(code)
            elif code.startswith("jq ."):
                path, file = code.removeprefix("jq .").split()
                value = json.loads(Path(file).read_text())
                for name in path.split("."):
                    value = value[name]
                surroundings.answers[code] = [value]
        if row.here.startswith(SAME_STATEMENT):
            for statement in row.there:
                assert statement.startswith("INSERT") or surroundings.select(statement) is not None
    check(surroundings)
