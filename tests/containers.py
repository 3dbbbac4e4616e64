"""
A throw-away PostgreSQL behind PgBouncer for the integration tests: our images, our server files, no Pulumi.

Images are those of `pulumi up` (the same context, the same tag) and are built where they are missing. What is started
carries a label with its owner, so that the next run removes what a killed one left.
"""

from __future__ import annotations

import gc
import io
import os
import secrets
import tarfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import docker
import docker.errors
import pytest

from memharbor.server_files.backup_store import store_files
from memharbor.server_files.custodian import custodian_files
from memharbor.server_files.pgbouncer import pgbouncer_files
from memharbor.server_files.postgres import (
    DATA_ROOT,
    FILES_ROOT,
    POOLER_PORT,
    POSTGRES_PORT,
    STORE_PORT,
    ServerFile,
    postgres_files,
)
from memharbor.settings import Settings
from memharbor.stack.secrets import ROLE_NAMES, StackSecrets, certificate_nodes, complete_secrets
from memharbor_infra.contexts import BuildContext, source_context, store_context
from memharbor_infra.mounts import (
    CUSTODIAN_SCRATCH,
    CUSTODIAN_USER,
    POOLER_SCRATCH,
    POOLER_USER,
    POSTGRES_SCRATCH,
    POSTGRES_USER,
    STORE_SCRATCH,
    STORE_USER,
)

OWNER_LABEL = "memharbor.test.owner"
START_SECONDS = 60
# Many test databases share the server; each is a pool of its own.
TEST_SETTINGS = Settings(max_connections=400, postgres_memory_mb=2048, pool_max_clients=2000)


@dataclass(eq=False)
class Server:
    """
    A server under test.

    Args:
        admin_uri: libpq URI of the administrator, without the database: `postgresql://…@host:port/{database}?…`.
        pool_address: `host:port` of PgBouncer, or `None` where there is none.
        passwords: Of our roles, by short name; the schema's own `apply_roles` brings them to the server.
        parameters: What every URI ends with.
    """

    admin_uri: str
    address: str
    pool_address: str | None
    passwords: dict[str, str]
    parameters: str
    containers: dict[str, str]

    def admin_dsn(self, database: str = "postgres") -> str:
        return self.admin_uri.format(database=quote(database, safe=""))

    def direct_dsn(self, database: str, role: str) -> str:
        return self._dsn(self.address, database, role)

    def pool_dsn(self, database: str, role: str) -> str:
        if self.pool_address is None:
            pytest.skip("MEMHARBOR_TEST_DSN names a server without our PgBouncer")
        return self._dsn(self.pool_address, database, role)

    def execute(self, service: str, command: Sequence[str]) -> tuple[int, str]:
        """Run a command in one of our containers; returns its exit code and output."""
        with closing(docker.from_env()) as engine:
            done = engine.containers.get(self.container(service)).exec_run(list(command))
        return done.exit_code, done.output.decode()

    def log(self, service: str) -> str:
        """Read the log of one of our containers."""
        with closing(docker.from_env()) as engine:
            return str(engine.containers.get(self.container(service)).logs().decode())

    def container(self, service: str) -> str:
        """Name one of our containers; the test skips where there is none."""
        if service not in self.containers:
            pytest.skip("MEMHARBOR_TEST_DSN names a server that is not in a container of ours")
        return self.containers[service]

    def _dsn(self, address: str, database: str, role: str) -> str:
        password = quote(self.passwords[role], safe="")
        return f"postgresql://{ROLE_NAMES[role]}:{password}@{address}/{quote(database, safe='')}{self.parameters}"


def our_passwords(stack_secrets: StackSecrets) -> dict[str, str]:
    return {role: password for role, password in stack_secrets.passwords.items() if role != "admin"}


def find_engine_problem() -> str | None:
    """Say why no Docker engine can be used; `None` where one answers."""
    with warnings.catch_warnings():
        # The client leaves its socket open when nobody answers.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            with closing(docker.from_env()) as engine:
                engine.ping()
        except docker.errors.DockerException as exc:
            problem = str(exc)
        else:
            return None
        gc.collect()
    return problem


@contextmanager
def running_server(folder: Path, settings: Settings = TEST_SETTINGS) -> Iterator[Server]:
    """
    Run PostgreSQL and PgBouncer until the block ends.

    Args:
        folder: Where the CA certificate is put for the clients.
        settings: What the server files are rendered from.
    """
    with closing(docker.from_env(timeout=120)) as engine, throw_away(engine, settings) as run:
        yield run.server(folder)


@contextmanager
def throw_away(engine: Any, settings: Settings = TEST_SETTINGS) -> Iterator[ThrowAway]:
    """Remove whatever is started in the block when it ends, and what earlier, killed runs left before it begins."""
    remove_leftovers(engine)
    run = ThrowAway(engine, settings)
    try:
        yield run
    finally:
        run.remove()


def remove_leftovers(engine: Any) -> None:
    """Remove what runs left whose process is gone."""
    for found in _labelled(engine, OWNER_LABEL):
        owner = _labels(found).get(OWNER_LABEL, "")
        if not is_alive(owner):
            _remove(found)


def owner_name() -> str:
    """Name this process so that it cannot be mistaken for a later one with the same number."""
    return f"{os.getpid()}:{_start_ticks(os.getpid())}"


def is_alive(owner: str) -> bool:
    pid, _, ticks = owner.partition(":")
    return pid.isdigit() and bool(ticks) and _start_ticks(int(pid)) == ticks


def _start_ticks(pid: int) -> str | None:
    try:
        # From the third field on: the name before them may hold blanks. Source: proc_pid_stat(5).
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    is_dead = state in ("Z", "X")
    return None if is_dead else fields[18]


class ThrowAway:
    """
    Containers, volumes and a network of one run, with a CA of their own.

    Args:
        engine: A client of the Docker engine.
        settings: What the server files are rendered from.
    """

    def __init__(self, engine: Any, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._id = f"memharbor-test-{secrets.token_hex(4)}"
        self._labels = {OWNER_LABEL: owner_name(), "memharbor.test": self._id}
        self.secrets = complete_secrets(self._id, certificate_nodes(settings))
        self._engine.networks.create(self._id, driver="bridge", labels=self._labels)

    def server(self, folder: Path) -> Server:
        """Start PostgreSQL and PgBouncer, reachable from this host."""
        ca_file = folder / "ca.crt"
        ca_file.write_text(self.secrets.authority.certificate, encoding="utf-8")
        postgres, pgbouncer = self.postgres(), self.pgbouncer()
        parameters = f"?sslmode=verify-full&sslrootcert={ca_file}&connect_timeout=10"
        address = self._address(postgres, POSTGRES_PORT)
        admin = quote(self.secrets.passwords["admin"], safe="")
        return Server(
            admin_uri=f"postgresql://postgres:{admin}@{address}/{{database}}{parameters}",
            address=address,
            pool_address=self._address(pgbouncer, POOLER_PORT),
            passwords=our_passwords(self.secrets),
            parameters=parameters,
            containers={"postgres": postgres.name, "pgbouncer": pgbouncer.name},
        )

    def postgres(self, *, archive: bool = False) -> Any:
        """Start PostgreSQL and wait until it answers; with `archive` it has the backup store, and a stanza to come."""
        node, settings = "postgres-0", self._settings
        return self._start(
            node,
            source_context("postgres", settings.base_image),
            POSTGRES_USER,
            postgres_files(settings, self._id, self.secrets, node, archive=archive),
            port=POSTGRES_PORT,
            # A crash of the machine may lose the tests' data; waiting for the disk would cost half of the time.
            command=["-c", "fsync=off", "-c", "full_page_writes=off"],
            data=DATA_ROOT,
            shm_size=f"{settings.shm_size_mb}m",
            mem_limit=f"{settings.postgres_memory_mb}m",
            stop_signal="SIGINT",
            tmpfs=POSTGRES_SCRATCH,
        )

    def pgbouncer(self) -> Any:
        """Start PgBouncer, which pools every database that there is or will be."""
        node, settings = "pgbouncer-0", self._settings
        return self._start(
            node,
            source_context("pgbouncer", settings.base_image),
            POOLER_USER,
            pgbouncer_files(settings, self.secrets, node, any_database=True),
            port=POOLER_PORT,
            mem_limit=f"{settings.pool_memory_mb}m",
            tmpfs=POOLER_SCRATCH,
        )

    def backup_store(self) -> Any:
        """Start the backup store and wait until its bucket is ready."""
        node, settings = "backup-store-0", self._settings
        return self._start(
            node,
            store_context(settings.base_image),
            STORE_USER,
            store_files(self.secrets, node),
            port=STORE_PORT,
            data="/data",
            mem_limit=f"{settings.store_memory_mb}m",
            tmpfs=STORE_SCRATCH,
        )

    def custodian(self, offsite_key: tuple[str, str] | None = None, **settings: Any) -> Any:
        """Start a custodian of the backup store, with an off-site copy where the settings say so."""
        chosen = self._settings.model_copy(update=settings)
        return self._start(
            "custodian-0",
            source_context("custodian", chosen.base_image),
            CUSTODIAN_USER,
            custodian_files(chosen, self._id, self.secrets, offsite_key),
            port=None,
            mem_limit=f"{chosen.custodian_memory_mb}m",
            tmpfs=CUSTODIAN_SCRATCH,
        )

    @property
    def name(self) -> str:
        """What a stack's name would be: containers, certificates and folders in the store begin with it."""
        return self._id

    def store_url(self, store: Any) -> str:
        """Name the URL of a backup store for this host."""
        return f"https://{self._address(store, STORE_PORT)}"

    def again(self, container: Any) -> tuple[int, str]:
        """Run another container like this one, on its volumes, to its end; returns its exit code and its log."""
        container.reload()
        attrs = container.attrs
        twin = self._engine.containers.create(
            attrs["Image"],
            labels=self._labels,
            user=attrs["Config"]["User"],
            volumes={
                mount["Name"]: {"bind": mount["Destination"], "mode": "rw" if mount["RW"] else "ro"}
                for mount in attrs["Mounts"]
                if mount["Type"] == "volume"
            },
            tmpfs=attrs["HostConfig"]["Tmpfs"],
            read_only=True,
            init=True,
            network_mode="none",
        )
        twin.start()
        try:
            return int(twin.wait(timeout=30)["StatusCode"]), twin.logs().decode()
        finally:
            _remove(twin)

    def remove(self) -> None:
        """Remove everything of this run."""
        for found in _labelled(self._engine, f"memharbor.test={self._id}"):
            _remove(found)

    def _start(
        self,
        name: str,
        context: BuildContext,
        user: str,
        files: Sequence[ServerFile],
        *,
        port: int | None,
        data: str | None = None,
        **options: Any,
    ) -> Any:
        files_volume = self._fill_volume(f"{self._id}-{name}-files", files, user, context.base_image)
        volumes = {files_volume: {"bind": FILES_ROOT, "mode": "ro"}}
        if data is not None:
            self._engine.volumes.create(f"{self._id}-{name}", labels=self._labels)
            volumes[f"{self._id}-{name}"] = {"bind": data, "mode": "rw"}
        container = self._engine.containers.create(
            image_of(self._engine, context),
            name=f"{self._id}-{name}",
            labels=self._labels,
            user=user,
            volumes=volumes,
            ports={} if port is None else {f"{port}/tcp": ("127.0.0.1", None)},
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            init=True,
            network=self._id,
            **options,
        )
        # Aliases need the lower-level call: the client's `create` knows none.
        network = self._engine.networks.get(self._id)
        network.disconnect(container)
        network.connect(container, aliases=[name, name.rpartition("-")[0]])
        container.start()
        self.wait(container)
        return container

    def _fill_volume(self, name: str, files: Sequence[ServerFile], user: str, carrier_image: str) -> str:
        self._engine.volumes.create(name, labels=self._labels)
        carrier = self._engine.containers.create(
            carrier_image,
            name=f"{name}-carrier",
            labels=self._labels,
            volumes={name: {"bind": "/files", "mode": "rw"}},
            network_mode="none",
        )
        carrier.put_archive("/files", pack(files, user))
        carrier.remove()
        return name

    def _address(self, container: Any, port: int) -> str:
        container.reload()
        (binding,) = container.attrs["NetworkSettings"]["Ports"][f"{port}/tcp"]
        return f"127.0.0.1:{binding['HostPort']}"

    def wait(self, container: Any) -> None:
        """Wait until a container is healthy."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            container.reload()
            if container.status != "running":
                break
            if container.exec_run(["/usr/local/lib/memharbor/healthcheck"]).exit_code == 0:
                return
            time.sleep(0.2)
        pytest.fail(f"{container.name} did not start:\n{container.logs(tail=30).decode(errors='replace')}")


def pack(files: Sequence[ServerFile], user: str) -> bytes:
    """Pack server files as a tar archive with their owner and modes."""
    uid, gid = map(int, user.split(":"))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for folder in sorted({str(parent) for file in files for parent in Path(file.path).parents if parent.name}):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for file in files:
            content = file.content.encode()
            entry = tarfile.TarInfo(file.path)
            entry.size, entry.mode, entry.uid, entry.gid = len(content), int(file.mode, 8), uid, gid
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def image_of(engine: Any, context: BuildContext) -> str:
    """Find the image of a context, or build it."""
    try:
        engine.images.get(context.tag)
    except docker.errors.ImageNotFound:
        engine.images.build(
            path=str(context.folder),
            tag=context.tag,
            buildargs=context.build_arguments,
            labels={"memharbor.image": context.name},
            rm=True,
        )
    return context.tag


def _labelled(engine: Any, label: str) -> list[Any]:
    filters = {"label": label}
    return [
        *engine.containers.list(all=True, filters=filters),
        *engine.volumes.list(filters=filters),
        *engine.networks.list(filters=filters),
    ]


def _labels(found: Any) -> dict[str, str]:
    return found.attrs.get("Labels") or found.attrs.get("Config", {}).get("Labels") or {}


def _remove(found: Any) -> None:
    try:
        if hasattr(found, "exec_run"):
            found.remove(force=True, v=True)
        else:
            found.remove()
    except docker.errors.NotFound:
        pass
    except docker.errors.APIError as exc:
        # Another suite removes the same leftovers.
        if "already in progress" not in str(exc):
            raise
