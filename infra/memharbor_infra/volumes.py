"""
The volumes that hold data: what is lost with them is lost.
"""

from __future__ import annotations

from collections.abc import Mapping

import pulumi
import pulumi_docker as docker

from memharbor_infra.labels import labels


class DataVolumes(pulumi.ComponentResource):
    """
    One volume per container that keeps data, named `<stack>-<container>`.

    `pulumi destroy` stops at them (`protect`), and forgets rather than deletes them once they are unprotected
    (`retain_on_delete`): only `docker volume rm NAME` deletes data.

    Args:
        stack: The stack's name.
        containers: The service of each container, by the container's name without the stack's prefix. Renaming one
            gives it an empty volume.
    """

    names: dict[str, pulumi.Output[str]]

    def __init__(
        self, name: str, stack: str, containers: Mapping[str, str], opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("memharbor:infra:DataVolumes", name, None, opts)
        self.names = {
            container: docker.Volume(
                f"{container}-data",
                name=f"{stack}-{container}",
                labels=[
                    docker.VolumeLabelArgs(label=key, value=value) for key, value in labels(stack, service).items()
                ],
                opts=pulumi.ResourceOptions(parent=self, protect=True, retain_on_delete=True),
            ).name
            for container, service in containers.items()
        }
        self.register_outputs({"names": self.names})
