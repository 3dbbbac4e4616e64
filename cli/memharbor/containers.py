"""
The Docker engine, as far as operating a stack needs it: run a command in a container, stop, start, run a job beside it.

`DOCKER_HOST` is honoured, `ssh://` included. Must not create anything that lasts: what lasts belongs to `infra/`.
Commands never carry secrets: the containers read theirs from files.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from memharbor.errors import ConnectError, ExternalToolError, StateRefusedError
from memharbor.throwaway import OWNER_LABEL, is_gone, job_options, throw_away_options

if TYPE_CHECKING:
    from docker.models.containers import Container

OnLine = Callable[[str], None]
# Pieces of a command's two streams, one of each pair at a time.
_Frames = Iterator[tuple[bytes | None, bytes | None]]

# States in which no process of a container runs and the engine will not start one by itself. A container in a restart
# loop is `restarting` in between, and would come back in the middle of somebody else's work on its volume.
_AT_REST = ("exited", "created")

# HTTP status of the engine where somebody else removes the container already.
_IN_PROGRESS = 409


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
        filters = {"label": f"memharbor.stack={stack}"}
        found = self._client.containers.list(all=True, filters=filters, ignore_removed=True)
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

    def wait_until_healthy(self, name: str, *, timeout_seconds: float = 60) -> bool:
        """Wait until the engine has seen the container healthy, or no longer starting; tell whether it is healthy."""
        deadline = time.monotonic() + timeout_seconds
        while (health := self.health(name)) == "starting" and time.monotonic() < deadline:
            time.sleep(0.2)
        return health == "healthy"

    def execute(
        self,
        name: str,
        command: Sequence[str],
        *,
        user: str = "",
        stdin: bytes = b"",
        on_line: OnLine | None = None,
    ) -> Finished:
        """
        Run a command in a running container to its end.

        Args:
            name: The container.
            command: Program and arguments, without secrets.
            user: Who runs it; the container's own user by default.
            stdin: What it reads; it must read all of it before it says much.
            on_line: Called with each line of either stream as it comes.

        Raises:
            StateRefusedError: The container does not run.
        """
        with self._running(name, command, user, stdin) as (frames, exit_code):
            stdout, stderr = _collect(frames, on_line)
            return Finished(exit_code(), stdout, stderr)

    def stream(self, name: str, command: Sequence[str], *, user: str = "", stdin: bytes = b"") -> Iterator[bytes]:
        """
        Run a command in a running container and return what it writes to its output as it comes, byte for byte.

        Args:
            name: The container.
            command: Program and arguments, without secrets.
            user: Who runs it; the container's own user by default.
            stdin: What it reads; it must read all of it before it says much.

        Raises:
            StateRefusedError: The container does not run.
            ExternalToolError: The command failed, said at the end; what came before is not to be trusted.
        """
        said = bytearray()
        with self._running(name, command, user, stdin) as (frames, exit_code):
            for stdout, stderr in frames:
                said += stderr or b""
                if stdout:
                    yield stdout
            code = exit_code()
        if code != 0:
            words = Finished(code, "", said.decode(errors="replace")).last_words
            raise ExternalToolError(f"`{command[0]}` failed with exit code {code}: {words}")

    @contextlib.contextmanager
    def _running(
        self, name: str, command: Sequence[str], user: str, stdin: bytes
    ) -> Iterator[tuple[_Frames, Callable[[], int]]]:
        if not self.is_running(name):
            raise StateRefusedError(
                f"container `{name}` is not running", hint=f"run `docker start {name}`, or `pulumi up --refresh`"
            )
        from docker.utils.socket import demux_adaptor, frames_iter

        api = self._client.api
        # Not every transport can close one direction only (ssh cannot), so that the command is told where its input ends.
        whole = ["sh", "-c", 'head -c "$0" | "$@"', str(len(stdin)), *command] if stdin else list(command)
        with _translated(f"run `{command[0]}` in container `{name}`"):
            exec_id = api.exec_create(name, whole, user=user, stdin=bool(stdin))["Id"]
            channel = api.exec_start(exec_id, socket=True)

            def exit_code() -> int:
                state = api.exec_inspect(exec_id)
                while state["Running"]:  # the streams end a moment before the process does
                    time.sleep(0.05)
                    state = api.exec_inspect(exec_id)
                return int(state["ExitCode"])

            try:
                if stdin:
                    _send(channel, stdin)
                yield (demux_adaptor(*frame) for frame in frames_iter(channel, tty=False)), exit_code
            finally:
                _hang_up(channel)
                channel.close()

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
        options = job_options(model.attrs, command)
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
                try:
                    job.start()
                    stdout, stderr = _collect(stream, on_line)
                finally:
                    _hang_up(stream)
                return Finished(int(job.wait()["StatusCode"]), stdout, stderr)
        finally:
            self._remove(job)

    @contextlib.contextmanager
    def throw_away(
        self,
        like: str,
        *,
        data: str,
        mounts: Mapping[str, str],
        groups: Sequence[str] = (),
        writable: Mapping[str, str] | None = None,
    ) -> Iterator[str]:
        """
        Run an idle container without any network, in which commands can be executed until the block ends.

        It has the image, configuration files, limits and hardening of another container, and an empty volume. When this
        process ends, however it ends, the engine removes both by itself: the container lives on the connection that
        this process holds. One that was made and never started is removed by the next call.

        Args:
            like: The model, whether it runs or not.
            data: Where the empty volume is mounted; every other volume of the model is mounted as there, read-only.
            mounts: More volumes to mount read-only, with their places.
            groups: Numbers of groups that its processes are in, besides their own.
            writable: Volumes to mount so that they can be written to, with their places; they stay.

        Yields:
            The container's name.

        Raises:
            StateRefusedError: The model does not exist.
            ExternalToolError: The engine refused to run it.
        """
        model = self.get(like)
        self.remove_abandoned()
        options = throw_away_options(model.attrs, data, mounts, groups, writable or {})
        with _translated(f"run a throw-away container like `{like}`"):
            container = self._client.containers.create(**options)
        try:
            with _translated(f"run a throw-away container like `{like}`"):
                # Before the start: who is killed in between leaves a container that was never started, not one that
                # nobody holds.
                channel = container.attach_socket(params={"stdin": 1, "stream": 1})
                container.start()
            try:
                yield str(container.name)
            finally:
                channel.close()
        finally:
            self._remove(container)

    def remove_abandoned(self) -> list[str]:
        """Remove throw-away containers whose process was killed before the engine could tell, and name them."""
        removed = []
        with _translated("look for throw-away containers"):
            for found in self._client.containers.list(
                all=True, filters={"label": OWNER_LABEL}, ignore_removed=True, sparse=True
            ):
                if is_gone(str(found.attrs["Labels"][OWNER_LABEL])):
                    self._remove(found)
                    removed.append(str(found.attrs["Names"][0]).lstrip("/"))
        return removed

    def _remove(self, container: Container) -> None:
        from docker.errors import APIError, NotFound

        try:
            container.remove(force=True, v=True)
        except NotFound:
            pass
        except APIError as exc:
            if exc.status_code != _IN_PROGRESS:
                raise
            with contextlib.suppress(NotFound, APIError):
                container.wait(condition="removed", timeout=60)


def _send(channel: Any, text: bytes) -> None:
    # What the client returns differs by transport: a reader over a socket, a socket, or its stand-in over ssh.
    sender = getattr(channel, "_sock", channel)
    view = memoryview(text)
    while view:
        view = view[sender.send(view) :]


def _hang_up(channel: Any) -> None:
    # The connection behind it is not the pool's any more, and would stay open until it is collected.
    response = getattr(channel, "_response", None)
    if response is not None:
        response.close()


def _collect(stream: _Frames, on_line: OnLine | None) -> tuple[str, str]:
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
