"""
Who runs in each image, and what it may write to besides its data volume: memory-backed folders, by path.

Pure, no Pulumi: the integration tests run the same images the same way. The numbers are made in the Dockerfiles.
"""

from __future__ import annotations

from memharbor.server_files.postgres import (
    LOCK_DIRECTORY,
    POOLER_SOCKET_DIRECTORY,
    POSTGRES_SOCKET_DIRECTORY,
    SPOOL_DIRECTORY,
)

POSTGRES_USER = "101:101"
POOLER_USER = "102:102"
STORE_USER = "10001:10001"
CUSTODIAN_USER = "10002:10002"


def scratch(megabytes: int, user: str, mode: str = "0700") -> str:
    """
    Spell the options of a tmpfs mount.

    >>> scratch(1, "101:101")
    'rw,nosuid,nodev,noexec,uid=101,gid=101,mode=0700,size=1m'
    """
    uid, gid = user.split(":")
    return f"rw,nosuid,nodev,noexec,uid={uid},gid={gid},mode={mode},size={megabytes}m"


POSTGRES_SCRATCH = {
    "/tmp": scratch(64, POSTGRES_USER, mode="1777"),  # noqa: S108 - the container's own
    POSTGRES_SOCKET_DIRECTORY: scratch(1, POSTGRES_USER, mode="0775"),
    LOCK_DIRECTORY: scratch(8, POSTGRES_USER),
    # Acknowledgements of archived WAL, and WAL fetched ahead of a recovery; losing it is safe.
    SPOOL_DIRECTORY: scratch(256, POSTGRES_USER, mode="0750"),
}
POOLER_SCRATCH = {POOLER_SOCKET_DIRECTORY: scratch(1, POOLER_USER)}
STORE_SCRATCH = {"/run/memharbor": scratch(1, STORE_USER)}
CUSTODIAN_SCRATCH = {"/run/memharbor": scratch(1, CUSTODIAN_USER)}
