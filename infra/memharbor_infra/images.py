"""
Images, built by the stack's engine from `docker/`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import pulumi
import pulumi_docker as docker

from memharbor_infra.contexts import BuildContext


class Images(pulumi.ComponentResource):
    """
    Build one image per context; a changed context is a new tag and therefore a new image.

    Attributes:
        ids: Image IDs by name; containers name these, so that a tag that moved cannot change what runs.
        base_id: ID of the base image that all of them are built on.
    """

    ids: dict[str, pulumi.Output[str]]
    base_id: pulumi.Output[str]

    def __init__(
        self,
        name: str,
        contexts: Mapping[str, BuildContext],
        *,
        base_image: str,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("memharbor:infra:Images", name, None, opts)
        base = docker.RemoteImage(
            "base-image", name=base_image, keep_locally=True, opts=pulumi.ResourceOptions(parent=self)
        )
        self.base_id = base.image_id
        self.ids = {}
        for context in contexts.values():
            image = docker.RemoteImage(
                f"{context.name}-image",
                name=context.tag,
                build=docker.RemoteImageBuildArgs(
                    # Relative to this program's folder: an absolute path would be a change for each other checkout.
                    context=os.path.relpath(context.folder),
                    build_args=context.build_arguments,
                    labels={"memharbor.image": context.name},
                ),
                triggers={"context": context.digest},
                # Other stacks of this engine use the same image.
                keep_locally=True,
                # After the base image is there, fetched or not.
                opts=pulumi.ResourceOptions(parent=self, depends_on=[base]),
            )
            self.ids[context.name] = image.image_id
        self.register_outputs({"ids": self.ids})
