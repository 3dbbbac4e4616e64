"""What the containers are from inside: processes, users, listening addresses, file modes, TLS. And from outside: ports."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import docker
import psycopg
import pytest
import testinfra

from tests.e2e.conftest import Stack

# Service, user id, the process that must run, what it listens on (port, and whether beyond loopback).
SERVICES = {
    "postgres-0": (101, "postgres", {5432: True}),
    "pgbouncer-0": (102, "pgbouncer", {6432: True}),
    "backup-store-0": (10001, "versitygw", {7070: True, 7080: False}),
    "custodian-0": (10002, "supercronic", {}),
}
PRIVATE_FILES = {
    "postgres-0": (
        "/etc/memharbor/secrets/superuser",
        "/etc/memharbor/tls/server.key",
        "/etc/memharbor/pgbackrest/conf.d/secrets.conf",
    ),
    "pgbouncer-0": ("/etc/memharbor/tls/server.key",),
    "backup-store-0": ("/etc/memharbor/tls/server.key",),
    "custodian-0": ("/etc/memharbor/secrets/custodian.json",),
}


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def host(stack: Stack, service: str) -> Any:
    return testinfra.get_host(f"docker://{stack.name}-{service}")


def test_the_process_runs_as_its_own_user_and_nobody_is_root(host: Any, service: str) -> None:
    uid, process, _ = SERVICES[service]
    users = {}
    for status in host.check_output("cat /proc/[0-9]*/status 2>/dev/null || true").split("Name:\t")[1:]:
        lines = dict(line.split(":\t", 1) for line in ("Name:\t" + status).splitlines() if ":\t" in line)
        users[lines["Name"]] = int(lines["Uid"].split()[0])
        assert int(lines["CapEff"], 16) == 0, lines["Name"]
        assert lines["NoNewPrivs"] == "1", lines["Name"]
    assert users[process] == uid
    assert 0 not in users.values()


def listening(host: Any) -> dict[int, bool]:
    """Ports in state LISTEN, and whether any of their addresses is beyond loopback."""
    ports: dict[int, bool] = {}
    for line in host.check_output("cat /proc/net/tcp /proc/net/tcp6 2>/dev/null").splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[3] == "0A":
            address, port = fields[1].split(":")
            is_loopback = address in ("0100007F", "00000000000000000000000001000000")
            ports[int(port, 16)] = ports.get(int(port, 16), False) or not is_loopback
    return ports


def test_it_listens_where_it_should_and_nowhere_else(host: Any, service: str) -> None:
    # Docker's own name server of a user-defined network listens on a random port of 127.0.0.11.
    found = {port: beyond for port, beyond in listening(host).items() if port in SERVICES[service][2] or port < 20_000}
    assert found == SERVICES[service][2]


def test_private_files_are_private(host: Any, service: str) -> None:
    for path in PRIVATE_FILES[service]:
        file = host.file(path)
        assert (file.exists, oct(file.mode), file.uid) == (True, "0o400", SERVICES[service][0]), path


def attributes(stack: Stack, service: str) -> dict[str, Any]:
    client = docker.from_env()
    try:
        found: dict[str, Any] = client.containers.get(f"{stack.name}-{service}").attrs
    finally:
        client.close()
    return found


def test_the_root_is_read_only(stack: Stack, host: Any, service: str) -> None:
    assert attributes(stack, service)["HostConfig"]["ReadonlyRootfs"] is True
    # Not for want of a permission: as root of the container it would be the same.
    for path in ("/etc/x", "/usr/x"):
        assert "Read-only file system" in host.run(f"touch {path}").stderr


def test_the_data_directory_is_the_owners_alone_and_has_checksums(stack: Stack) -> None:
    host = testinfra.get_host(f"docker://{stack.name}-postgres-0")
    assert oct(host.file("/var/lib/postgresql/18/data").mode) == "0o700"
    assert host.check_output("psql -XAtqc 'show data_checksums'") == "on"
    assert host.check_output("df -m /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2") == "384"


def published(stack: Stack) -> dict[str, int]:
    return {
        "postgres": int(stack.environ["MEMHARBOR_POSTGRES_PORT"]),
        "pool": int(stack.environ["MEMHARBOR_POOL_PORT"]),
    }


# What PostgreSQL, PgBouncer, the store, pgBackRest's own server and Patroni would listen on.
USUAL_PORTS = {5432, 5433, 6432, 7070, 7080, 8008, 8432}
LOOPBACK = "127.0.0.1"


def own_addresses() -> list[str]:
    """Every address of this host but loopback ones; a link-local one with its interface."""
    local = re.compile(r"-- ([\d.]+)\n\s+/32 host LOCAL")
    found = set(local.findall(Path("/proc/net/fib_trie").read_text()))
    interfaces = Path("/proc/net/if_inet6")
    for line in interfaces.read_text().splitlines() if interfaces.exists() else ():
        number, *_, name = line.split()
        address = ipaddress.IPv6Address(bytes.fromhex(number))
        found.add(f"{address}%{name}" if address.is_link_local else str(address))
    return sorted(found - {address for address in found if ipaddress.ip_address(address.split("%")[0]).is_loopback})


def scan(address: str, ports: Iterable[int]) -> set[int]:
    """Connect to each port; returns those that accept."""
    try:
        family, *_, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        return set()  # the interface of a container that has just ended
    accepting = set()
    for port in ports:
        with socket.socket(family) as probe:
            probe.settimeout(3)
            # The kernel may choose the very port as the source, and then connects the socket to itself.
            if probe.connect_ex((place[0], port, *place[2:])) == 0 and probe.getsockname() != probe.getpeername():
                accepting.add(port)
    return accepting


def is_ours(address: str, port: int, ca_file: str) -> bool:
    """Tell whether who accepts has a certificate of this stack: other programs of this host may listen too."""
    context = ssl.create_default_context(cafile=ca_file)
    context.check_hostname = False
    for begin in (b"", struct.pack("!ii", 8, 80877103)):
        try:
            with socket.create_connection((address, port), timeout=3) as plain:
                plain.sendall(begin)
                if begin and plain.recv(1) != b"S":
                    continue
                with context.wrap_socket(plain):
                    return True
        except OSError:  # also where the handshake fails
            continue
    return False


def test_a_port_scan_finds_two_ports_on_loopback_and_none_elsewhere(
    stack: Stack, record_testsuite_property: Callable[[str, object], None]
) -> None:
    bindings: dict[int, str] = {}
    insides: dict[str, str] = {}
    client = docker.from_env()
    for container in client.containers.list(filters={"label": f"memharbor.stack={stack.name}"}):
        for places in container.ports.values():
            bindings |= {int(place["HostPort"]): place["HostIp"] for place in places or []}
        (network,) = container.attrs["NetworkSettings"]["Networks"].values()
        insides[str(container.name).removeprefix(f"{stack.name}-")] = network["IPAddress"]
    client.close()
    ours = set(published(stack).values())
    assert bindings == dict.fromkeys(ours, LOOPBACK)

    ca_file = str(psycopg.conninfo.conninfo_to_dict(stack.dsn("app"))["sslrootcert"])
    open_on_loopback = scan(LOOPBACK, range(1, 65536))
    elsewhere = ["::1", *own_addresses()]
    assert len(elsewhere) > 1, "this host has no address but loopback: nothing is known of how others would see it"
    found = {LOOPBACK: open_on_loopback}
    found |= {address: scan(address, USUAL_PORTS | open_on_loopback | ours) for address in elsewhere}
    answers = {a: sorted(port for port in ports if is_ours(a, port, ca_file)) for a, ports in found.items()}
    assert answers == {LOOPBACK: sorted(ours), **{address: [] for address in elsewhere}}

    # On the stack's own network, which this host routes to and nobody else does: what each container is there for.
    reachable = {service: scan(address, USUAL_PORTS) for service, address in insides.items()}
    assert reachable == {name: {port for port, beyond in SERVICES[name][2].items() if beyond} for name in SERVICES}
    said = {**answers, **{f"{name} on the stack's network": sorted(ports) for name, ports in reachable.items()}}
    record_testsuite_property("port_scan", json.dumps(said))


@pytest.mark.parametrize("endpoint", ["postgres", "pool"])
def test_the_certificate_is_the_stacks_and_its_name_is_checked(stack: Stack, endpoint: str) -> None:
    port = published(stack)[endpoint]
    ca_file = psycopg.conninfo.conninfo_to_dict(stack.dsn("app"))["sslrootcert"]
    context = ssl.create_default_context(cafile=str(ca_file))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    assert tls_version(port, context, "localhost") in ("TLSv1.2", "TLSv1.3")
    with pytest.raises(ssl.SSLCertVerificationError):
        tls_version(port, context, "elsewhere.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        tls_version(port, ssl.create_default_context(), "localhost")


def tls_version(port: int, context: ssl.SSLContext, name: str) -> str | None:
    """PostgreSQL's SSLRequest, then the handshake. Source: PostgreSQL manual, SSL Session Encryption."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.sendall(struct.pack("!ii", 8, 80877103))
        assert plain.recv(1) == b"S"
        with context.wrap_socket(plain, server_hostname=name) as wrapped:
            return wrapped.version()


@pytest.mark.parametrize("role", ["app", "service", "admin"])
def test_a_login_without_tls_is_refused(stack: Stack, role: str) -> None:
    for uri in {stack.dsn(role), stack.dsn(role, "--direct")}:
        with pytest.raises(psycopg.OperationalError, match=r"TLS|SSL|encryption|no pg_hba"):
            psycopg.connect(psycopg.conninfo.make_conninfo(uri, sslmode="disable"))


def test_a_wrong_password_is_refused_and_the_superuser_may_not_come_through_the_pool(stack: Stack) -> None:
    with pytest.raises(psycopg.OperationalError, match="authentication failed"):
        psycopg.connect(psycopg.conninfo.make_conninfo(stack.dsn("app"), password="wrong"))  # pragma: allowlist secret
    admin = psycopg.conninfo.conninfo_to_dict(stack.dsn("admin"))
    with pytest.raises(psycopg.OperationalError, match="no such user"):
        psycopg.connect(
            psycopg.conninfo.make_conninfo(stack.dsn("app"), user=admin["user"], password=admin["password"])
        )


def test_every_hop_is_encrypted_as_postgresql_sees_it(stack: Stack) -> None:
    query = "select ssl, version from pg_stat_ssl where pid = pg_backend_pid()"
    for options in ((), ("--direct",), ("--session",), ("--read-only",)):
        with psycopg.connect(stack.dsn("service", *options)) as connection:
            row = connection.execute(query).fetchone()
        assert row == (True, "TLSv1.3"), options


def test_archiving_works_end_to_end(stack: Stack) -> None:
    done = testinfra.get_host(f"docker://{stack.name}-postgres-0").run("pgbackrest --stanza=main check")
    assert done.rc == 0, done.stderr


def test_a_container_comes_back_after_a_crash(stack: Stack, host: Any, service: str) -> None:
    before = attributes(stack, service)
    assert before["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    # The engine's init is process 1 and dies with its only child; `docker kill` would count as a stop on purpose.
    host.run("kill -9 $(cat /proc/1/task/1/children)")
    deadline = time.monotonic() + 60
    after = before
    while time.monotonic() < deadline:
        after = attributes(stack, service)
        if after["RestartCount"] > before["RestartCount"] and after["State"]["Health"]["Status"] == "healthy":
            break
        time.sleep(0.3)
    assert after["RestartCount"] == before["RestartCount"] + 1
    assert after["State"]["StartedAt"] > before["State"]["StartedAt"]
    assert (after["State"]["Status"], after["State"]["Health"]["Status"]) == ("running", "healthy")
    while True:
        try:
            with psycopg.connect(stack.dsn("app")) as connection:
                assert connection.execute("select 1").fetchone() == (1,)
            break
        except psycopg.OperationalError:  # PgBouncer tries a server that failed again after some seconds
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    if service == "backup-store-0":
        done = testinfra.get_host(f"docker://{stack.name}-postgres-0").run("pgbackrest --stanza=main check")
        assert done.rc == 0, done.stderr
