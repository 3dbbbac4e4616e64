"""
A database that Pulumi did not make, as docs/how-to/external-database.md goes: roll out, validate, look; no backups.

One story in order. Its server is a throw-away one without a pooler of ours in the way, and there is no stack at all:
whatever asked for one would fail.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from memharbor.names import ROLES
from tests.containers import Server, running_server
from tests.e2e.conftest import ROOT, Stack, stack_environment

DATABASE = "elsewhere"
PAGE = ROOT / "docs" / "how-to" / "external-database.md"
PLAYBOOK = ("ansible-playbook", "ansible/playbooks/site.yml")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server")) as running:
        with psycopg.connect(running.admin_dsn(), autocommit=True) as connection:
            connection.execute(f"create database {DATABASE}")
        yield running


@pytest.fixture(scope="module")
def foreign(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """The shell of somebody who follows the page: the administrator's password beside the URI, no stack, no state."""
    folder = tmp_path_factory.mktemp("foreign")
    environ = stack_environment("mhtest-none", folder, dims=384)
    for name in ("MEMHARBOR_STACK", "PULUMI_STACK", "STACK", "MEMHARBOR_POSTGRES_PORT", "MEMHARBOR_POOL_PORT"):
        del environ[name]
    parts = conninfo_to_dict(server.admin_dsn(DATABASE))
    password = str(parts["password"])
    uri = server.admin_dsn(DATABASE).replace(f":{password}@", "@", 1)
    assert password not in uri
    environ |= {"MEMHARBOR_DSN": uri, "PGPASSWORD": password}
    environ |= {f"MEMHARBOR_{role.upper()}_PASSWORD": server.passwords[role] for role in ROLES}
    return Stack("mhtest-none", environ)


def test_01_the_page_names_what_is_done_here() -> None:
    page = PAGE.read_text()
    for said in ("MEMHARBOR_DSN=", "PGPASSWORD=", "MEMHARBOR_APP_PASSWORD=", "MEMHARBOR_SERVICE_PASSWORD="):
        assert said in page
    for command in (" ".join(PLAYBOOK), f"{' '.join(PLAYBOOK)} --check --diff", "memharbor validate"):
        assert f"\n{command}\n" in page


def test_02_a_check_run_announces_everything_and_changes_nothing(foreign: Stack, server: Server) -> None:
    done = foreign.run(*PLAYBOOK, "--check", "--diff")
    assert re.search(r"changed=[1-9]\d*\b.*failed=0\b", done.stdout), done.stdout
    for announced in ("+role memharbor_app was added", "+-- step 0001_memories", "+-- step policies"):
        assert f"\n{announced}\n" in done.stdout
    with psycopg.connect(server.admin_dsn(DATABASE)) as connection:
        assert connection.execute("select to_regnamespace('memharbor')").fetchone() == (None,)
        assert connection.execute("select count(*) from pg_roles where rolname ~ '^memharbor_'").fetchone() == (0,)


def test_03_the_playbook_rolls_out_and_then_changes_nothing(foreign: Stack, server: Server) -> None:
    first, second = foreign.run(*PLAYBOOK), foreign.run(*PLAYBOOK)
    assert re.search(r"changed=[1-9]\d*\b.*failed=0\b", first.stdout), first.stdout
    assert re.search(r"changed=0\b.*failed=0\b", second.stdout), second.stdout
    assert re.search(r"changed=0\b.*failed=0\b", foreign.run(*PLAYBOOK, "--check", "--diff").stdout)
    for password in (foreign.environ["PGPASSWORD"], *server.passwords.values()):
        assert password not in first.stdout + first.stderr
    with psycopg.connect(server.direct_dsn(DATABASE, "app")) as connection:
        assert connection.execute("select count(*) from public.mem0").fetchone() == (0,)


def test_04_validate_says_what_does_not_apply_and_passes(foreign: Stack, server: Server) -> None:
    results = {each["name"]: each for each in foreign.json("validate")}
    not_applicable = {name for name, each in results.items() if each["state"] == "not applicable"}
    assert not_applicable == {"connection pooling", "backup"}
    assert {each["state"] for name, each in results.items() if name not in not_applicable} == {"ok"}
    for name in not_applicable:
        assert "was not made by `pulumi up`" in results[name]["detail"]
    with psycopg.connect(server.admin_dsn(DATABASE)) as connection:
        for table in ("memories", "memory_history"):
            assert connection.execute(f"select count(*) from memharbor.{table}").fetchone() == (0,)


def test_05_doctor_and_status_look_at_it(foreign: Stack) -> None:
    findings = foreign.json("doctor")
    assert {finding["level"] for finding in findings} == {"ok"}
    assert {"database", "pgvector", "schema"} <= {finding["area"] for finding in findings}
    assert not {"containers", "pooler", "backup"} & {finding["area"] for finding in findings}
    status = foreign.json("status")
    assert set(status) == {"target", "database"}
    assert status["target"] == "the database of MEMHARBOR_DSN"
    assert status["database"]["memories"] == 0


def test_06_its_settings_and_its_schema_are_told(foreign: Stack) -> None:
    settings = {each["setting"]: each for each in foreign.json("settings", "show")}
    assert (settings["database"]["value"], settings["database"]["origin"]) == (DATABASE, "MEMHARBOR_DSN")
    assert (settings["embedding_dims"]["value"], settings["embedding_dims"]["origin"]) == (384, "environment")
    foreign.memharbor("schema", "verify")


@pytest.mark.parametrize(
    "command",
    [("backup", "create"), ("backup", "list"), ("restore", "--yes"), ("restore", "--dry-run")],
    ids=" ".join,
)
def test_07_backups_are_refused_and_the_way_is_named(foreign: Stack, command: tuple[str, ...]) -> None:
    done = foreign.memharbor(*command, check=False)
    assert done.returncode == 3, done.stderr
    assert "was not made by `pulumi up`" in done.stderr
    assert "hint: use the provider's own backups" in done.stderr


def test_08_a_role_without_a_password_is_said_by_its_variable(foreign: Stack) -> None:
    environ = {name: value for name, value in foreign.environ.items() if name != "MEMHARBOR_APP_PASSWORD"}
    done = Stack(foreign.name, environ).memharbor("validate", check=False)
    assert (done.returncode, "MEMHARBOR_APP_PASSWORD" in done.stderr) == (3, True), done.stderr


def test_09_no_stack_was_made(foreign: Stack) -> None:
    state = Path(foreign.environ["PULUMI_BACKEND_URL"].removeprefix("file://"))
    assert [path.name for path in state.rglob("*.json")] == []
