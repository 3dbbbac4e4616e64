"""
The embedded backup store: an S3 gateway over a volume, with TLS and versions.
"""

from __future__ import annotations

import pulumi
import pulumi_docker as docker

from memharbor.server_files.backup_store import store_files
from memharbor_infra.config import Configuration
from memharbor_infra.files import ConfigurationFiles
from memharbor_infra.hardening import hardened, serving
from memharbor_infra.mounts import STORE_SCRATCH, STORE_USER

SERVICE = "backup-store"
_START_SECONDS = 90
_STOP_SECONDS = 30


class BackupStore(pulumi.ComponentResource):
    """
    One container, `<stack>-backup-store-0`. It sets itself up at each start (`docker/backup-store/entrypoint`).

    Args:
        configuration: The stack's settings and secrets.
        container: The container's name without the stack's prefix.
        volume: Its data volume.
        image: Its image.
        carrier_image: Image of what brings the files, see `ConfigurationFiles`.
        network: The stack's network.
    """

    container_name: pulumi.Output[str]

    def __init__(
        self,
        name: str,
        configuration: Configuration,
        *,
        container: str,
        volume: pulumi.Input[str],
        image: pulumi.Input[str],
        carrier_image: pulumi.Input[str],
        network: pulumi.Input[str],
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("memharbor:infra:BackupStore", name, None, opts)
        stack, settings = configuration.stack, configuration.settings
        files = ConfigurationFiles(
            f"{container}-files",
            stack=stack,
            service=SERVICE,
            container=container,
            files=store_files(configuration.secrets, container),
            carrier_image=carrier_image,
            user=STORE_USER,
            opts=pulumi.ResourceOptions(parent=self),
        )
        server = docker.Container(
            container,
            **hardened(stack, SERVICE, container, memory_mb=settings.store_memory_mb),
            **serving(
                container,
                user=STORE_USER,
                stack=stack,
                network=network,
                aliases=[SERVICE],
                start_seconds=_START_SECONDS,
                stop_seconds=_STOP_SECONDS,
            ),
            image=image,
            tmpfs=STORE_SCRATCH,
            volumes=[docker.ContainerVolumeArgs(volume_name=volume, container_path="/data"), files.mount()],
            # Two gateways over one directory are not supported.
            opts=pulumi.ResourceOptions(parent=self, delete_before_replace=True),
        )
        self.container_name = server.name
        self.register_outputs({"container_name": self.container_name})
