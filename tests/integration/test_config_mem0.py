"""What `memharbor config mem0` prints, run with unmodified Mem0 through the pool of a real database.

The passwords of the roles hold what breaks a URI, so that only a percent-encoded one connects.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memharbor.mem0_config.for_stack import Printed
from tests.command_line import ok
from tests.containers import Server, find_engine_problem, running_server
from tests.memory_database import memory_database
from tests.old_mem0 import run_program
from tests.openai_stub import OpenAIStub

ROOT = Path(__file__).resolve().parents[2]
DIMS = 384
# Mem0 glues the parts of an address together as they are: with `/` and `@` the rest of the password is the host.
HARD = "p@ss/w0rd:#%2F?&= 'é${HOME}`x`\\"  # pragma: allowlist secret
FACT = "Alice likes to hike in the mountains"
USER = "config-alice"

ADD_AND_SEARCH = f"""
import json

added = memory.add([{{"role": "user", "content": "I like to hike in the mountains"}}], user_id={USER!r})
found = memory.search("likes to hike", filters={{"user_id": {USER!r}}})
kept = memory.get_all(filters={{"user_id": {USER!r}}})
print(json.dumps([[each["memory"] for each in result["results"]] for result in (added, found, kept)]))
"""


@pytest.fixture(scope="module")
def hard_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own: nobody else can live with such passwords."""
    problem = find_engine_problem()
    if problem:
        if os.environ.get("CI") == "true":
            pytest.fail(problem)
        pytest.skip(f"no Docker engine answers: {problem}")
    with running_server(tmp_path_factory.mktemp("server")) as started:
        started.passwords |= {"service": f"{HARD}service", "app": f"{HARD}app"}
        yield started


@pytest.fixture(scope="module")
def database(hard_server: Server) -> str:
    return memory_database(hard_server, "config_mem0", DIMS)


@pytest.fixture
def stub() -> Iterator[OpenAIStub]:
    with OpenAIStub(DIMS) as running:
        running.facts = [FACT]
        yield running


def print_configuration(server: Server, database: str, kind: str) -> Printed:
    """Ask the command for a database behind its pool, and see that no password is told."""
    assert server.pool_address is not None
    dsn = server.admin_dsn(database).replace(server.address, server.pool_address)
    passwords = {f"MEMHARBOR_{role.upper()}_PASSWORD": server.passwords[role] for role in ("service", "app")}
    data = ok(dsn, "config", "mem0", f"--{kind}", MEMHARBOR_EMBEDDING_DIMS=str(DIMS), **passwords)
    told = json.dumps(data, ensure_ascii=False)
    assert not any(password in told for password in (*server.passwords.values(), HARD, "p%40ss"))
    assert server.pool_address.partition(":")[2] in told
    form = data["environment"] if kind == "server" else data["config"]
    return Printed(data.get("python", ""), form, tuple(data["notes"]))


def run(program: str, folder: Path, stub: OpenAIStub, **environ: str) -> Any:
    """Run what was printed and what is asked of it; its last line is the answer."""
    done = run_program(
        sys.executable,
        program,
        folder / "program",
        stub.base_url,
        PYTHONPATH=str(ROOT / "cli"),
        MEM0_HISTORY_DB=str(folder / "history.db"),
        **environ,
    )
    return json.loads(done.splitlines()[-1])


def encoded(printed: Printed, variable: str, password: str) -> str:
    """Do what a note says about the percent-encoded variable, in a shell."""
    (note,) = [note for note in printed.notes if f"export {variable}_ENCODED=" in note]
    command = note.partition(": ")[2].replace("python3", shlex.quote(sys.executable))
    script = f'{command}; printf %s "${variable}_ENCODED"'
    done = subprocess.run(
        ["bash", "-euc", script], env={**os.environ, variable: password}, capture_output=True, text=True, check=True
    )
    assert done.stdout
    assert not set("@/:#?& '$`\\") & set(done.stdout)
    return done.stdout


def test_the_basic_program_finds_what_it_adds(
    hard_server: Server, database: str, stub: OpenAIStub, tmp_path: Path
) -> None:
    printed = print_configuration(hard_server, database, "basic")
    password = hard_server.passwords["service"]
    answer = run(printed.text + ADD_AND_SEARCH, tmp_path, stub, MEMHARBOR_SERVICE_PASSWORD=password)
    assert answer == [[FACT]] * 3
    with pytest.raises(AssertionError, match="MEMHARBOR_SERVICE_PASSWORD"):
        run(printed.text, tmp_path, stub)


def test_the_basic_data_does_too_with_its_references_put_in(
    hard_server: Server, database: str, stub: OpenAIStub, tmp_path: Path
) -> None:
    printed = print_configuration(hard_server, database, "basic")
    text = json.dumps(printed.data)
    program = f"""
import json, os
from mem0 import Memory

memory = Memory.from_config(json.loads(os.path.expandvars({text!r})))
""" + ADD_AND_SEARCH.replace(USER, f"{USER}-data")
    variable = "MEMHARBOR_SERVICE_PASSWORD"
    given = encoded(printed, variable, hard_server.passwords["service"])
    assert run(program, tmp_path, stub, **{f"{variable}_ENCODED": given}) == [[FACT]] * 3


def test_the_enterprise_program_gives_each_user_a_memory_of_their_own(
    hard_server: Server, database: str, stub: OpenAIStub, tmp_path: Path
) -> None:
    printed = print_configuration(hard_server, database, "enterprise")
    program = (
        printed.text
        + """
import json

alice, bob = memory_of("config-carol"), memory_of("config-bob")
alice.add([{"role": "user", "content": "I like to hike in the mountains"}], user_id="config-carol")
ours, theirs = [], []
for found, memory in ((ours, alice), (theirs, bob)):
    for rerank in (False, True):
        results = memory.search("likes to hike", filters={"user_id": "config-carol"}, rerank=rerank)["results"]
        found.append([each["memory"] for each in results])
reranked = alice.search("likes to hike", filters={"user_id": "config-carol"}, rerank=True)["results"]
print(json.dumps([ours, theirs, "rerank_score" in reranked[0]]))
"""
    )
    answer = run(program, tmp_path, stub, MEMHARBOR_APP_PASSWORD=hard_server.passwords["app"])
    assert answer == [[[FACT], [FACT]], [[], []], True]


# As Mem0's own server reads its variables. Source: mem0ai/mem0, server/main.py, DEFAULT_CONFIG.
OWN_SERVER = """
import os
from mem0 import Memory

memory = Memory.from_config(
    {
        "version": "v1.1",
        "vector_store": {
            "provider": "pgvector",
            "config": {
                "host": os.environ["POSTGRES_HOST"],
                "port": int(os.environ["POSTGRES_PORT"]),
                "dbname": os.environ["POSTGRES_DB"],
                "user": os.environ["POSTGRES_USER"],
                "password": os.environ["POSTGRES_PASSWORD"],
                "collection_name": os.environ["POSTGRES_COLLECTION_NAME"],
            },
        },
        "llm": {"provider": "openai", "config": {"temperature": 0.2, "model": os.environ["MEM0_DEFAULT_LLM_MODEL"]}},
        "embedder": {"provider": "openai", "config": {"model": os.environ["MEM0_DEFAULT_EMBEDDER_MODEL"]}},
        "history_db_path": os.environ["MEM0_HISTORY_DB"],  # HISTORY_DB_PATH is a folder of the server's container
    }
)
"""


def test_the_servers_variables_connect_mem0s_own_server(
    hard_server: Server, database: str, stub: OpenAIStub, tmp_path: Path
) -> None:
    printed = print_configuration(hard_server, database, "server")
    variable = "MEMHARBOR_SERVICE_PASSWORD"
    given = encoded(printed, variable, hard_server.passwords["service"])
    # What Compose does with an `.env`: it puts in the references, once.
    environ = {name: value.replace(f"${{{variable}_ENCODED}}", given) for name, value in printed.data.items()}
    assert given in environ["POSTGRES_PASSWORD"]
    program = OWN_SERVER + ADD_AND_SEARCH.replace(USER, f"{USER}-server")
    assert run(program, tmp_path, stub, **environ) == [[FACT]] * 3
