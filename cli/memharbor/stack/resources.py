"""
Everything on a Docker engine that carries a stack's label, data volumes included.

`destroy_stack` removes it, since Pulumi forgets data volumes and never deletes them; `doctor` asks who holds a port.
"""

from __future__ import annotations

from typing import Any

from memharbor.errors import ConnectError, ExternalToolError


class StackResources:
    """
    Find and remove what one stack has on the engine.

    Args:
        stack: The stack's name.

    Raises:
        ConnectError: No engine answers.
    """

    def __init__(self, stack: str) -> None:
        from docker.client import DockerClient
        from docker.errors import DockerException

        try:
            client = DockerClient.from_env(timeout=120, use_ssh_client=True)
            client.ping()
        except DockerException as exc:
            raise ConnectError(
                f"no Docker engine answers: {exc}", hint="run `make setup`, or set DOCKER_HOST to an engine"
            ) from exc
        self._client = client
        self._filters = {"label": f"memharbor.stack={stack}"}

    def names(self) -> list[str]:
        """List them as `container NAME`, `volume NAME`, `network NAME`, in the order in which they are removed."""
        return [f"{kind} {resource.name}" for kind, resource in self._find()]

    def remove(self) -> None:
        """
        Remove them all; running containers are killed.

        Raises:
            ExternalToolError: The engine refused, for instance because something else uses a volume.
        """
        from docker.errors import APIError, NotFound

        for kind, resource in self._find():
            try:
                resource.remove(**({"force": True, "v": True} if kind == "container" else {}))
            except NotFound:
                continue
            except APIError as exc:
                raise ExternalToolError(
                    f"the engine refused to remove {kind} `{resource.name}`: {exc.explanation}"
                ) from exc

    def _find(self) -> list[tuple[str, Any]]:
        containers = self._client.containers.list(all=True, filters=self._filters)
        volumes = self._client.volumes.list(filters=self._filters)
        networks = self._client.networks.list(filters=self._filters)
        return (
            [("container", container) for container in containers]
            + [("volume", volume) for volume in volumes]
            + [("network", network) for network in networks]
        )


def find_port_holder(port: int) -> tuple[str, str] | None:
    """
    Find who of ours has published a port of the engine's host.

    Returns:
        The stack and its container; `None` where it is none of ours, or no engine answers.
    """
    from docker.client import DockerClient
    from docker.errors import DockerException

    try:
        containers = DockerClient.from_env(timeout=30, use_ssh_client=True).containers.list(
            filters={"label": "memharbor.stack"}
        )
    except DockerException:
        return None
    for container in containers:
        published = [entry for entries in container.ports.values() for entry in entries or ()]
        if any(entry["HostPort"] == str(port) for entry in published):
            return container.labels["memharbor.stack"], str(container.name)
    return None
