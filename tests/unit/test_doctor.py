"""What the doctor says: about a machine without a stack, about what breaks, and about what will."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from docker.errors import DockerException

from memharbor import doctor
from memharbor.doctor import machine, services
from memharbor.doctor.findings import Finding, Findings, collect
from memharbor.errors import ConnectError, ExternalToolError
from memharbor.stack import StackOutputs
from memharbor.stack.certificates import AUTHORITY_DAYS, LEAF_DAYS, find_expiry
from memharbor.stack.config import SECRETS_KEY
from memharbor.stack.handshake import read_served_certificate
from memharbor.stack.secrets import StackSecrets, complete_secrets
from tests.unit.test_stack import checkout, endpoint, put_outputs, raw_outputs

__all__ = ["checkout"]


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in os.environ:
        if name.startswith("MEMHARBOR_"):
            monkeypatch.delenv(name)


@contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[int]:
    with socket.create_server((host, 0)) as server:
        yield server.getsockname()[1]


def say(words: str, checkout: Path) -> None:
    (checkout / "bin" / "pulumi").write_text(
        f"#!/bin/sh\n[ $1 = version ] && exec echo v9.9.9\necho '{words}' >&2\nexit 255\n"
    )


# --- what breaks


@pytest.mark.parametrize(
    "broken",
    [
        ExternalToolError("pgBackRest failed"),
        ConnectError("no engine", hint="make setup"),
        psycopg.errors.InsufficientPrivilege("permission denied for function pg_ls_dir"),
        DockerException("500 Server Error"),
        ConnectionResetError("the engine went away"),
    ],
)
def test_a_check_that_breaks_is_a_finding_after_what_it_found(broken: Exception) -> None:
    def check() -> Findings:
        yield Finding("x", "ok", "good")
        raise broken

    good, bad = collect("x", check, "run something")
    assert good.level == "ok"
    assert (bad.area, bad.level) == ("x", "failed")
    assert bad.cause
    assert bad.next_command == ("make setup" if isinstance(broken, ConnectError) else "run something")


@pytest.mark.parametrize(
    ("said", "hinted"),
    [
        ("error: incorrect passphrase", "source .venv/bin/activate"),
        ('error: unable to open state directory "file:///gone": stat /gone: no such file or directory', "make setup"),
        ("error: something else", "make setup"),
    ],
)
def test_a_stack_that_cannot_be_read_is_a_finding(checkout: Path, said: str, hinted: str) -> None:
    say(said, checkout)
    found = {finding.area: finding for finding in doctor.examine("dev", None)}
    assert found["stack"].level == "failed"
    assert said in found["stack"].cause
    assert hinted in found["stack"].next_command
    assert {"python", "pulumi", "engine", "disk"} <= set(found)


def test_a_database_that_does_not_answer_is_a_finding_with_a_command_and_without_its_password() -> None:
    (found,) = doctor.examine("dev", "postgresql://me:hunter2@127.0.0.1:1/x")  # pragma: allowlist secret
    assert (found.area, found.level) == ("database", "failed")
    assert found.next_command == "psql postgresql://me@127.0.0.1:1/x"
    assert "hunter2" not in repr(found)


# --- ports


def test_the_ports_of_the_environment_are_looked_at_for_a_new_stack(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening() as port:
        monkeypatch.setenv("MEMHARBOR_POSTGRES_PORT", str(port))
        monkeypatch.setenv("MEMHARBOR_POOL_PORT", "1")
        found = doctor.examine("dev", None)
        assert any(finding.area == "ports" and "pool_port" in finding.cause for finding in found), "a wrong setting"
        monkeypatch.setenv("MEMHARBOR_POOL_PORT", "64321")
        monkeypatch.setattr(machine, "find_port_holder", lambda _: None)
        taken, _ = list(machine.check_ports("dev"))
    assert taken.level == "failed"
    assert taken.cause == f"port {port} is taken by another program"
    assert taken.next_command.startswith("export MEMHARBOR_POSTGRES_PORT=")


def test_the_ports_of_a_stack_that_exists_are_those_of_its_config(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening() as port:
        monkeypatch.setenv("MEMHARBOR_POSTGRES_PORT", "64322")
        (checkout / "state.json").write_text(json.dumps({"dev": {"memharbor:postgres_port": str(port)}}))
        monkeypatch.setattr(machine, "find_port_holder", lambda _: ("other", "other-postgres-0"))
        taken, _ = list(machine.check_ports("dev"))
        assert taken.cause == f"port {port} is taken by `other-postgres-0` of stack `other`"
        assert taken.next_command.startswith("pulumi config set postgres_port ")
        assert taken.next_command.endswith(" --stack dev")
        monkeypatch.setattr(machine, "find_port_holder", lambda _: ("dev", "dev-postgres-0"))
        taken, _ = list(machine.check_ports("dev"))
        assert taken.next_command == "docker stop dev-postgres-0"


# --- certificates


@contextmanager
def serving(secrets: StackSecrets, folder: Path, node: str) -> Iterator[int]:
    """Answer PostgreSQL's SSLRequest, then shake hands with the certificate of a node."""
    pair = secrets.certificates[node]
    (folder / "server.crt").write_text(pair.certificate)
    (folder / "server.key").write_text(pair.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")

    def answer(server: socket.socket) -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            with client, suppress(OSError):  # a client may leave right after the handshake
                assert client.recv(8) == b"\0\0\0\x08\x04\xd2\x16\x2f"
                client.sendall(b"S")
                with context.wrap_socket(client, server_side=True) as wrapped:
                    wrapped.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,), daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.fixture
def certified(checkout: Path, tmp_path: Path) -> Iterator[tuple[StackOutputs, datetime]]:
    """A stack of ten minutes ago whose servers answer."""
    made_at = datetime.now(UTC).replace(microsecond=0)
    secrets = complete_secrets("dev", ["postgres-0", "pgbouncer-0", "backup-store-0"], now=made_at)
    with serving(secrets, tmp_path, "postgres-0") as port:
        raw = raw_outputs(ca_certificate=secrets.authority.certificate)
        raw["endpoints"] |= {"rw": endpoint(port), "pool": endpoint(port)}
        put_outputs(checkout, raw)
        (checkout / "state.json").write_text(json.dumps({"dev": {SECRETS_KEY: secrets.model_dump_json()}}))
        yield StackOutputs.model_validate(raw), made_at


@pytest.mark.parametrize(
    ("days", "levels"),
    [
        (0, {"ok"}),
        (LEAF_DAYS - 61, {"ok"}),
        (LEAF_DAYS - 59, {"warning"}),
        (LEAF_DAYS, {"failed"}),
        (AUTHORITY_DAYS - 59, {"failed", "warning"}),
    ],
)
def test_certificates_are_told_of_before_and_after_they_expire(
    certified: tuple[StackOutputs, datetime], days: int, levels: set[str]
) -> None:
    outputs, made_at = certified
    found = list(services.check_certificates(outputs, now=made_at + timedelta(days=days)))
    assert {finding.level for finding in found} == levels
    if "ok" not in levels:
        assert {"postgres", "pgbouncer", "backup-store-0"} <= {
            finding.cause.split(" expire")[0].removeprefix("the certificate of ") for finding in found
        }
        assert all(finding.next_command for finding in found)


def test_an_expired_certificate_can_still_be_read(tmp_path: Path) -> None:
    secrets = complete_secrets("dev", ["postgres-0"], now=datetime(2020, 1, 1, tzinfo=UTC))
    with serving(secrets, tmp_path, "postgres-0") as port:
        shown = read_served_certificate("127.0.0.1", port)
    assert find_expiry(shown) == datetime(2020, 1, 1, tzinfo=UTC) + timedelta(days=LEAF_DAYS)


def test_a_port_where_nothing_answers_is_a_connect_error() -> None:
    with listening() as port:
        pass
    with pytest.raises(ConnectError, match="no TLS handshake"):
        read_served_certificate("127.0.0.1", port)


# --- backups


class FakeEngine:
    """The repository of a cluster that is gone."""

    def foreign_system_id(self) -> str | None:
        return "7345"

    def list_backups(self) -> list[Any]:
        return []


def test_a_repository_of_another_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Opened:
        engine = FakeEngine()

    monkeypatch.setattr(services, "open_stack", lambda _: Opened())
    found = list(services.check_backups(StackOutputs.model_validate(raw_outputs())))
    assert found[0].level == "failed"
    assert "another cluster than the running one (system identifier 7345)" in found[0].cause
    assert found[0].next_command == "memharbor restore"
