"""The drill: it proves a good backup, finds a bad one, changes nothing, and leaves nothing behind, also when killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import psycopg
import pytest

from tests import corpus
from tests.e2e.conftest import ROOT, Stack

pytestmark = pytest.mark.timeout(1800)

USERS = ("alice", "bruno", "chloe")
SEED = int(os.environ.get("MEMHARBOR_TEST_SEED", "20261121"))
# Of a drill of some seconds; a killed one is cleared away by the engine, not by a next command.
KILL_SECONDS_MAX = 12
GONE_SECONDS = 30


def connect(stack: Stack) -> psycopg.Connection[Any]:
    return psycopg.connect(stack.dsn("admin", "--direct"), autocommit=True)


@pytest.fixture(scope="module", autouse=True)
def backup(stack: Stack) -> Iterator[str]:
    """A backup of some users' memories; its id."""
    chosen = [memory for memory in corpus.memories()[:3000] if memory.user_id in corpus.USERS[:4]]
    with connect(stack) as connection:
        connection.execute("delete from memharbor.memories")  # the main job has loaded the same users
        corpus.load(connection, 384, chosen=chosen)
        connection.execute(
            "insert into public.memories (id, user_id, memory) values (gen_random_uuid(), 'drill-erased', 'to be erased')"
        )
    created = stack.json("backup", "create", "--type", "full")
    yield str(created[0]["id"])
    with connect(stack) as connection:
        connection.execute("delete from memharbor.memories")
        connection.execute("delete from memharbor.memory_history")


def throw_aways(stack: Stack) -> list[Any]:
    engine = docker.from_env()
    labels = [f"memharbor.stack={stack.name}", "memharbor.service=throwaway"]
    return list(engine.containers.list(all=True, filters={"label": labels}, ignore_removed=True))


def data_volumes(containers: list[Any]) -> set[str]:
    """Name the volumes without a name of their own in which the containers keep their data."""
    mounts = (mount for container in containers for mount in container.attrs["Mounts"])
    return {mount["Name"] for mount in mounts if mount["Destination"] == "/var/lib/postgresql"}


def existing(names: set[str]) -> set[str]:
    return names & {volume.name for volume in docker.from_env().volumes.list()}


def checks(report: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["result"] for check in report["checks"]}


def drilled(stack: Stack, *options: str, code: int = 0) -> dict[str, Any]:
    done = stack.memharbor("drill", *options, "--output", "json", check=False)
    assert done.returncode == code, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_good_backup_is_verified_and_says_so_everywhere(stack: Stack, backup: str) -> None:
    listed = {each["id"]: each for each in stack.json("backup", "list")}
    assert listed[backup]["verified"] is False
    assert stack.json("status")["backups"]["last_is_verified"] is False
    report = drilled(stack)
    assert report["result"] == "verified"
    assert set(checks(report).values()) == {"ok"}, report["checks"]
    assert "to the bit" in next(check["detail"] for check in report["checks"] if check["name"] == "rows")
    listed = {each["id"]: each for each in stack.json("backup", "list")}
    assert listed[backup]["verified"] is True
    status = stack.json("status")["backups"]
    assert (status["last_is_verified"], status["last_verified_at"]) == (True, report["ended_at"])
    assert throw_aways(stack) == []


def test_the_report_is_on_this_machine_and_beside_the_backups(stack: Stack) -> None:
    newest = max((ROOT / ".memharbor" / stack.name / "drills").glob("2*.html"))
    page = newest.read_text()
    assert "verified" in page
    assert not [word for word in ("http:", "https:", "src=", "<script", "<link") if word in page]
    assert json.loads(newest.with_suffix(".json").read_text())["result"] == "verified"
    assert "to the bit" in newest.with_suffix(".txt").read_text()
    leader = docker.from_env().containers.get(f"{stack.name}-postgres-0")
    kept = leader.exec_run(["/usr/local/lib/memharbor/record", "get", f"drills/{newest.stem}.json"])
    assert json.loads(kept.output)["id"] == newest.stem


def test_a_drill_reaches_no_network_and_cannot_write_to_the_store(stack: Stack) -> None:
    with start_drill(stack) as drill:
        deadline = time.monotonic() + 60
        while not (found := throw_aways(stack)) and time.monotonic() < deadline:
            time.sleep(0.05)
        (container,) = found
        host = container.attrs["HostConfig"]
        assert (host["NetworkMode"], host["AutoRemove"], host["RestartPolicy"]["Name"]) == ("none", True, "")
        assert host["Memory"] > 0
        mounts = {mount["Destination"]: mount["RW"] for mount in container.attrs["Mounts"] if mount["Type"] == "volume"}
        assert mounts == {"/var/lib/postgresql": True, "/etc/memharbor": False, "/store": False}
        while container.status != "running":
            container.reload()
        assert len(container.exec_run(["cat", "/proc/net/route"]).output.splitlines()) == 1
        assert "MEMHARBOR_STANZA" not in " ".join(container.attrs["Config"]["Env"])
        made = data_volumes([container])
        assert len(existing(made)) == 1
        drill.communicate(timeout=300)
        assert drill.returncode == 0
    assert (throw_aways(stack), existing(made)) == ([], set())


def test_rows_that_are_not_the_recorded_ones_are_found(stack: Stack, backup: str) -> None:
    record = f"manifests/{backup}.json"
    program = "/usr/local/lib/memharbor/record"
    leader = docker.from_env().containers.get(f"{stack.name}-postgres-0")
    true = json.loads(leader.exec_run([program, "get", record]).output)
    other = {
        **true,
        "fingerprints": [[*row[:3], "0" * 64] if i == 0 else row for i, row in enumerate(true["fingerprints"])],
    }
    put = ["sh", "-c", f'printf %s "$1" | {program} put {record}', "sh"]
    assert leader.exec_run([*put, json.dumps(other)]).exit_code == 0
    try:
        report = drilled(stack, "--backup", backup, code=10)
    finally:
        assert leader.exec_run([*put, json.dumps(true)]).exit_code == 0
    assert [name for name, result in checks(report).items() if result == "failed"] == ["rows"]


def test_a_backup_whose_log_is_missing_fails_its_drill(stack: Stack, backup: str) -> None:
    shown = stack.json("backup", "show", backup)
    store = docker.from_env().containers.get(f"{stack.name}-backup-store-0")
    find = f"find /data/buckets -name '{shown['start_segment']}-*' | head -n 1"
    path = store.exec_run(["sh", "-c", find]).output.decode().strip()
    assert path
    assert store.exec_run(["mv", path, f"{path}.away"]).exit_code == 0
    try:
        report = drilled(stack, "--backup", backup, code=10)
    finally:
        assert store.exec_run(["mv", f"{path}.away", path]).exit_code == 0
    assert checks(report) == {"restore": "failed"}
    assert throw_aways(stack) == []


def test_a_moment_is_drilled_and_what_cannot_be_compared_is_said(stack: Stack) -> None:
    with connect(stack) as connection:
        row = connection.execute("select clock_timestamp()").fetchone()
        assert row is not None
        moment = row[0].isoformat()
    report = drilled(stack, "--at", moment)
    assert report["result"] == "verified"
    assert checks(report)["rows"] == "not compared"


def test_who_was_erased_since_is_erased_again_and_that_is_checked(stack: Stack, backup: str) -> None:
    stack.memharbor("user", "erase", "drill-erased", "--reason", "test", "--yes")
    report = drilled(stack, "--backup", backup)
    said = next(check["detail"] for check in report["checks"] if check["name"] == "erase ledger")
    assert said.startswith("1 erasures since this backup were replayed")


def start_drill(stack: Stack) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["memharbor", "drill"], cwd=ROOT, env=stack.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_drill(stack: Stack, after_seconds: float) -> None:
    """Kill a drill and see that what it made goes by itself; one that was never started the next drill removes."""
    made: set[str] = set()
    end = time.monotonic() + after_seconds
    with start_drill(stack) as drill:
        while time.monotonic() < end and drill.poll() is None:
            made |= data_volumes(throw_aways(stack))
            time.sleep(0.05)
        drill.send_signal(signal.SIGKILL)
        drill.communicate()
    deadline = time.monotonic() + GONE_SECONDS
    while (left := throw_aways(stack)) and time.monotonic() < deadline:
        made |= data_volumes(left)
        time.sleep(0.2)
    assert [container.name for container in left if container.status != "created"] == []
    assert existing(made) == existing(data_volumes(left)), f"killed after {after_seconds:.2f} s"


@pytest.mark.parametrize("number", range(3))
def test_a_killed_drill_leaves_nothing(stack: Stack, number: int) -> None:
    kill_drill(stack, random.Random(f"{SEED}:{number}").uniform(1, KILL_SECONDS_MAX))


@pytest.mark.soak
@pytest.mark.parametrize("number", range(30))
def test_a_drill_that_is_killed_at_any_moment_leaves_nothing(stack: Stack, number: int) -> None:
    kill_drill(stack, random.Random(f"soak:{SEED}:{number}").uniform(0.5, KILL_SECONDS_MAX))


def test_what_was_made_and_never_started_is_removed_by_the_next_drill(stack: Stack, backup: str) -> None:
    script = (
        "import os\n"
        "from docker.models.containers import Container\n"
        "Container.start = lambda self: os.kill(os.getpid(), 9)\n"
        "from memharbor.commands import main\n"
        "main(['drill'])\n"
    )
    done = stack.run("python", "-c", script, check=False)
    assert done.returncode == -9
    left = throw_aways(stack)
    assert [container.status for container in left] == ["created"]
    assert drilled(stack, "--backup", backup)["result"] == "verified"
    assert (throw_aways(stack), existing(data_volumes(left))) == ([], set())


CRONTAB = """#!/bin/sh
# Stands in for cron's own: keeps one table in a file.
if [ "$1" = -l ]; then
    [ -s "$CRONTAB_FILE" ] || { echo "no crontab for tester" >&2; exit 1; }
    exec cat "$CRONTAB_FILE"
fi
cat > "$CRONTAB_FILE"
"""


def test_a_schedule_is_set_shown_and_taken_back(stack: Stack, tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.write_text("1 2 * * * something else\n")
    program = tmp_path / "crontab"
    program.write_text(CRONTAB)
    program.chmod(0o755)
    where = {"PATH": f"{tmp_path}{os.pathsep}{stack.environ['PATH']}", "CRONTAB_FILE": str(table)}
    if Path("/run/systemd/system").is_dir():
        pytest.skip("systemd runs here, and comes before cron")
    stack.memharbor("drill", "--schedule", "weekly", "--dry-run", **where)
    assert table.read_text() == "1 2 * * * something else\n"
    for frequency in ("daily", "weekly"):
        stack.memharbor("drill", "--schedule", frequency, **where)
    other, line = table.read_text().splitlines()
    assert other == "1 2 * * * something else"
    assert line.startswith("30 4 * * 0 cd ")
    assert stack.json("status")["backups"]["drill_schedule"] == "weekly"
    # What cron would run: the command behind the five fields, in a shell that knows nothing.
    command = line.split(" ", 5)[5].replace("\\%", "%").replace(" drill ", " drill --dry-run ")
    done = subprocess.run(["sh", "-c", command], env={}, cwd="/", capture_output=True, text=True, check=False)
    log = (ROOT / ".memharbor" / stack.name / "drills" / "scheduled.log").read_text()
    assert (done.returncode, "would restore backup" in log) == (0, True), done.stderr + log
    stack.memharbor("drill", "--schedule", "off", **where)
    assert table.read_text() == "1 2 * * * something else\n"
    assert stack.json("status")["backups"]["drill_schedule"] is None


def test_without_anything_that_starts_it_the_line_is_printed(stack: Stack, tmp_path: Path) -> None:
    if Path("/run/systemd/system").is_dir():
        pytest.skip("systemd runs here")
    environ = {"PATH": str(Path(stack.environ["PATH"].split(os.pathsep)[0]))}
    done = stack.memharbor("drill", "--schedule", "weekly", check=False, **environ)
    assert done.returncode == 9
    assert "30 4 * * 0 cd " in done.stderr
