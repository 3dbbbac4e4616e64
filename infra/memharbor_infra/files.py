"""
How files and secrets reach a read-only container on any engine, `ssh://` included: no bind mounts.

The provider cannot upload into a container whose root is read-only. So another container, which is never started,
mounts a small volume and takes the uploads; the service mounts that volume read-only. The volume's name carries the
hash of the files: changed files are a new volume, therefore a new service, and never a half-changed one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pulumi
import pulumi_docker as docker

from memharbor.server_files.postgres import FILES_ROOT, ServerFile
from memharbor_infra.hardening import hardened
from memharbor_infra.labels import labels

_MOUNT = "/files"
_HASH_LENGTH = 8
_MEMORY_MB = 32


def files_hash(files: Sequence[ServerFile], user: str) -> str:
    """Hash files with their paths, modes and owner; secrets are part of it and cannot be told from it."""
    digest = hashlib.sha256(user.encode())
    for file in sorted(files, key=lambda file: file.path):
        digest.update(f"\0{file.path}\0{file.mode}\0{file.content}".encode())
    return digest.hexdigest()[:_HASH_LENGTH]


class ConfigurationFiles(pulumi.ComponentResource):
    """
    The configuration volume of one service container.

    Args:
        stack: The stack's name.
        service: The service, for the labels.
        container: The container that the files are for, without the stack's prefix.
        files: What it shall find under `FILES_ROOT`.
        carrier_image: Image of the container that takes the uploads; it must not name a user. The engine gives the
            files to the user of the container, looked up on the host, and only without one to the owner that they
            are uploaded for.
        user: Numeric `uid:gid` that owns the files.
    """

    volume_name: pulumi.Output[str]

    def __init__(
        self,
        name: str,
        *,
        stack: str,
        service: str,
        container: str,
        files: Sequence[ServerFile],
        carrier_image: pulumi.Input[str],
        user: str,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("memharbor:infra:ConfigurationFiles", name, None, opts)
        volume = docker.Volume(
            f"{name}-volume",
            name=f"{stack}-{container}-files-{files_hash(files, user)}",
            labels=[docker.VolumeLabelArgs(label=key, value=value) for key, value in labels(stack, service).items()],
            opts=pulumi.ResourceOptions(parent=self),
        )
        uid, gid = user.split(":")
        carrier = docker.Container(
            f"{name}-carrier",
            **hardened(stack, service, f"{container}-files", memory_mb=_MEMORY_MB),
            image=carrier_image,
            start=False,
            must_run=False,
            network_mode="none",
            restart="no",
            volumes=[docker.ContainerVolumeArgs(volume_name=volume.name, container_path=_MOUNT)],
            uploads=[
                docker.ContainerUploadArgs(
                    file=f"{_MOUNT}/{file.path}",
                    content=pulumi.Output.secret(file.content) if file.is_secret else file.content,
                    owner=uid,
                    group=gid,
                    permissions=file.mode,
                )
                for file in files
            ],
            opts=pulumi.ResourceOptions(parent=self, delete_before_replace=True),
        )
        # The name only once the files are in it: whoever mounts the volume waits for them.
        self.volume_name = pulumi.Output.all(volume.name, carrier.id).apply(lambda parts: str(parts[0]))
        self.register_outputs({"volume_name": self.volume_name})

    def mount(self) -> docker.ContainerVolumeArgs:
        """Mount the files where the service expects them, read-only."""
        return docker.ContainerVolumeArgs(volume_name=self.volume_name, container_path=FILES_ROOT, read_only=True)
