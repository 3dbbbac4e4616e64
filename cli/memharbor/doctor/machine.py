"""
The machine: what a stack needs of it before it can be brought up.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from memharbor import versions
from memharbor.containers import Containers
from memharbor.doctor.findings import Finding, Findings
from memharbor.errors import ExternalToolError
from memharbor.process import find_tool, run
from memharbor.settings import Settings, environment_name, load_settings, settings_from_environment
from memharbor.stack import provisioner
from memharbor.stack.config import config_settings
from memharbor.stack.resources import find_port_holder

DISK_FREE_MINIMUM_BYTES = 5 * 1024**3


def parse_version(text: str) -> tuple[int, ...]:
    """
    Read the leading numbers of a version.

    >>> parse_version("20.10.24+dfsg1"), parse_version("18.6 (Debian 18.6-1)")
    ((20, 10, 24), (18, 6))
    """
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def check_python() -> Findings:
    """Look at this Python."""
    present = sys.version.split()[0]
    wanted = ".".join(map(str, versions.PYTHON_MINIMUM))
    if sys.version_info < versions.PYTHON_MINIMUM:
        cause = f"Python {present} is older than {wanted}"
        yield Finding("python", "failed", cause, f"install Python {wanted} or newer, then `make setup`")
    else:
        yield Finding("python", "ok", f"Python {present}")


def check_pulumi() -> Findings:
    """Look for Pulumi on PATH."""
    if find_tool("pulumi") is None:
        yield Finding("pulumi", "failed", "`pulumi` is not on PATH", "make setup, then `source .venv/bin/activate`")
        return
    version = run(["pulumi", "version"], timeout_seconds=30).strip().removeprefix("v")
    if parse_version(version) < versions.PULUMI_MINIMUM:
        least = ".".join(map(str, versions.PULUMI_MINIMUM))
        yield Finding("pulumi", "failed", f"Pulumi {version} is older than {least}", "make setup")
    else:
        yield Finding("pulumi", "ok", f"Pulumi {version}")


def check_engine() -> Findings:
    """Ask the Docker engine who it is."""
    version = Containers().engine_version()
    if parse_version(version) < versions.DOCKER_ENGINE_MINIMUM:
        least = ".".join(map(str, versions.DOCKER_ENGINE_MINIMUM))
        yield Finding("engine", "failed", f"Docker engine {version} is older than {least}", "make setup")
    else:
        where = " of DOCKER_HOST" if os.environ.get("DOCKER_HOST") else ""
        yield Finding("engine", "ok", f"Docker engine {version}{where}")


def check_disk() -> Findings:
    """Look at the free disk space of the checkout."""
    free = shutil.disk_usage(Path.cwd()).free
    cause = f"{free / 1024**3:.0f} GiB of disk free"
    if free < DISK_FREE_MINIMUM_BYTES:
        yield Finding("disk", "warning", f"only {cause}", "docker system df")
    else:
        yield Finding("disk", "ok", cause)


def check_ports(stack: str) -> Findings:
    """Look whether the ports are free that a stack, which is not up, will publish."""
    config = _read_config(stack)
    settings, _ = load_settings(
        ("environment", settings_from_environment(os.environ) if config is None else {}),
        (f"stack {stack}", config or {}),
    )
    for name in ("postgres_port", "pool_port"):
        port = getattr(settings, name)
        if not _is_taken(port):
            yield Finding("ports", "ok", f"port {port} is free")
            continue
        other = _find_free_port(port, settings)
        change = f"export {environment_name(name)}={other}"
        if config is not None:
            change = f"pulumi config set {name} {other} --stack {stack}"
        holder = find_port_holder(port)
        if holder is None:
            yield Finding("ports", "failed", f"port {port} is taken by another program", change)
        else:
            cause = f"port {port} is taken by `{holder[1]}` of stack `{holder[0]}`"
            yield Finding("ports", "failed", cause, change if holder[0] != stack else f"docker stop {holder[1]}")


def _read_config(stack: str) -> dict[str, str] | None:
    """Read the settings of a stack that exists; None where it does not, or nobody can tell."""
    try:
        return config_settings(provisioner.read_config(stack)) if stack in provisioner.list_stacks() else None
    except ExternalToolError:
        return None


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _find_free_port(taken: int, settings: Settings) -> int:
    others = (settings.postgres_port, settings.pool_port)
    free = (port for port in range(taken + 1, 65536) if port not in others and not _is_taken(port))
    return next(free, taken)


CHECKS: tuple[tuple[str, Callable[[], Findings]], ...] = (
    ("python", check_python),
    ("pulumi", check_pulumi),
    ("engine", check_engine),
    ("disk", check_disk),
)
