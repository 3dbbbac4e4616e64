"""A freshly provisioned stack of its own: name, ports, volumes and state that are nobody else's."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PREFIX = "mhtest"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@dataclass
class Stack:
    """The stack under test, driven as a person would drive it; `prefix` is what every command is run by."""

    name: str
    environ: dict[str, str]
    prefix: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, *arguments: str, check: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
        begun_at = time.monotonic()
        done = subprocess.run(
            (*self.prefix, *arguments),
            cwd=ROOT,
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )
        self.seconds[" ".join(arguments[:3])] = round(time.monotonic() - begun_at, 1)
        if check and done.returncode != 0:
            pytest.fail(
                f"`{' '.join(arguments)}` exited with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            )
        return done

    def memharbor(self, *arguments: str, check: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
        return self.run("memharbor", *arguments, check=check, **environ)

    def json(self, *arguments: str) -> Any:
        return json.loads(self.memharbor(*arguments, "--output", "json").stdout)

    def backup_ids(self) -> list[str]:
        """Every backup, oldest first. The schedule of a stack may add one at its end at any time."""
        return [each["id"] for each in self.json("backup", "list")]

    def up(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self.run("pulumi", "up", "--yes", "--skip-preview", "--non-interactive", "--stack", self.name, *options)

    def playbook(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self.run("ansible-playbook", "ansible/playbooks/site.yml", *options)

    def dsn(self, role: str, *options: str) -> str:
        return self.memharbor("stack", "dsn", role, *options).stdout.strip()


def stack_environment(name: str, folder: Path, dims: int) -> dict[str, str]:
    passphrase = folder / "passphrase"
    passphrase.write_text(secrets.token_urlsafe(24))
    passphrase.chmod(0o600)
    (folder / "state").mkdir()
    # Nothing of the caller's own stack, and nothing that `activate` would put back.
    others = ("MEMHARBOR_", "_MEMHARBOR_", "PG", "PULUMI_BACKEND", "PULUMI_CONFIG")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    return {
        **kept,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(BIN.parent),
        "PULUMI_BACKEND_URL": f"file://{folder / 'state'}",
        "PULUMI_CONFIG_PASSPHRASE_FILE": str(passphrase),
        "PULUMI_SKIP_UPDATE_CHECK": "true",
        "ANSIBLE_CONFIG": str(ROOT / "ansible" / "ansible.cfg"),
        "ANSIBLE_FORCE_COLOR": "false",
        "NO_COLOR": "1",
        "MEM0_TELEMETRY": "False",
        "MEMHARBOR_STACK": name,
        "PULUMI_STACK": name,
        "STACK": name,
        "MEMHARBOR_POSTGRES_PORT": str(free_port()),
        "MEMHARBOR_POOL_PORT": str(free_port()),
        "MEMHARBOR_EMBEDDING_DIMS": str(dims),
    }


# testinfra speaks to containers through the `docker` program. The product needs only the engine, so that a machine may
# have none: then this stands in, with the one call that testinfra makes.
DOCKER_EXEC = f"""#!{sys.executable}
import sys, docker
arguments = sys.argv[2:]
user = arguments[1] if arguments[0] == "-u" else ""
name, *command = arguments[2:] if user else arguments
done = docker.from_env().containers.get(name).exec_run(command, user=user, demux=True)
sys.stdout.buffer.write(done.output[0] or b"")
sys.stderr.buffer.write(done.output[1] or b"")
sys.exit(done.exit_code)
"""


@pytest.fixture(scope="session", autouse=True)
def docker_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A `docker exec` for testinfra where the machine has no `docker`."""
    with pytest.MonkeyPatch.context() as patch:
        if shutil.which("docker") is None:
            program = tmp_path_factory.mktemp("bin") / "docker"
            program.write_text(DOCKER_EXEC)
            program.chmod(0o755)
            patch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        yield


def remove_leftovers() -> None:
    """Remove what killed runs left: containers, volumes and networks of this suite whose process is gone."""
    import docker

    client = docker.from_env()

    def is_left(name: str | None) -> bool:
        parts = (name or "").split("-")
        return parts[0] == PREFIX and len(parts) > 1 and parts[1].isdigit() and not Path(f"/proc/{parts[1]}").exists()

    for container in client.containers.list(all=True):
        if is_left(container.labels.get("memharbor.stack")):
            container.remove(force=True)
    for volume in client.volumes.list():
        if is_left((volume.attrs.get("Labels") or {}).get("memharbor.stack")):
            volume.remove(force=True)
    for network in client.networks.list():
        if is_left((network.attrs.get("Labels") or {}).get("memharbor.stack")):
            network.remove()
    for path in ROOT.glob(f"Pulumi.{PREFIX}-*.yaml"):
        if is_left(path.name.split(".")[1]):
            path.unlink()
    client.close()


def remove_files(name: str) -> None:
    """Remove what a stack leaves in the checkout."""
    with contextlib.suppress(FileNotFoundError):
        (ROOT / f"Pulumi.{name}.yaml").unlink()
    shutil.rmtree(ROOT / ".memharbor" / name, ignore_errors=True)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that is up and rolled out, at 384 dimensions; destroyed with its data at the end."""
    remove_leftovers()
    folder = tmp_path_factory.mktemp("stack")
    name = f"{PREFIX}-{os.getpid()}-{secrets.token_hex(2)}"
    stack = Stack(name, stack_environment(name, folder, dims=384))
    try:
        stack.memharbor("stack", "init")
        stack.up()
        stack.playbook()
        yield stack
    finally:
        done = stack.memharbor("stack", "destroy", name, "--yes", check=False)
        sys.stderr.write(done.stderr if done.returncode else "")
        remove_files(name)
        sys.stderr.write(f"\nseconds by step: {json.dumps(stack.seconds, indent=1)}\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End-to-end files tell one story each: their tests run in the order of the file, whatever shuffled the rest."""
    here = Path(__file__).parent
    places = [place for place, item in enumerate(items) if here in item.path.parents]
    # The main job first: it is told of a stack that nobody has used.
    ordered = sorted(
        (items[place] for place in places),
        key=lambda item: (item.path.name != "test_main_job.py", str(item.path), item.location[1] or 0),
    )
    for place, item in zip(places, ordered, strict=True):
        items[place] = item
