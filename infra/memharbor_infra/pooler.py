"""
The pooler: PgBouncer in front of the database.
"""

from __future__ import annotations

from collections.abc import Sequence

import pulumi
import pulumi_docker as docker

from memharbor.server_files.pgbouncer import pgbouncer_files
from memharbor.server_files.postgres import POOLER_PORT
from memharbor_infra.config import Configuration
from memharbor_infra.files import ConfigurationFiles
from memharbor_infra.hardening import hardened, serving
from memharbor_infra.mounts import POOLER_SCRATCH, POOLER_USER

SERVICE = "pgbouncer"
_START_SECONDS = 90
# Long enough for the transactions of an application; the session pool's clients would never end by themselves.
_STOP_SECONDS = 10
# Log, resolver, certificates, sockets of its own.
_OWN_FILES = 100


class Pooler(pulumi.ComponentResource):
    """
    Stateless PgBouncers, containers `<stack>-pgbouncer-<index>`.

    Args:
        configuration: The stack's settings and secrets.
        containers: The containers' names without the stack's prefix; each publishes `pool_port` plus its index.
        image: Their image.
        carrier_image: Image of what brings the files, see `ConfigurationFiles`.
        network: The stack's network.
    """

    container_names: list[pulumi.Output[str]]

    def __init__(
        self,
        name: str,
        configuration: Configuration,
        *,
        containers: Sequence[str],
        image: pulumi.Input[str],
        carrier_image: pulumi.Input[str],
        network: pulumi.Input[str],
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("memharbor:infra:Pooler", name, None, opts)
        self.container_names = []
        stack, settings = configuration.stack, configuration.settings
        for index, container in enumerate(containers):
            files = ConfigurationFiles(
                f"{container}-files",
                stack=stack,
                service=SERVICE,
                container=container,
                files=pgbouncer_files(settings, configuration.secrets, container),
                carrier_image=carrier_image,
                user=POOLER_USER,
                opts=pulumi.ResourceOptions(parent=self),
            )
            open_files = settings.pool_max_clients + settings.max_connections + _OWN_FILES
            server = docker.Container(
                container,
                **hardened(stack, SERVICE, container, memory_mb=settings.pool_memory_mb),
                **serving(
                    container,
                    user=POOLER_USER,
                    stack=stack,
                    network=network,
                    aliases=[SERVICE],
                    start_seconds=_START_SECONDS,
                    stop_seconds=_STOP_SECONDS,
                ),
                image=image,
                ports=[
                    docker.ContainerPortArgs(
                        internal=POOLER_PORT,
                        external=settings.pool_port + index,
                        ip=settings.bind_address,
                        protocol="tcp",
                    )
                ],
                # One descriptor per client and per server connection, whatever the engine's default is.
                ulimits=[docker.ContainerUlimitArgs(name="nofile", soft=open_files, hard=open_files)],
                tmpfs=POOLER_SCRATCH,
                volumes=[files.mount()],
                opts=pulumi.ResourceOptions(parent=self, delete_before_replace=True),
            )
            self.container_names.append(server.name)
        self.register_outputs({"container_names": self.container_names})
