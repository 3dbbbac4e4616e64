"""
The custodian: it alone has the key that purges and undeletes versions of the backup store, and that of the off-site copy.

No database or pooler container has either key, and it has none of theirs: whoever takes the database over cannot delete
what the store keeps, and the custodian cannot read a backup.
"""

from __future__ import annotations

import pulumi
import pulumi_docker as docker

from memharbor.server_files.custodian import custodian_files
from memharbor_infra.config import Configuration
from memharbor_infra.files import ConfigurationFiles
from memharbor_infra.hardening import hardened, serving
from memharbor_infra.mounts import CUSTODIAN_SCRATCH, CUSTODIAN_USER

SERVICE = "custodian"
_START_SECONDS = 60
# What it stops in the middle of goes on from there the next time.
_STOP_SECONDS = 10


class Custodian(pulumi.ComponentResource):
    """
    One container without a port or a volume of its own, `<stack>-custodian-0`.

    Args:
        configuration: The stack's settings and secrets.
        container: The container's name without the stack's prefix.
        image: Its image.
        carrier_image: Image of what brings the files, see `ConfigurationFiles`.
        network: The stack's network.
        store: The backup store, which it works on from its start.
    """

    container_name: pulumi.Output[str]

    def __init__(
        self,
        name: str,
        configuration: Configuration,
        *,
        container: str,
        image: pulumi.Input[str],
        carrier_image: pulumi.Input[str],
        network: pulumi.Input[str],
        store: pulumi.Resource,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("memharbor:infra:Custodian", name, None, opts)
        stack, settings = configuration.stack, configuration.settings
        files = ConfigurationFiles(
            f"{container}-files",
            stack=stack,
            service=SERVICE,
            container=container,
            files=custodian_files(settings, stack, configuration.secrets, configuration.offsite_key),
            carrier_image=carrier_image,
            user=CUSTODIAN_USER,
            opts=pulumi.ResourceOptions(parent=self),
        )
        server = docker.Container(
            container,
            **hardened(stack, SERVICE, container, memory_mb=settings.custodian_memory_mb),
            **serving(
                container,
                user=CUSTODIAN_USER,
                stack=stack,
                network=network,
                aliases=[SERVICE],
                start_seconds=_START_SECONDS,
                stop_seconds=_STOP_SECONDS,
            ),
            image=image,
            tmpfs=CUSTODIAN_SCRATCH,
            volumes=[files.mount()],
            # Two custodians would copy and purge at once.
            opts=pulumi.ResourceOptions(parent=self, delete_before_replace=True, depends_on=[store]),
        )
        self.container_name = server.name
        self.register_outputs({"container_name": self.container_name})
