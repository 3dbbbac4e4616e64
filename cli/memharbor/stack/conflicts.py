"""
What keeps a valid config from being deployed here: ports of this machine in use, and memories of other dimensions.

`find_conflicts` looks, and changes nothing; what it makes of what it saw is decided by pure functions.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

from memharbor.database import connect
from memharbor.errors import ExternalToolError, MemharborError
from memharbor.settings import setting_fields
from memharbor.stack import provisioner
from memharbor.stack.config import config_settings
from memharbor.stack.outputs import dsn, read_outputs
from memharbor.stack.resources import find_port_holder

PORT_SETTINGS = ("postgres_port", "pool_port")


def find_conflicts(stack: str, config: Mapping[str, str]) -> list[str]:
    """
    Say what of a stack's config does not go with what is already there; one sentence each, with the next command.

    Args:
        stack: Name of the stack.
        config: Its whole config, by full key.
    """
    settings = config_settings(config)
    problems = []
    if is_local_engine(config.get("docker:host") or os.environ.get("DOCKER_HOST", "")):
        problems = port_conflicts(stack, settings, _find_holder)
    try:
        deployed = provisioner.read_stack_outputs(stack).get("settings", {})
    except ExternalToolError:  # there is none yet, or nobody can tell: the roll-out will refuse as well
        return problems
    return problems + dims_conflicts(stack, settings, deployed, lambda: _may_have_memories(stack))


def is_local_engine(host: str) -> bool:
    """
    Tell whether an engine publishes ports on this machine.

    >>> is_local_engine(""), is_local_engine("unix:///run/docker.sock"), is_local_engine("ssh://db")
    (True, True, False)
    """
    return not host or host.startswith("unix://")


def port_conflicts(
    stack: str, settings: Mapping[str, str], find_holder: Callable[[str, int], tuple[str, str] | None]
) -> list[str]:
    """
    Name the ports to be published that somebody else has; what is no port at all is left to the settings themselves.

    Args:
        stack: Name of the stack.
        settings: Those of its config, as texts.
        find_holder: Who has a port of an address: stack and container, empty for a program; `None` where it is free.

    >>> port_conflicts("dev", {}, lambda address, port: ("", "") if port == 6432 else None)
    ['pool_port: 6432 is in use by another program; run `pulumi config set pool_port 6433 --stack dev`']
    """
    address = _value(settings, "bind_address")
    wanted = {name: _number(settings, name) for name in PORT_SETTINGS}
    problems = []
    for name, port in wanted.items():
        holder = find_holder(address, port) if port is not None else None
        if port is None or holder is None or holder[0] == stack:
            continue
        others = set(wanted.values())
        free = (each for each in range(port + 1, 65536) if each not in others and find_holder(address, each) is None)
        who = f"`{holder[1]}` of stack `{holder[0]}`" if holder[0] else "another program"
        problems.append(
            f"{name}: {port} is in use by {who}; run `pulumi config set {name} {next(free, 'PORT')} --stack {stack}`"
        )
    return problems


def dims_conflicts(
    stack: str, settings: Mapping[str, str], deployed: Mapping[str, Any], may_have_memories: Callable[[], bool]
) -> list[str]:
    """
    Refuse other dimensions than those of the memories that the stack's database has.

    Args:
        stack: Name of the stack.
        settings: Those of its config, as texts.
        deployed: The settings of its last `pulumi up`.
        may_have_memories: Whether there is a schema; asked only where it matters.

    >>> dims_conflicts("dev", {"embedding_dims": "8", "database": "new"}, {"embedding_dims": 4, "database": "old"}, lambda: True)
    []
    """
    dims, before = _number(settings, "embedding_dims"), deployed.get("embedding_dims")
    is_same = _value(settings, "database") == deployed.get("database")
    if None in (dims, before) or dims == before or not is_same or not may_have_memories():
        return []
    return [
        f"embedding_dims: {dims} does not fit database `{deployed['database']}`, whose memories have {before} and cannot"
        f" be changed in place; run `pulumi config set embedding_dims {before} --stack {stack}`, or set `database` to a"
        " new name, which begins without memories"
    ]


def _value(settings: Mapping[str, str], name: str) -> str:
    return settings.get(name, str(setting_fields()[name].default))


def _number(settings: Mapping[str, str], name: str) -> int | None:
    text = _value(settings, name)
    number = int(text) if text.isascii() and text.isdigit() else 0
    return number if 0 < number < 65536 else None


def _find_holder(address: str, port: int) -> tuple[str, str] | None:
    return (find_port_holder(port) or ("", "")) if is_taken(address, port) else None


def is_taken(address: str, port: int) -> bool:
    """Tell whether the engine could not publish a port because somebody listens on it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            # What only waits for the end of an old connection is no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as exc:
        return exc.errno == errno.EADDRINUSE
    return False


def _may_have_memories(stack: str) -> bool:
    """Look for the schema; a server that does not answer may have one."""
    try:
        outputs = read_outputs(stack)
        with connect(dsn(outputs, "admin"), dbname=outputs.database) as connection:
            row = connection.execute("select pg_catalog.to_regclass('memharbor.memories') is not null").fetchone()
    except MemharborError:
        return True
    return row is None or bool(row[0])
