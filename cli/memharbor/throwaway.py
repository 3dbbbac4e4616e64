"""
What a container that must not last is made of, and who made it. Asks nobody but this machine's /proc.

`memharbor.containers` runs them.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Who made a throw-away container, so that another process can tell whether its maker still lives.
OWNER_LABEL = "memharbor.owner"
# The first process of a throw-away container: it ends when nobody holds its input any more, or after a day.
_WATCHDOG = ("timeout", "86400", "cat")


def throw_away_options(
    attrs: dict[str, Any],
    data: str,
    mounts: Mapping[str, str],
    groups: Sequence[str],
    writable: Mapping[str, str],
) -> dict[str, Any]:
    """
    Spell an idle container like another one, without a network, on an empty volume, that ends with this process.

    Args:
        attrs: The model, as the engine describes it.
        data: Where the empty volume is mounted; every other volume of the model is mounted as there, read-only.
        mounts: More volumes to mount read-only, with their places.
        groups: Numbers of groups that its processes are in, besides their own.
        writable: Volumes to mount so that they can be written to, with their places.
    """
    options = job_options(attrs, _WATCHDOG)
    kept = {name: each["bind"] for name, each in options["volumes"].items() if each["bind"] != data}
    binds = [f"{name}:{place}:ro" for name, place in {**kept, **mounts}.items()]
    binds += [f"{name}:{place}:rw" for name, place in writable.items()]
    stack = attrs["Config"]["Labels"].get("memharbor.stack", "")
    del options["network"]
    return options | {
        "name": f"{stack}-throwaway-{secrets.token_hex(4)}",
        "labels": {"memharbor.stack": stack, "memharbor.service": "throwaway", OWNER_LABEL: owner_name()},
        # Not the model's: a server in it must not know of the stack's stanza.
        "environment": [],
        "network_mode": "none",
        # A volume without a name is removed with its container.
        "volumes": [data, *binds],
        "group_add": list(groups),
        "stdin_open": True,
        "auto_remove": True,
        "healthcheck": {"test": ["NONE"]},
    }


def job_options(attrs: dict[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """Spell a container that runs a command with another one's image, volumes, network, limits and hardening."""
    host, config = attrs["HostConfig"], attrs["Config"]
    mounts = {mount["Name"]: mount for mount in attrs["Mounts"] if mount["Type"] == "volume"}
    return {
        "image": attrs["Image"],
        "name": f"{attrs['Name'].lstrip('/')}-job",
        "entrypoint": [command[0]],
        "command": list(command[1:]),
        "user": config["User"],
        "environment": config["Env"],
        "labels": {**config["Labels"], "memharbor.service": "job"},
        "network": next(iter(attrs["NetworkSettings"]["Networks"])),
        "volumes": {
            name: {"bind": mount["Destination"], "mode": "rw" if mount["RW"] else "ro"}
            for name, mount in mounts.items()
        },
        "tmpfs": host.get("Tmpfs") or {},
        "shm_size": host["ShmSize"],
        "read_only": host["ReadonlyRootfs"],
        "cap_drop": host["CapDrop"] or [],
        "security_opt": host["SecurityOpt"] or [],
        "mem_limit": host["Memory"] or None,
        "memswap_limit": host["MemorySwap"] or None,
        "init": True,
    }


def owner_name() -> str:
    """
    Name this process so that no other one, on this machine or another, now or later, has the same name.

    Empty where the system does not tell (no Linux).
    """
    return f"{_namespace()}:{os.getpid()}:{_start_ticks(os.getpid())}" if _namespace() else ""


def is_gone(owner: str) -> bool:
    """Tell whether a process is known to have ended; one of another machine never is."""
    where, _, process = owner.partition(":")
    pid, _, ticks = process.partition(":")
    return bool(where) and where == _namespace() and pid.isdigit() and _start_ticks(int(pid)) != ticks


def _namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _start_ticks(pid: int) -> str | None:
    """Read when a process began, in ticks since the boot. Source: proc_pid_stat(5)."""
    try:
        # From the third field on: the name before them may hold blanks.
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in ("Z", "X") else fields[18]
