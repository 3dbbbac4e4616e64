"""
The Docker engine, as far as operating a stack needs it: run a command in a container, stop, start, run a job beside it.

`DOCKER_HOST` is honoured, `ssh://` included. Must not create anything that lasts: what lasts belongs to `infra/`.
Commands never carry secrets: the containers read theirs from files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memharbor.errors import ConnectError, ExternalToolError, StateRefusedError

if TYPE_CHECKING:
    from docker.models.containers import Container

OnLine = Callable[[str], None]


@dataclass(frozen=True)
class Finished:
    """What a command in a container left: its exit code and its output, line ends included."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def last_words(self) -> str:
        """The last lines that it said, for an error message."""
        return "\n".join((self.stderr or self.stdout).strip().splitlines()[-12:])


class Containers:
    """
    Talk to one Docker engine.

    Raises:
        ConnectError: No engine answers (from the constructor).
    """

    def __init__(self) -> None:
        from docker.client import DockerClient
        from docker.errors import DockerException

        try:
            self._client = DockerClient.from_env(timeout=120, use_ssh_client=True)
            self._client.ping()
        except DockerException as exc:
            raise ConnectError(
                f"no Docker engine answers: {exc}", hint="run `make setup`, or set DOCKER_HOST to an engine"
            ) from exc

    def engine_version(self) -> str:
        """Name the engine's version, for instance `20.10.24`."""
        return str(self._client.version()["Version"]).split("+")[0]

    def find(self, name: str) -> Container | None:
        """Find a container by its exact name; `None` where there is none."""
        from docker.errors import NotFound

        try:
            found: Container = self._client.containers.get(name)
        except NotFound:
            return None
        return found

    def get(self, name: str) -> Container:
        """
        Get a container by its exact name.

        Raises:
            StateRefusedError: There is none.
        """
        container = self.find(name)
        if container is None:
            raise StateRefusedError(f"container `{name}` does not exist", hint="run `pulumi up`")
        return container

    def of_stack(self, stack: str) -> list[Container]:
        """List the stack's containers, stopped ones included, by name."""
        found = self._client.containers.list(all=True, filters={"label": f"memharbor.stack={stack}"})
        return sorted(found, key=lambda container: str(container.name))

    def is_running(self, name: str) -> bool:
        """Tell whether the container exists and runs."""
        container = self.find(name)
        return container is not None and container.status == "running"

    def health(self, name: str) -> str:
        """Tell the container's health as Docker sees it: `healthy`, `starting`, `unhealthy`, `none`, or its state."""
        state = self.get(name).attrs["State"]
        if state["Status"] != "running":
            return str(state["Status"])
        return str(state.get("Health", {}).get("Status", "none"))

    def execute(self, name: str, command: Sequence[str], *, user: str = "", on_line: OnLine | None = None) -> Finished:
        """
        Run a command in a running container to its end.

        Args:
            name: The container.
            command: Program and arguments, without secrets.
            user: Who runs it; the container's own user by default.
            on_line: Called with each line of either stream as it comes.

        Raises:
            StateRefusedError: The container does not run.
        """
        if not self.is_running(name):
            raise StateRefusedError(
                f"container `{name}` is not running", hint=f"run `docker start {name}`, or `pulumi up --refresh`"
            )
        api = self._client.api
        exec_id = api.exec_create(name, list(command), user=user)["Id"]
        stdout, stderr = _collect(api.exec_start(exec_id, stream=True, demux=True), on_line)
        return Finished(int(api.exec_inspect(exec_id)["ExitCode"]), stdout, stderr)

    def stop(self, name: str, *, timeout_seconds: int = 120) -> None:
        """Stop a container with its own stop signal and wait until it is gone."""
        container = self.get(name)
        container.stop(timeout=timeout_seconds)
        container.wait()

    def start(self, name: str) -> None:
        """Start a stopped container."""
        self.get(name).start()

    def logs_since(self, name: str, since: float) -> str:
        """Read what the container said since a moment (seconds since the epoch)."""
        return bytes(self.get(name).logs(since=since)).decode(errors="replace")

    def run_job(self, like: str, command: Sequence[str], *, on_line: OnLine | None = None) -> Finished:
        """
        Run a command in a throw-away container that has a stopped container's image, volumes, networks and hardening.

        It is removed in any case, also when this process is interrupted.

        Raises:
            StateRefusedError: The model container or another job of it runs, and two owners of one data directory would
                destroy it.
            ExternalToolError: The engine refused to run the job.
        """
        from docker.errors import APIError, NotFound

        model = self.get(like)
        if model.status == "running":
            raise StateRefusedError(f"container `{like}` is still running")
        options = _job_options(model.attrs, command)
        left = self.find(options["name"])
        if left is not None:
            if left.status == "running":
                raise StateRefusedError(f"another command works on `{like}`", hint=f"wait for `{left.name}` to end")
            left.remove(force=True)  # its command was killed
        try:
            job = self._client.containers.create(**options)
        except APIError as exc:
            raise ExternalToolError(f"the engine refused a job like `{like}`: {exc.explanation}") from exc
        try:
            stream = job.attach(stream=True, logs=True, demux=True)
            job.start()
            stdout, stderr = _collect(stream, on_line)
            return Finished(int(job.wait()["StatusCode"]), stdout, stderr)
        finally:
            with contextlib.suppress(NotFound):
                job.remove(force=True)


def _job_options(attrs: dict[str, Any], command: Sequence[str]) -> dict[str, Any]:
    host, config = attrs["HostConfig"], attrs["Config"]
    mounts = {mount["Name"]: mount for mount in attrs["Mounts"] if mount["Type"] == "volume"}
    return {
        "image": attrs["Image"],
        "name": f"{attrs['Name'].lstrip('/')}-job",
        "entrypoint": [command[0]],
        "command": list(command[1:]),
        "user": config["User"],
        "environment": config["Env"],
        "labels": {**config["Labels"], "memharbor.service": "job"},
        "network": next(iter(attrs["NetworkSettings"]["Networks"])),
        "volumes": {
            name: {"bind": mount["Destination"], "mode": "rw" if mount["RW"] else "ro"}
            for name, mount in mounts.items()
        },
        "tmpfs": host.get("Tmpfs") or {},
        "shm_size": host["ShmSize"],
        "read_only": host["ReadonlyRootfs"],
        "cap_drop": host["CapDrop"] or [],
        "security_opt": host["SecurityOpt"] or [],
        "mem_limit": host["Memory"] or None,
        "memswap_limit": host["MemorySwap"] or None,
        "init": True,
    }


def _collect(stream: Iterator[tuple[bytes | None, bytes | None]], on_line: OnLine | None) -> tuple[str, str]:
    whole = [bytearray(), bytearray()]
    rest = [b"", b""]
    for parts in stream:
        for i, part in enumerate(parts):
            if not part:
                continue
            whole[i] += part
            if on_line is not None:
                *lines, rest[i] = (rest[i] + part).split(b"\n")
                for line in lines:
                    on_line(line.decode(errors="replace"))
    return whole[0].decode(errors="replace"), whole[1].decode(errors="replace")
