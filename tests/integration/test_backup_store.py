"""The embedded backup store: its set-up at every start, and what a stolen backup key can do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import docker
import docker.errors
import pytest

from memharbor.errors import ConfigError
from memharbor.server_files.postgres import STORE_BUCKET
from tests.containers import Server, ThrowAway, throw_away

OBJECT = f"/{STORE_BUCKET}/pgbackrest/x"
VERSIONING = '<VersioningConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Status>{}</Status></VersioningConfiguration>'


@pytest.fixture(scope="module")
def run(server: Server) -> Iterator[ThrowAway]:
    server.container("postgres")
    with closing(docker.from_env(timeout=120)) as engine, throw_away(engine) as started:
        yield started


@pytest.fixture(scope="module")
def store(run: ThrowAway) -> Any:
    try:
        return run.backup_store()
    except ConfigError as exc:
        problem = f"{exc.message}: {exc.hints[0]}"
        if os.environ.get("CI") == "true":
            pytest.fail(problem)
        pytest.skip(problem)


class Client:
    """S3 calls with one key, by the curl inside the store's own container; the key goes in by stdin."""

    def __init__(self, container: Any, key: str, secret: str) -> None:
        self._container = container
        self._config = (
            f'user = "{key}:{secret}"\naws-sigv4 = "aws:amz:us-east-1:s3"\ncacert = "/etc/memharbor/tls/ca.crt"\n'
        )

    def __call__(self, method: str, path: str, body: str | None = None) -> tuple[int, str]:
        arguments = ["--request", method, f"https://localhost:7070{path}"]
        if body is not None:
            arguments += ["--header", "Content-Type: application/octet-stream", "--data-binary", body]
        done = self._container.exec_run(
            [
                "sh",
                "-c",
                'printf %s "$CONFIG" | curl --silent --write-out "\n%{http_code}" --config - "$@"',
                "-",
                *arguments,
            ],
            environment={"CONFIG": self._config},
        )
        said = done.output.decode()
        assert done.exit_code == 0, f"curl ended with {done.exit_code}: {said!r}"
        text, _, status = said.rpartition("\n")
        assert status.isdigit(), f"the engine lost the output of curl: {said!r}"
        return int(status), text


@pytest.fixture(scope="module")
def backup_key(run: ThrowAway, store: Any) -> Client:
    return Client(store, "pgbackrest", run.secrets.store_secrets["pgbackrest"])


@pytest.fixture(scope="module")
def custodian(run: ThrowAway, store: Any) -> Client:
    return Client(store, "custodian", run.secrets.store_secrets["custodian"])


def versions_of(custodian: Client) -> list[str]:
    status, listing = custodian("GET", f"/{STORE_BUCKET}?versions=")
    assert status == 200, listing
    return re.findall(r"<VersionId>([^<]+)</VersionId>", listing)


def test_the_backup_key_writes_reads_and_deletes(backup_key: Client) -> None:
    assert backup_key("PUT", OBJECT, "first")[0] == 200
    assert backup_key("GET", OBJECT) == (200, "first")
    assert backup_key("DELETE", OBJECT)[0] == 204
    assert backup_key("GET", OBJECT)[0] == 404


def test_what_the_backup_key_deleted_is_still_there(backup_key: Client, custodian: Client) -> None:
    backup_key("PUT", OBJECT, "kept")
    backup_key("DELETE", OBJECT)
    versions = versions_of(custodian)
    assert len(versions) >= 2
    assert "kept" in {custodian("GET", f"{OBJECT}?versionId={version}")[1] for version in versions}


def test_the_backup_key_cannot_destroy(backup_key: Client, custodian: Client) -> None:
    backup_key("PUT", OBJECT, "kept")
    (version, *_) = versions_of(custodian)
    attempts = {
        "delete a version": ("DELETE", f"{OBJECT}?versionId={version}", None),
        "suspend versioning": ("PUT", f"/{STORE_BUCKET}?versioning=", VERSIONING.format("Suspended")),
        "change the policy": ("PUT", f"/{STORE_BUCKET}?policy=", "{}"),
        "delete the policy": ("DELETE", f"/{STORE_BUCKET}?policy=", None),
        "delete the bucket": ("DELETE", f"/{STORE_BUCKET}", None),
        "make a bucket": ("PUT", "/another", None),
    }
    assert {what: backup_key(*attempt)[0] for what, attempt in attempts.items()} == dict.fromkeys(attempts, 403)
    assert custodian("DELETE", f"{OBJECT}?versionId={version}")[0] == 204


def test_a_stranger_gets_nothing(store: Any) -> None:
    assert Client(store, "pgbackrest", "wrong")("GET", f"/{STORE_BUCKET}")[0] == 403
    plain = store.exec_run(
        ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", "/etc/memharbor/tls/ca.crt"]
        + [f"https://localhost:7070/{STORE_BUCKET}"]
    )
    assert plain.output.decode() == "403"


def test_the_set_up_repeats_itself_without_harm(run: ThrowAway, store: Any, backup_key: Client) -> None:
    backup_key("PUT", OBJECT, "across restarts")
    for stop in (store.stop, store.kill):
        stop()
        store.start()
        run.wait(store)
        assert backup_key("GET", OBJECT) == (200, "across restarts")
    assert store.logs().decode().count(f"bucket {STORE_BUCKET} is ready") == 3


def test_data_can_be_read_without_the_gateway_and_is_written_through(store: Any) -> None:
    assert store.exec_run(["stat", "-c", "%a", f"/data/buckets/{STORE_BUCKET}"]).output.decode().strip() == "750"
    attributes = store.exec_run(["lsattr", "-d", f"/data/buckets/{STORE_BUCKET}"]).output.decode().split()[0]
    assert {"S", "D"} <= set(attributes), "the volume's filesystem has no synchronous writes"


def test_no_secret_is_an_argument_or_in_the_log(run: ThrowAway, store: Any) -> None:
    arguments = store.exec_run(["sh", "-c", "cat /proc/*/cmdline"]).output.decode()
    inspected = str(store.attrs)
    for secret in run.secrets.store_secrets.values():
        assert secret not in arguments
        assert secret not in inspected
        assert secret not in store.logs().decode()
