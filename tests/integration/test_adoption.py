"""
Mem0's own tables in the database that Memharbor is to live in: refused, renamed, rolled out and adopted.

The commands are those of docs/how-to/migrate.md, "Mem0's tables in the same database", in one shell.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from memharbor.names import ROLES
from tests.containers import Server
from tests.schema_databases import DIMS, admin_connection, scratch_database
from tests.unmodified_mem0 import unmodified_mem0

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-to" / "migrate.md"
USERS = ("alice", "bob", 'o\'brien-"日本"')
ROLL_OUT = "ansible-playbook ansible/playbooks/site.yml"


# The page speaks of the psql that a person has. A machine that only runs the tests may have none: then this stands in.
PSQL = f"""#!{sys.executable}
import sys, psycopg
address, option, statements = sys.argv[1:]
assert option == "-c"
with psycopg.connect(address) as connection:
    connection.execute(statements)
"""


def documented_block() -> str:
    section = PAGE.read_text().partition("\n## Mem0's tables in the same database\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```console\n(.*?)```", section, re.DOTALL)
    for said in ("rename to mem0_old", ROLL_OUT, "--from mem0-pgvector --collection mem0_old", "migrate compare"):
        assert said in block
    return str(block)


def shell(script: str, server: Server, name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script as somebody who follows the page: in a checkout, with the administrator's address."""
    others = ("MEMHARBOR_", "PG", "PULUMI_", "OPENAI_")
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    if shutil.which("psql") is None:
        (programs / "psql").write_text(PSQL)
        (programs / "psql").chmod(0o755)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    environ = {
        **inherited,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), str(programs), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT / "cli"),
        "ANSIBLE_CONFIG": str(ROOT / "ansible" / "ansible.cfg"),
        "ANSIBLE_FORCE_COLOR": "false",
        "NO_COLOR": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "MEMHARBOR_DSN": server.admin_dsn(name),
        "MEMHARBOR_EMBEDDING_DIMS": str(DIMS),
        **{f"MEMHARBOR_{role.upper()}_PASSWORD": server.passwords[role] for role in ROLES},
    }
    checkout = folder / "checkout"
    checkout.mkdir(exist_ok=True)
    for part in ("ansible", "sql_templates"):
        if not (checkout / part).exists():
            (checkout / part).symlink_to(ROOT / part)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=checkout,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def rows(server: Server, name: str, table: str) -> dict[str, tuple[str, Any]]:
    """Read a collection: the bits of each vector, and the payload."""
    with closing(admin_connection(server, name)) as connection:
        found = connection.execute(
            f"select id::text, encode(vector_send(vector), 'hex'), payload from public.{table}".encode()
        ).fetchall()
    return {key: (bits, payload) for key, bits, payload in found}


def write_with_mem0(dsn: str) -> dict[str, str]:
    """Let unmodified Mem0 make its tables and write memories and entities; returns what each memory says."""
    written = {}
    with unmodified_mem0("service", dsn, dims=DIMS) as memories:
        for user in USERS:
            memory = memories.of(user)
            for number in range(4):
                message = [{"role": "user", "content": f"{user} went on journey {number}"}]
                added = memory.add(message, user_id=user, metadata={"number": number}, infer=False)["results"]
                written[added[0]["id"]] = added[0]["memory"]
            memory._upsert_entity(f"Zubin of {user}", "PROPER", added[0]["id"], {"user_id": user})
        changed = next(iter(written))
        memory.update(changed, text="Alice went nowhere")
        written[changed] = "Alice went nowhere"
    return written


def test_the_documented_block_adopts_what_mem0_wrote(server: Server, tmp_path: Path) -> None:
    with scratch_database(server, rolled_out=False) as name:
        with closing(admin_connection(server, name)) as connection:
            connection.execute("create extension vector")
        written = write_with_mem0(server.admin_dsn(name))
        before = {table: rows(server, name, table) for table in ("mem0", "mem0_entities")}
        assert (set(before["mem0"]), len(before["mem0_entities"])) == (set(written), len(USERS))

        done = shell(ROLL_OUT, server, name, tmp_path)
        said = re.sub(r"\s+", " ", done.stdout + done.stderr)
        assert done.returncode != 0
        assert "public.mem0 is a table of `postgres` already, and Memharbor needs the name" in said
        assert "rename it first, for instance to mem0_old" in said
        assert rows(server, name, "mem0") == before["mem0"]

        done = shell(documented_block(), server, name, tmp_path)
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        for password in server.passwords.values():
            assert password not in done.stdout + done.stderr
        for table in ("mem0", "mem0_entities"):
            assert rows(server, name, table.replace("mem0", "mem0_old")) == before[table]
            carried = rows(server, name, table)
            assert set(carried) == set(before[table])
            for key, (bits, payload) in before[table].items():
                assert carried[key][0] == bits
                assert payload.items() <= carried[key][1].items()

        with unmodified_mem0("app", server.pool_dsn(name, "app"), dims=DIMS) as memories:
            for user in USERS:
                texts = {
                    each["id"]: each["memory"]
                    for each in memories.of(user).get_all(filters={"user_id": user})["results"]
                }
                assert texts == {
                    key: written[key] for key, (_, payload) in before["mem0"].items() if payload["user_id"] == user
                }
                found = memories.of(user).search(f"{user} went on journey 3", filters={"user_id": user})["results"]
                assert found[0]["memory"] == f"{user} went on journey 3"

        # The comparison, with which the block ends, would have said it.
        with closing(admin_connection(server, name)) as connection:
            connection.execute("update memharbor.memories set memory = 'x' where memory = 'Alice went nowhere'")
        assert shell("memharbor migrate compare", server, name, tmp_path).returncode == 10


@pytest.mark.parametrize("table", ["mem0", "mem0_entities"])
def test_each_name_is_refused_with_a_name_of_its_own(server: Server, tmp_path: Path, table: str) -> None:
    with scratch_database(server, rolled_out=False) as name:
        with closing(admin_connection(server, name)) as connection:
            connection.execute(f"create table public.{table} (id uuid primary key)".encode())
        done = shell("memharbor schema apply", server, name, tmp_path)
        assert done.returncode == 9
        assert f"public.{table} is a table of `postgres` already" in done.stderr
        assert f"rename it first, for instance to {table}_old" in done.stderr
