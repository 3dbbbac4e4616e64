"""
What every container of a stack has in common, so that none can forget it.
"""

from __future__ import annotations

from typing import Any

import pulumi_docker as docker

from memharbor_infra.labels import labels

_LOG_OPTIONS = {"max-size": "10m", "max-file": "3"}


def hardened(stack: str, service: str, container: str, *, memory_mb: int) -> dict[str, Any]:
    """
    Arguments of `docker.Container` that no container goes without.

    Args:
        stack: The stack's name.
        service: What the container is part of.
        container: Its name without the stack's prefix.
        memory_mb: Memory limit, in MiB; swap is not added to it.
    """
    return {
        "name": f"{stack}-{container}",
        "capabilities": docker.ContainerCapabilitiesArgs(drops=["ALL"]),
        "security_opts": ["no-new-privileges"],
        "memory": memory_mb,
        # Without it every refresh wants to set it back, and the container could swap as much again.
        "memory_swap": memory_mb,
        "log_driver": "json-file",
        "log_opts": _LOG_OPTIONS,
        "labels": [docker.ContainerLabelArgs(label=key, value=value) for key, value in labels(stack, service).items()],
    }


def serving(
    container: str, *, user: str, stack: str, network: Any, aliases: list[str], start_seconds: int, stop_seconds: int
) -> dict[str, Any]:
    """
    Arguments of `docker.Container` that every long-running service has on top of `hardened`.

    Args:
        container: Its name without the stack's prefix.
        user: Numeric `uid:gid` that the image was made for.
        stack: The stack's name.
        network: Name of the stack's network.
        aliases: Names under which others reach it, besides the container's own.
        start_seconds: How long `pulumi up` waits for it to be healthy before it fails.
        stop_seconds: How long it may take to stop before it is killed.
    """
    return {
        "user": user,
        "hostname": f"{stack}-{container}",
        "networks_advanced": [
            docker.ContainerNetworksAdvancedArgs(name=network, aliases=[f"{stack}-{container}", container, *aliases])
        ],
        "read_only": True,
        # Reaps orphans (pgBackRest's workers, set-up processes) and passes signals on.
        "init": True,
        # Back after a restart of the engine or the machine, but not after a stop on purpose (restore).
        "restart": "unless-stopped",
        "stop_timeout": stop_seconds,
        # Pulumi deletes by force otherwise, which is a crash for a database.
        "destroy_grace_seconds": stop_seconds,
        "healthcheck": docker.ContainerHealthcheckArgs(
            tests=["CMD", "/usr/local/lib/memharbor/healthcheck"],
            interval="5s",
            timeout="5s",
            retries=6,
            start_period="30s",
        ),
        "wait": True,
        "wait_timeout": start_seconds,
    }
