"""
The build contexts of the images: what goes in, and the hash that names the result.

Pure but for reading `docker/` and assembling the backup store's context; no Pulumi, so that the integration tests build
and find the very images that `pulumi up` uses.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memharbor.errors import ConfigError

CHECKOUT = Path(__file__).resolve().parents[2]
_HASH_LENGTH = 12


@dataclass(frozen=True)
class BuildContext:
    """A folder that one image is built from, and the base image that it is built on."""

    name: str
    folder: Path
    base_image: str

    @property
    def digest(self) -> str:
        """Hash of all that the image is made of: names, contents and executable bits, the base image's name."""
        digest = hashlib.sha256(f"{self.base_image}\0".encode())
        # What Python compiled for the tests is not part of it: .dockerignore leaves it out as well.
        files = (entry for entry in self.folder.rglob("*") if entry.is_file() and entry.parent.name != "__pycache__")
        for path in sorted(files):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(self.folder)}\0{os.access(path, os.X_OK)}\0{content}\0".encode())
        return digest.hexdigest()[:_HASH_LENGTH]

    @property
    def tag(self) -> str:
        """Name of the image, for instance `memharbor/postgres:0123456789ab`."""
        return f"memharbor/{self.name}:{self.digest}"

    @property
    def build_arguments(self) -> dict[str, str]:
        """What the Dockerfile is given."""
        return {"BASE_IMAGE": self.base_image}


def source_context(name: str, base_image: str) -> BuildContext:
    """Describe an image whose context is a folder of `docker/`, as it lies there."""
    return BuildContext(name, CHECKOUT / "docker" / name, base_image)


def store_context(base_image: str, binary: Path | None = None) -> BuildContext:
    """
    Assemble the backup store's context: `docker/backup-store` and the gateway's binary.

    The same files give the same folder, byte for byte; it is rebuilt on every call.

    Args:
        base_image: What the image is built on.
        binary: The gateway; that of the environment by default.

    Raises:
        ConfigError: There is no gateway.
    """
    name = "backup-store"
    folder = CHECKOUT / ".memharbor" / "build" / name
    source = CHECKOUT / "docker" / name
    gateway = binary or find_gateway([Path(sys.prefix) / "bin"])
    wanted = {path.name: path for path in source.iterdir() if path.is_file()} | {"versitygw": gateway}
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink()
    for file_name, path in wanted.items():
        _copy_if_different(path, folder / file_name)
    return BuildContext(name, folder, base_image)


def _copy_if_different(source: Path, target: Path) -> None:
    is_executable = os.access(source, os.X_OK)
    if not target.exists() or source.read_bytes() != target.read_bytes():
        # By rename: another `pulumi up` may be reading the folder.
        incoming = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(source, incoming)
        incoming.replace(target)
    target.chmod(0o755 if is_executable else 0o644)


def find_gateway(folders: Sequence[Path]) -> Path:
    """
    Find versitygw in one of the folders or on PATH.

    Raises:
        ConfigError: It is nowhere.
    """
    for folder in folders:
        if (folder / "versitygw").exists():
            return (folder / "versitygw").resolve()
    found = shutil.which("versitygw")
    if found is None:
        raise ConfigError("`versitygw`, the backup store's gateway, is not installed", hint="run `make setup`")
    return Path(found).resolve()


def build_contexts(base_image: str) -> dict[str, BuildContext]:
    """Describe every image of a stack, by name."""
    contexts = [
        source_context("postgres", base_image),
        source_context("pgbouncer", base_image),
        source_context("custodian", base_image),
        store_context(base_image),
    ]
    return {context.name: context for context in contexts}
