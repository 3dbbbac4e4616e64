"""
Where logical backups are kept: a folder, or a prefix in an S3 bucket.

A backup appears under its name when it is complete and not before: in a folder by renaming it, in a bucket by sending
`SHA256SUMS` last. Sources: rename(2), flock(2); Amazon S3, strong consistency; botocore, AWS_* variables.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import urlsplit

from memharbor.backup.logical_format import MANIFEST, SUMS
from memharbor.errors import ConfigError, ExternalToolError, StateRefusedError, UsageError

_PREFIX = "memharbor-"
_PARTIAL = ".partial"


class Destination(Protocol):
    """A place with logical backups, each under its name."""

    def list_backups(self) -> list[str]:
        """List the names of complete backups, sorted."""

    def spell(self, name: str) -> str:
        """Say where a backup is, as a command line names it."""

    def create(self, name: str) -> Any:
        """Lend a folder to write a backup into; it appears under its name when the block ends well."""

    def fetch(self, name: str, *, only_manifest: bool = False) -> Any:
        """Lend a folder that holds a backup."""


def find_destination(place: str) -> Destination:
    """
    Find a destination by what `--destination` says.

    Raises:
        UsageError: It is an address of another kind.
    """
    if "://" not in place:
        return Folder(Path(place))
    parts = urlsplit(place)
    if parts.scheme != "s3" or not parts.netloc:
        raise UsageError(f"`{place}` is no destination", hint="give a folder, or `s3://bucket/prefix/`")
    return Bucket(parts.netloc, parts.path.strip("/"))


def find_backup(place: str) -> tuple[Destination, str]:
    """
    Find one backup by what a command line names: its folder, or `s3://bucket/prefix/NAME`.

    Raises:
        UsageError: It is an address of another kind, or a bucket's own.
    """
    if "://" not in place:
        path = Path(place).absolute()
        return Folder(path.parent), path.name
    parent, _, name = place.rstrip("/").rpartition("/")
    if parent.endswith("/"):
        raise UsageError(f"`{place}` names no backup", hint="give `s3://bucket/prefix/NAME`")
    return find_destination(parent), name


@dataclass(frozen=True)
class Folder:
    """
    A folder with backups, each a folder of its own.

    Args:
        path: The folder; made where it is missing.
    """

    path: Path

    def list_backups(self) -> list[str]:
        """List the names of complete backups; see `Destination`."""
        if not self.path.is_dir():
            return []
        return sorted(each.name for each in self.path.iterdir() if (each / SUMS).is_file() and not _is_partial(each))

    def spell(self, name: str) -> str:
        """Say where a backup is; see `Destination`."""
        return str(self.path / name)

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """Lend a folder that is renamed at the end; what killed ones left is removed. See `Destination`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            partial = self.path / f"{name}{_PARTIAL}"
            partial.mkdir(mode=0o700)
        except OSError as exc:
            raise ConfigError(f"`{self.path}` cannot be written to: {exc}") from exc
        held = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield partial
            _sync(partial)
            partial.rename(self.path / name)
            _sync(self.path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(held)

    @contextmanager
    def fetch(self, name: str, *, only_manifest: bool = False) -> Iterator[Path]:
        """Lend the backup's own folder; see `Destination`."""
        folder = self.path / name
        if not folder.is_dir():
            raise StateRefusedError(f"there is no backup `{folder}`", hint=f"look with `ls {self.path}`")
        yield folder

    def _remove_leftovers(self) -> None:
        for each in self.path.iterdir():
            if not _is_partial(each):
                continue
            try:
                held = os.open(each, os.O_RDONLY)
            except FileNotFoundError:
                continue  # it was finished, or somebody else tidied up
            try:
                # Who writes holds the lock until the end of its process.
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(each, ignore_errors=True)
            except BlockingIOError:
                continue
            finally:
                os.close(held)


@dataclass(frozen=True)
class Bucket:
    """
    A prefix in an S3 bucket. Keys, region, endpoint and CA are found as AWS's own tools find them.

    Args:
        name: The bucket.
        prefix: Without slashes at its ends; may be empty.
    """

    name: str
    prefix: str

    def list_backups(self) -> list[str]:
        """List the names of complete backups; see `Destination`."""
        with self._errors("list"):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self._key(""))
            keys = [PurePosixPath(each["Key"]) for page in pages for each in page.get("Contents", [])]
        here = PurePosixPath(self.prefix)
        return sorted(key.parent.name for key in keys if key.name == SUMS and key.parent.parent == here)

    def spell(self, name: str) -> str:
        """Say where a backup is; see `Destination`."""
        return f"s3://{self.name}/{self._key(name)}"

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """Lend a folder of this machine that is sent at the end; see `Destination`."""
        with self._errors("write to"):
            self._client.head_bucket(Bucket=self.name)
        with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
            yield Path(folder)
            files = sorted(Path(folder).iterdir(), key=lambda path: (path.name == SUMS, path.name == MANIFEST))
            with self._errors("write to"):
                for path in files:
                    self._client.upload_file(str(path), self.name, self._key(f"{name}/{path.name}"))

    @contextmanager
    def fetch(self, name: str, *, only_manifest: bool = False) -> Iterator[Path]:
        """Lend a copy on this machine, which is removed at the end; see `Destination`."""
        with tempfile.TemporaryDirectory(prefix=_PREFIX) as parent:
            folder = Path(parent) / name
            folder.mkdir()
            with self._errors("read"):
                pages = self._client.get_paginator("list_objects_v2").paginate(
                    Bucket=self.name, Prefix=self._key(f"{name}/")
                )
                keys = [each["Key"] for page in pages for each in page.get("Contents", [])]
                if not keys:
                    raise StateRefusedError(f"there is no backup `{self.spell(name)}`")
                for key in keys:
                    file = PurePosixPath(key).name
                    if key != self._key(f"{name}/{file}") or (only_manifest and file not in (MANIFEST, SUMS)):
                        continue
                    self._client.download_file(self.name, key, str(folder / file))
            yield folder

    def _key(self, below: str) -> str:
        return f"{self.prefix}/{below}" if self.prefix else below

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        config = Config(
            # A store of one's own rarely has a name per bucket, and may not know the newer checksums.
            s3={"addressing_style": "path" if endpoint else "auto"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "max_attempts": 5},
        )
        try:
            session = boto3.session.Session()
            return session.client("s3", region_name=session.region_name or "us-east-1", config=config)
        except (BotoCoreError, ValueError) as exc:
            raise ConfigError(f"the S3 settings cannot be used: {exc}", hint="look at the AWS_* variables") from exc

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError, Boto3Error) as exc:
            raise ExternalToolError(
                f"cannot {doing} `s3://{self.name}/{self.prefix}`: {exc}",
                hint="look at AWS_ENDPOINT_URL, AWS_PROFILE or AWS_ACCESS_KEY_ID, and AWS_CA_BUNDLE",
            ) from exc


def _is_partial(path: Path) -> bool:
    return path.name.startswith(_PREFIX) and path.name.endswith(_PARTIAL) and path.is_dir()


def _sync(folder: Path) -> None:
    held = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)
