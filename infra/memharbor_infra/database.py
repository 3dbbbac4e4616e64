"""
The database: PostgreSQL nodes with pgvector and pgBackRest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pulumi
import pulumi_docker as docker

from memharbor.server_files.postgres import (
    DATA_ROOT,
    POSTGRES_PORT,
    STANZA,
    postgres_files,
)
from memharbor.settings import Settings
from memharbor.stack.secrets import node_names
from memharbor_infra.config import Configuration
from memharbor_infra.files import ConfigurationFiles
from memharbor_infra.hardening import hardened, serving
from memharbor_infra.mounts import POSTGRES_SCRATCH, POSTGRES_USER

SERVICE = "postgres"
# Recovery after a crash comes first; a wait that gives up would only restart it.
_START_SECONDS = 300
# A fast shutdown writes a checkpoint and archives the last segment.
_STOP_SECONDS = 120


@dataclass(frozen=True)
class Node:
    """
    One database node.

    Args:
        index: Its number; part of every name, so a second node renames nothing.
        name: Its container's name without the stack's prefix.
        aliases: Service names that it answers to besides its own.
        host_port: Port of the host that leads to it; `None` where something else does.
        roles: What it may be.
    """

    index: int
    name: str
    aliases: tuple[str, ...]
    host_port: int | None
    roles: tuple[str, ...]


def plan_nodes(settings: Settings) -> list[Node]:
    """
    List the nodes of a topology. In `single` the one node answers to the service's name itself.

    >>> [node.name for node in plan_nodes(Settings())]
    ['postgres-0']
    """
    return [
        Node(index, name, (SERVICE,), settings.postgres_port, ("primary",))
        for index, name in enumerate(node_names(SERVICE))
    ]


class Database(pulumi.ComponentResource):
    """
    The nodes of a stack, containers `<stack>-postgres-<index>`.

    Args:
        configuration: The stack's settings and secrets.
        nodes: Which nodes there are.
        volumes: Data volumes by the node's name.
        image: Image of the nodes.
        carrier_image: Image of what brings the files, see `ConfigurationFiles`.
        network: The stack's network.
        store: The backup store: it starts before the nodes and stops after them, so that a node that shuts down can
            still archive its last WAL.
    """

    containers: dict[str, docker.Container]
    files_volumes: dict[str, pulumi.Output[str]]

    def __init__(
        self,
        name: str,
        configuration: Configuration,
        *,
        nodes: Sequence[Node],
        volumes: Mapping[str, pulumi.Input[str]],
        image: pulumi.Input[str],
        carrier_image: pulumi.Input[str],
        network: pulumi.Input[str],
        store: pulumi.Resource,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("memharbor:infra:Database", name, None, opts)
        self.containers, self.files_volumes, self._store = {}, {}, store
        for node in nodes:
            files = ConfigurationFiles(
                f"{node.name}-files",
                stack=configuration.stack,
                service=SERVICE,
                container=node.name,
                files=postgres_files(configuration.settings, configuration.stack, configuration.secrets, node.name),
                carrier_image=carrier_image,
                user=POSTGRES_USER,
                opts=pulumi.ResourceOptions(parent=self),
            )
            self.containers[node.name] = self._server(configuration, node, volumes[node.name], files, image, network)
            self.files_volumes[node.name] = files.volume_name
        self.register_outputs({"containers": [container.name for container in self.containers.values()]})

    def _server(
        self,
        configuration: Configuration,
        node: Node,
        volume: pulumi.Input[str],
        files: ConfigurationFiles,
        image: pulumi.Input[str],
        network: pulumi.Input[str],
    ) -> docker.Container:
        stack, settings = configuration.stack, configuration.settings
        ports = []
        if node.host_port is not None:
            ports.append(
                docker.ContainerPortArgs(
                    internal=POSTGRES_PORT, external=node.host_port, ip=settings.bind_address, protocol="tcp"
                )
            )
        return docker.Container(
            node.name,
            **hardened(stack, SERVICE, node.name, memory_mb=settings.postgres_memory_mb),
            **serving(
                node.name,
                user=POSTGRES_USER,
                stack=stack,
                network=network,
                aliases=list(node.aliases),
                start_seconds=_START_SECONDS,
                stop_seconds=_STOP_SECONDS,
            ),
            image=image,
            envs=[f"MEMHARBOR_STANZA={STANZA}", f"MEMHARBOR_TOPOLOGY={settings.topology}"],
            stop_signal="SIGINT",
            shm_size=settings.shm_size_mb,
            ports=ports,
            tmpfs=POSTGRES_SCRATCH,
            volumes=[docker.ContainerVolumeArgs(volume_name=volume, container_path=DATA_ROOT), files.mount()],
            # Its port and its data directory belong to one container at a time.
            opts=pulumi.ResourceOptions(parent=self, delete_before_replace=True, depends_on=[self._store]),
        )
