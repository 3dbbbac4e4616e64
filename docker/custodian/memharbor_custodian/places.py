"""
A bucket of an S3 service, or a folder of one, as the custodian sees it.

Bytes are verified on every way: what is read against the ETag where that is an MD5, what is written by a Content-MD5 that
the service checks. Keys are relative to the place's folder.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from memharbor_custodian.errors import CustodianError, UnreachableError
from memharbor_custodian.versions import Entry

# Parts of one upload, and what each copying thread holds in memory, in bytes.
PART_BYTES = 16 * 1024 * 1024
_DELETE_AT_ONCE = 500
_NOT_FOUND = ("404", "NoSuchKey", "NotFound", "NoSuchVersion")


class GoneError(CustodianError):
    """An object that was listed is not there any more."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One current object: its size in bytes, and its ETag without quotes."""

    key: str
    etag: str
    size_bytes: int


class Place:
    """
    A folder of a bucket.

    Args:
        name: How messages call it.
        client: A boto3 S3 client.
        bucket: The bucket.
        folder: What every key begins with, with its final `/`; empty for the whole bucket.
        page_size: How many entries are listed at a time.
    """

    def __init__(self, name: str, client: Any, bucket: str, folder: str = "", *, page_size: int = 1000) -> None:
        self.name, self._client, self._bucket, self._folder = name, client, bucket, folder
        self._page_size = page_size

    def objects(self, below: str = "") -> dict[str, Stored]:
        """List the current objects, by key."""
        found: dict[str, Stored] = {}
        with self._translated("list"):
            for page in self._pages("list_objects_v2", below):
                for each in page.get("Contents", []):
                    key = each["Key"].removeprefix(self._folder)
                    found[key] = Stored(key, each["ETag"].strip('"'), each["Size"])
        return found

    def entries(self, below: str = "") -> list[Entry]:
        """List every version and delete marker, the newest of each key first."""
        # By key, then by version: versitygw lists the last entry of a page once more on the next one.
        found: dict[str, dict[str, Entry]] = {}
        latest: dict[str, str] = {}
        with self._translated("list the versions of"):
            for page in self._pages("list_object_versions", below):
                for kind in ("Versions", "DeleteMarkers"):
                    for each in page.get(kind, []):
                        key, version_id = each["Key"].removeprefix(self._folder), each["VersionId"]
                        found.setdefault(key, {})[version_id] = Entry(
                            key, version_id, kind == "DeleteMarkers", each["LastModified"], each.get("Size", 0)
                        )
                        if each["IsLatest"]:
                            latest[key] = version_id
        # The service lists versions and markers apart; what it calls the latest stays the first whatever the clocks say.
        return [
            entry
            for key in sorted(found)
            for entry in sorted(
                found[key].values(), key=lambda entry: (entry.version_id != latest.get(key), -entry.made_at.timestamp())
            )
        ]

    def read(self, key: str) -> bytes | None:
        """Read a small object whole; `None` where there is none."""
        with self._translated(f"read `{key}` of"):
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._folder + key)
            except ClientError as exc:
                if _code(exc) in _NOT_FOUND:
                    return None
                raise
            content: bytes = answer["Body"].read()
            return content

    def write(self, key: str, content: bytes) -> str:
        """Write a small object whole; returns its ETag."""
        with self._translated(f"write `{key}` into"):
            answer = self._client.put_object(
                Bucket=self._bucket, Key=self._folder + key, Body=content, ContentMD5=_md5(content)
            )
        return str(answer["ETag"]).strip('"')

    def copy_from(self, source: Place, key: str, *, version_id: str = "", known_etag: str = "") -> tuple[str, str]:
        """
        Copy an object of another place, or an older version of this one, part by part.

        Args:
            source: The other place.
            key: The object, here and there.
            version_id: Which version; the current one by default.
            known_etag: What its ETag was where it was written first; the source's own by default.

        Returns:
            The ETags of the source and of what was written.

        Raises:
            GoneError: The source is not there any more.
            CustodianError: The source is damaged, or the service did not take all of it; what was there stays.
        """
        parts = source.parts(key, version_id)
        first, etag, size_bytes = next(parts)
        expected = known_etag or etag
        whole = hashlib.md5(first, usedforsecurity=False)
        if size_bytes == len(first):
            check_md5(source.name, key, expected, whole.hexdigest())
            written = self.write(key, first)
        else:
            written = self._write_parts(source, key, expected, first, parts, whole)
        with self._translated(f"look at `{key}` in"):
            arrived = self._client.head_object(Bucket=self._bucket, Key=self._folder + key)
        if arrived["ContentLength"] != size_bytes:
            raise CustodianError(f"`{key}` has {arrived['ContentLength']} bytes in the {self.name}, not {size_bytes}")
        return etag, written

    def parts(self, key: str, version_id: str = "") -> Iterator[tuple[bytes, str, int]]:
        """Read an object part by part; with each one come its ETag and its whole size in bytes."""
        wanted = {"VersionId": version_id} if version_id else {}
        with self._translated(f"read `{key}` of"):
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._folder + key, **wanted)
            except ClientError as exc:
                if _code(exc) in _NOT_FOUND:
                    raise GoneError(f"`{key}` is not in the {self.name} any more") from exc
                raise
            etag, body = answer["ETag"].strip('"'), answer["Body"]
            size_bytes = answer["ContentLength"]
            yield body.read(PART_BYTES), etag, size_bytes
            while part := body.read(PART_BYTES):
                yield part, etag, size_bytes

    def delete(self, keys: Iterable[str]) -> int:
        """Delete current objects; a versioned bucket keeps their versions. Returns how many."""
        return self._delete([{"Key": self._folder + key} for key in keys])

    def delete_entries(self, entries: Iterable[Entry]) -> int:
        """Delete versions or delete markers for good; returns how many."""
        return self._delete([{"Key": self._folder + entry.key, "VersionId": entry.version_id} for entry in entries])

    def is_versioned(self) -> bool | None:
        """Tell whether the bucket keeps versions; `None` where this key may not know."""
        try:
            with self._translated("look at"):
                return bool(self._client.get_bucket_versioning(Bucket=self._bucket).get("Status") == "Enabled")
        except UnreachableError:
            raise
        except CustodianError:
            return None

    def abort_uploads(self, *, begun_before: datetime, dry_run: bool = False) -> int:
        """Give uploads in parts up that were begun before a moment and never ended; returns how many."""
        count = 0
        with self._translated("list the unfinished uploads of"):
            for page in self._pages("list_multipart_uploads", ""):
                for each in page.get("Uploads", []):
                    if each["Initiated"] >= begun_before:
                        continue
                    count += 1
                    if not dry_run:
                        self._client.abort_multipart_upload(
                            Bucket=self._bucket, Key=each["Key"], UploadId=each["UploadId"]
                        )
        return count

    def _write_parts(
        self, source: Place, key: str, etag: str, first: bytes, rest: Iterator[tuple[bytes, str, int]], whole: Any
    ) -> str:
        target = {"Bucket": self._bucket, "Key": self._folder + key}
        with self._translated(f"write `{key}` into"):
            upload = {**target, "UploadId": self._client.create_multipart_upload(**target)["UploadId"]}
            try:
                done = [self._write_part(upload, 1, first)]
                for part, _, _ in rest:
                    whole.update(part)
                    done.append(self._write_part(upload, len(done) + 1, part))
                # Before it is completed: a damaged source must not replace a good copy.
                check_md5(source.name, key, etag, whole.hexdigest())
                answer = self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": done})
            except BaseException:
                self._client.abort_multipart_upload(**upload)
                raise
        return str(answer["ETag"]).strip('"')

    def _write_part(self, upload: dict[str, str], number: int, part: bytes) -> dict[str, Any]:
        answer = self._client.upload_part(**upload, PartNumber=number, Body=part, ContentMD5=_md5(part))
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _delete(self, objects: Sequence[dict[str, str]]) -> int:
        with self._translated("delete from"):
            for begin in range(0, len(objects), _DELETE_AT_ONCE):
                wanted = objects[begin : begin + _DELETE_AT_ONCE]
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": wanted, "Quiet": True})
                failed = answer.get("Errors", [])
                if failed:
                    first = failed[0]
                    raise CustodianError(
                        f"the {self.name} did not delete {len(failed)} of {len(wanted)} objects:"
                        f" `{first.get('Key')}`: {first.get('Code')} {first.get('Message', '')}".rstrip()
                    )
        return len(objects)

    def _pages(self, operation: str, below: str) -> Iterator[dict[str, Any]]:
        paginator = self._client.get_paginator(operation)
        paging = {"PageSize": self._page_size}
        yield from paginator.paginate(Bucket=self._bucket, Prefix=self._folder + below, PaginationConfig=paging)

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        """Raise what the service or the way to it refuses as ours, in its own words."""
        try:
            yield
        except ClientError as exc:
            error = exc.response.get("Error", {})
            raise CustodianError(
                f"cannot {doing} the {self.name}: {error.get('Code', '')} {error.get('Message', '')}".rstrip()
            ) from exc
        except (BotoCoreError, OSError) as exc:
            raise UnreachableError(f"cannot {doing} the {self.name}: {exc}") from exc


def check_md5(place: str, key: str, etag: str, found: str) -> None:
    """
    Compare the MD5 of what was read with an object's ETag, where that is one.

    Raises:
        CustodianError: They differ.
    """
    # Of an upload in parts the ETag is another kind of hash.
    if len(etag) == len(found) and "-" not in etag and etag != found:
        raise CustodianError(f"`{key}` is damaged in the {place}: its MD5 is {found} and should be {etag}")


def _md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


def _code(exc: ClientError) -> str:
    return str(exc.response.get("Error", {}).get("Code", ""))


def connect(endpoint: str, region: str, key: Sequence[str], ca_file: str | None) -> Any:
    """
    Make a client of an S3 service over TLS.

    Args:
        endpoint: URL.
        region: As the service calls it; part of every signature.
        key: Access key and secret key.
        ca_file: Certificates of who may have signed the service's own; `None` is whom the system trusts.
    """
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=region,
        aws_access_key_id=key[0],
        aws_secret_access_key=key[1],
        verify=ca_file or True,
        config=Config(
            connect_timeout=5,
            read_timeout=60,
            retries={"total_max_attempts": 4, "mode": "standard"},
            # Content-MD5 is sent instead, which every S3 service knows.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"},
        ),
    )
