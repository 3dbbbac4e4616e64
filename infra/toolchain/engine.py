"""
Find a Docker engine, or install and start one. An engine that was not started here is used and never touched.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from toolchain import apt
from toolchain.engine_client import DEFAULT_HOST, EngineClient, EngineError, can_open_socket, find_host
from toolchain.report import EXIT_CONFIG, EXIT_CONNECT, EXIT_REFUSED, ToolchainError
from toolchain.steps import Context, Finding
from toolchain.tools import format_version, is_new_enough, parse_version

# iptables is what dockerd programs its networks with; ca-certificates is what it needs to trust a registry.
_PACKAGES = ("docker.io", "iptables", "ca-certificates")
_START_TIMEOUT_SECONDS = 60


class Action(Enum):
    """
    What has to be done for an engine.
    """

    USE = "use the engine that answers"
    START = "start the installed dockerd"
    INSTALL = "install the distribution's `docker.io` and start it"


@dataclass(frozen=True)
class Surroundings:
    """
    All that the decision depends on.

    Args:
        docker_host: The variable, None where it is unset or empty.
        failure: Why the engine does not answer, None if it does.
        may_open_socket: Whether file permissions let this user in.
        rootless_socket: Another socket of this user's that exists, or None.
    """

    docker_host: str | None
    failure: str | None
    is_root: bool
    may_open_socket: bool = True
    has_dockerd: bool = False
    has_apt: bool = True
    rootless_socket: str | None = None


def decide(around: Surroundings) -> Action:
    """
    Choose what to do; raise ToolchainError, with what to install, where nothing can be done.
    """
    if around.failure is None:
        return Action.USE
    if around.docker_host is not None:
        raise ToolchainError(
            f"the engine that `DOCKER_HOST` names does not answer at `{around.docker_host}`: {around.failure}",
            hints=["start that engine, or `unset DOCKER_HOST` to use one on this machine"],
            exit_code=EXIT_CONNECT,
        )
    if around.is_root:
        if around.has_dockerd:
            return Action.START
        if around.has_apt:
            return Action.INSTALL
        raise ToolchainError(
            "no Docker engine answers, and there is no `apt-get` to install one with",
            hints=["install Docker Engine with this system's own packages, start it and run this again"],
            exit_code=EXIT_REFUSED,
        )
    hints = ["as root: `apt-get install docker.io && usermod -aG docker $USER`, then log in again"]
    if around.rootless_socket:
        hints.insert(0, f"use your rootless engine: `export DOCKER_HOST=unix://{around.rootless_socket}`")
    message = f"no Docker engine answers at `{DEFAULT_HOST}`, and installing one takes root; nothing was changed"
    if not around.may_open_socket:
        message = f"this user may not open `{DEFAULT_HOST}`; nothing was changed"
        hints[-1] = "as root: `usermod -aG docker $USER`, then log in again"
    raise ToolchainError(message, hints=hints, exit_code=EXIT_REFUSED)


def refuse_version(version: str, minimum: Sequence[int]) -> str | None:
    """
    Return why an engine of that version is not used, None if it is.

    >>> refuse_version("20.10.24+dfsg1", (20, 10)) is None
    True
    >>> refuse_version("19.3.15", (20, 10))
    '19.3.15 is older than 20.10'
    """
    if is_new_enough(parse_version(version) or (0,), minimum):
        return None
    return f"{version} is older than {format_version(minimum)}"


class EngineStep:
    """
    A Docker engine that answers.
    """

    name = "engine"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._environment = context.machine.environment
        self.host = find_host(self._environment)
        self.client = EngineClient(self.host, self._environment)
        self._record = context.cache.root / "engine" / "started.json"

    def inspect(self) -> Finding:
        """Look, quickly, and change nothing."""
        try:
            answer = self.client.read_version()
        except EngineError as failure:
            return Finding(self.name, False, "", "missing", f"no answer: {failure}", self.host)
        if refusal := refuse_version(answer.version, self._context.pins.DOCKER_ENGINE_MINIMUM):
            return Finding(self.name, False, answer.version, "too old", refusal, self.host)
        return Finding(self.name, True, answer.version, *self._describe_origin(), self.host)

    def plan(self) -> str:
        """Say what `provide` would do."""
        return self._decide(self._read_failure() or "no answer").value

    def _describe_origin(self) -> tuple[str, str]:
        if self._environment.get("DOCKER_HOST"):
            return "DOCKER_HOST", f"answers at `{self.host}`"
        try:
            process_id = int(json.loads(self._record.read_text(encoding="utf-8"))["pid"])
            command = Path(f"/proc/{process_id}/comm").read_text(encoding="utf-8").strip()
        except (OSError, ValueError, KeyError):
            command = ""
        if command == "dockerd":
            return "started here", f"dockerd with process id {process_id}, log `{self._log}`"
        return "running", f"answers at `{self.host}`"

    @property
    def _log(self) -> Path:
        return self._context.cache.log("dockerd")

    def _decide(self, failure: str) -> Action:
        machine = self._context.machine
        runtime = self._environment.get("XDG_RUNTIME_DIR", "")
        rootless = Path(runtime) / "docker.sock"
        return decide(
            Surroundings(
                docker_host=self._environment.get("DOCKER_HOST") or None,
                failure=failure,
                is_root=machine.is_root(),
                may_open_socket=can_open_socket(self.host),
                has_dockerd=bool(machine.find_programs("dockerd")),
                has_apt=bool(machine.find_programs("apt-get")),
                rootless_socket=str(rootless) if runtime and rootless.exists() else None,
            )
        )

    def check_possible(self) -> None:
        """Refuse, before anything is changed, what is sure to fail."""
        failure = self._read_failure()
        if failure is not None:
            self._decide(failure)

    def _read_failure(self) -> str | None:
        """Return why the engine does not answer, None if it does; raise ToolchainError where it is too old."""
        try:
            answer = self.client.read_version()
        except EngineError as failure:
            return str(failure)
        if refusal := refuse_version(answer.version, self._context.pins.DOCKER_ENGINE_MINIMUM):
            raise ToolchainError(
                f"cannot use the engine at `{self.host}`: {refusal}",
                hints=["update that engine, or set `DOCKER_HOST` to a newer one"],
                exit_code=EXIT_CONFIG,
            )
        return None

    def provide(self) -> None:
        """Bring it about."""
        failure = self._read_failure()
        if failure is None:
            return
        action = self._decide(failure)
        self._context.reporter.taken(self.name, "", action.value, f"none answers at `{self.host}` ({failure})")
        if action is Action.INSTALL:
            apt.install_packages(
                self._context.machine, _PACKAGES, tool="docker.io", log=self._context.cache.log("engine")
            )
        if self._context.machine.is_systemd_running():
            self._start_by_systemd()
        elif self._wait(2) is not None:  # a package's script may have started it
            self._start_detached()
        failure = self._wait(_START_TIMEOUT_SECONDS)
        if failure is not None:
            raise ToolchainError(
                f"cannot start an engine: dockerd does not answer after {_START_TIMEOUT_SECONDS} s: {failure}",
                hints=[f"read its log: `tail -n 50 {self._log}`, or `journalctl -u docker` under systemd"],
                output=self._read_log_end(),
            )

    def _start_by_systemd(self) -> None:
        command = ["systemctl", "enable", "--now", "docker"]
        log = self._context.cache.log("engine")
        self._context.machine.run(
            command, purpose="start `docker` with systemd", log=log, hints=["see `systemctl status docker`"]
        )

    def _start_detached(self) -> None:
        machine = self._context.machine
        dockerd = machine.find_programs("dockerd")
        if not dockerd:
            raise ToolchainError(
                "cannot start an engine: `dockerd` is still not there", hints=["`apt-get install docker.io`"]
            )
        remove_stale_process_files()
        folders = [*self._choose_iptables_folder(), self._environment.get("PATH", ""), "/usr/sbin", "/sbin"]
        environment = {**self._environment, "PATH": ":".join(folder for folder in folders if folder)}
        process_id = machine.start_detached([str(dockerd[0])], log=self._log, environment=environment)
        self._record.parent.mkdir(parents=True, exist_ok=True)
        self._record.write_text(json.dumps({"pid": process_id}) + "\n", encoding="utf-8")
        self._context.reporter.working(f"started dockerd (process id {process_id}, log `{self._log}`)")

    def _choose_iptables_folder(self) -> list[str]:
        """
        Return a folder with an `iptables` that works on this kernel, empty where the machine's own does.

        Debian's default speaks nftables; a kernel without it still has the old interface. The machine's own
        alternatives are left as they are.
        """
        machine = self._context.machine
        probe = ["-w", "-t", "nat", "-S"]
        own = machine.find_programs("iptables")
        if own and machine.read_output([str(own[0]), *probe]) is not None:
            return []
        legacy = machine.find_programs("iptables-legacy")
        if not legacy or machine.read_output([str(legacy[0]), *probe]) is None:
            return []
        folder = self._context.cache.root / "engine" / "iptables"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("iptables", "ip6tables"):
            for path in machine.find_programs(f"{name}-legacy")[:1]:
                (folder / name).symlink_to(path)
        self._context.reporter.working("dockerd gets `iptables-legacy`: the nftables one does not work on this kernel")
        return [str(folder)]

    def _wait(self, timeout_seconds: float) -> str | None:
        """Return None as soon as the engine answers, else why it does not."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            failure = self._read_failure()
            if failure is None or time.monotonic() > deadline:
                return failure
            time.sleep(0.2)

    def _read_log_end(self) -> str:
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-15:])


def make_scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """
    Return a folder for bulky throw-away files, on disk where `/tmp` may be memory.
    """
    return tempfile.TemporaryDirectory(prefix="memharbor-", dir="/var/tmp")


def remove_stale_process_files(run: Path = Path("/var/run"), processes: Path = Path("/proc")) -> list[Path]:
    """
    Remove the process-id files of an engine that was killed, and return them.

    dockerd refuses to start while any process has the number in its file, also one that came later and is a stranger.
    A file whose process is what it says is left alone.
    """
    removed = []
    for name, program in (("docker.pid", "dockerd"), ("docker/containerd/containerd.pid", "containerd")):
        file = run / name
        try:
            process_id = int(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        try:
            found = (processes / str(process_id) / "comm").read_text(encoding="utf-8").strip()
        except OSError:
            found = ""
        if found != program:
            file.unlink()
            removed.append(file)
    return removed
