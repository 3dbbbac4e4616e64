"""
The Docker engine, as far as operating a stack needs it: run a command in a container, stop, start, run a job beside it.

`DOCKER_HOST` is honoured, `ssh://` included. Must not create anything that lasts: what lasts belongs to `infra/`.
Commands never carry secrets: the containers read theirs from files.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from memharbor.errors import ConnectError, ExternalToolError, StateRefusedError

if TYPE_CHECKING:
    from docker.models.containers import Container

OnLine = Callable[[str], None]

# States in which no process of a container runs and the engine will not start one by itself. A container in a restart
# loop is `restarting` in between, and would come back in the middle of somebody else's work on its volume.
_AT_REST = ("exited", "created")


@contextlib.contextmanager
def _translated(doing: str) -> Iterator[None]:
    """Raise what the engine refuses as ours, in the engine's own words."""
    from docker.errors import APIError, DockerException

    try:
        yield
    except APIError as exc:
        raise ExternalToolError(f"the engine cannot {doing}: {exc.explanation or exc}") from exc
    except DockerException as exc:
        raise ConnectError(f"the engine cannot {doing}: {exc}") from exc


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

        with _translated(f"look at container `{name}`"):
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
        with _translated(f"run `{command[0]}` in container `{name}`"):
            exec_id = api.exec_create(name, list(command), user=user)["Id"]
            stdout, stderr = _collect(api.exec_start(exec_id, stream=True, demux=True), on_line)
            state = api.exec_inspect(exec_id)
            while state["Running"]:  # the streams end a moment before the process does
                time.sleep(0.05)
                state = api.exec_inspect(exec_id)
        return Finished(int(state["ExitCode"]), stdout, stderr)

    def is_stopped(self, name: str) -> bool:
        """Tell whether the container is at rest: not running, and not about to be restarted by the engine either."""
        return self.get(name).status in _AT_REST

    def stop(self, name: str, *, timeout_seconds: int = 120) -> None:
        """Stop a container with its own stop signal and wait until it is at rest; nothing happens where it is."""
        if self.is_stopped(name):
            return
        container = self.get(name)
        with _translated(f"stop container `{name}`"):
            container.stop(timeout=timeout_seconds)
            container.wait()

    def start(self, name: str) -> None:
        """Start a stopped container."""
        with _translated(f"start container `{name}`"):
            self.get(name).start()

    def logs_of_this_run(self, name: str) -> str:
        """Read what the container said since it was started last."""
        container = self.get(name)
        # The engine's own clock, to the microsecond: ours may be another one.
        begun_at = datetime.fromisoformat(str(container.attrs["State"]["StartedAt"])[:26].rstrip("Z") + "+00:00")
        with _translated(f"read the log of container `{name}`"):
            return bytes(container.logs(since=begun_at.timestamp())).decode(errors="replace")

    def run_job(
        self, like: str, command: Sequence[str], *, owns_data: bool = False, on_line: OnLine | None = None
    ) -> Finished:
        """
        Run a command in a throw-away container that has another container's image, volumes, networks and hardening.

        It is removed in any case, also when this process is interrupted.

        Args:
            like: The model.
            command: Program and arguments, without secrets.
            owns_data: Whether the command writes into the volumes, so that the model must be at rest.
            on_line: Called with each line of either stream as it comes.

        Raises:
            StateRefusedError: The model is not at rest or another job of it runs, and two owners of one data directory
                would destroy it.
            ExternalToolError: The engine refused to run the job.
        """
        model = self.get(like)
        if owns_data and model.status not in _AT_REST:
            raise StateRefusedError(f"container `{like}` is {model.status}", hint=f"run `docker stop {like}`")
        options = _job_options(model.attrs, command)
        left = self.find(options["name"])
        if left is not None:
            if left.status == "running":
                raise StateRefusedError(f"another command works on `{like}`", hint=f"wait for `{left.name}` to end")
            left.remove(force=True)  # its command was killed
        with _translated(f"run a job like `{like}`"):
            job = self._client.containers.create(**options)
        try:
            with _translated(f"run a job like `{like}`"):
                stream = job.attach(stream=True, logs=True, demux=True)
                job.start()
                stdout, stderr = _collect(stream, on_line)
                return Finished(int(job.wait()["StatusCode"]), stdout, stderr)
        finally:
            self._remove(job)

    def _remove(self, container: Container) -> None:
        from docker.errors import NotFound

        with contextlib.suppress(NotFound):
            container.remove(force=True)


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
