"""
The containers come back after a restart of the engine, and after its crash.

The engine is one of its own, in namespaces of its own: network (its firewall rules and ports), processes (whatever it
leaves running ends with them) and mounts. The engine that other tests and people use is only asked for the images.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import docker
import pytest

from memharbor.settings import Settings
from memharbor_infra.contexts import build_contexts
from tests.containers import find_engine_problem
from tests.e2e.conftest import PREFIX, Stack, remove_files, stack_environment

pytestmark = pytest.mark.timeout(1800)

# On disk, where /tmp may be memory; and short, as the path of a socket must be.
FOLDERS = Path("/var/tmp")
# A new dockerd first stops the containers that outlived a killed one.
START_SECONDS = 180
HEALTHY_SECONDS = 90
# Above the time that PostgreSQL may take to stop: dockerd waits for it.
STOP_SECONDS = 150
# The first process of the namespaces: reaps what dockerd leaves when it is killed, and is the network's name server,
# which knows no name. Without one every lookup of a service that has stopped would be waited for.
INIT = """
import fcntl, signal, socket, struct
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
server = socket.socket(type=socket.SOCK_DGRAM)
fcntl.ioctl(server, 0x8914, struct.pack("16sH14x", b"lo", 0x41))  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
server.bind(("127.0.0.1", 53))
while True:
    query, client = server.recvfrom(4096)
    question = query[12 : query.index(0, 12) + 5]
    server.sendto(query[:2] + struct.pack("!5H", 0x8183, 1, 0, 0, 0) + question, client)
"""
# A containerd of the machine's is not to be found: dockerd starts one of its own. The file may be a link into /run.
OWN_FILES = """
mount -t tmpfs tmpfs /run
target=$(realpath -m /etc/resolv.conf)
mkdir -p "${target%/*}"
[ -e "$target" ] || : > "$target"
mount --bind "$1" "$target"
"""
# What a client does, in the network of the engine; `$DSN` is no argument since it has a password.
CLIENT = """
import os, psycopg, sys
with psycopg.connect(os.environ["DSN"]) as connection:
    print(*connection.execute(sys.argv[1]).fetchone())
"""


@dataclass
class Engine:
    """A dockerd in the namespaces of process `init`; what it keeps is in `folder`."""

    folder: Path
    init: int
    dockerd: str
    iptables: Path | None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def host(self) -> str:
        return f"unix://{self.folder}/docker.sock"

    def inside(self, *namespaces: str) -> tuple[str, ...]:
        return ("nsenter", f"--target={self.init}", *(f"--{each}" for each in namespaces), "--")

    def client(self) -> docker.DockerClient:
        return docker.DockerClient(base_url=self.host, timeout=120)

    def begin(self) -> None:
        """Start dockerd and wait until it answers."""
        path = os.pathsep.join([*([str(self.iptables)] if self.iptables else []), os.environ["PATH"], "/usr/sbin"])
        command = [
            *self.inside("net", "mount", "pid"),
            self.dockerd,
            f"--host={self.host}",
            f"--data-root={self.folder}/data",
            f"--exec-root={self.folder}/run",
            f"--pidfile={self.folder}/docker.pid",
            "--exec-opt=native.cgroupdriver=cgroupfs",  # systemd knows no process by its number in there
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "PATH": path}
            )
        wait_for(self._answers, START_SECONDS, lambda: f"dockerd does not answer\n{self.log()}")

    def _answers(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            pytest.fail(f"dockerd ended with {self.process.returncode}\n{self.log()}")
        # The client library leaves its socket open when nobody answers.
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.settimeout(5)
            probe.connect(str(self.folder / "docker.sock"))
            probe.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return probe.recv(64).startswith(b"HTTP/1.0 200")
        return False

    def end(self, number: signal.Signals) -> None:
        """Send dockerd itself a signal, and wait until it is gone."""
        assert self.process is not None
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(child), number)
        self.process.wait(timeout=STOP_SECONDS)

    def lose_power(self) -> None:
        """Kill every process at once, dockerd and containers alike, as it is when the machine goes off."""
        assert self.process is not None
        subprocess.run([*self.inside("pid"), "bash", "-c", "kill -KILL -1"], check=False)
        self.process.wait(timeout=10)

    def log(self) -> str:
        return "\n".join((self.folder / "log").read_text(errors="replace").splitlines()[-30:])


def wait_for(holds: Callable[[], bool], seconds: float, problem: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(problem())
        time.sleep(0.2)


def find_obstacle() -> str | None:
    """Say why no engine of our own can run here."""
    if os.geteuid() != 0:
        return "a second engine takes root"
    if shutil.which("dockerd", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin") is None:
        return "this machine has no `dockerd`: its engine is elsewhere"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True, check=False
    )
    return f"no namespaces can be made: {tried.stderr.strip()}" if tried.returncode else find_engine_problem()


@contextlib.contextmanager
def new_namespaces() -> Iterator[int]:
    """Make a network, a list of mounts and one of processes; all that runs in them ends with them, or with us."""
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child"]
    with subprocess.Popen([*command, "--mount-proc", sys.executable, "-c", INIT]) as unshare:
        children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
        try:
            wait_for(lambda: bool(children.read_text().split()), 10, lambda: "no process was started in new namespaces")
            init = int(children.read_text().split()[0])
            wait_for(lambda: Path(f"/proc/{init}/comm").read_text() != "unshare\n", 10, lambda: "it never ran")
            yield init
        finally:
            unshare.kill()


def find_iptables(init: int) -> Path | None:
    """Find what `make setup` gives the engine where this kernel does not know the machine's own `iptables`."""
    from toolchain.cache import find_cache_root

    folder = find_cache_root(os.environ) / "engine" / "iptables"
    own = subprocess.run(
        ["nsenter", f"--target={init}", "--net", "--", "iptables", "-w", "-t", "nat", "-S"],
        capture_output=True,
        check=False,
    )
    return folder if own.returncode and folder.is_dir() else None


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine that runs, empty; its processes, its network and its data are removed at the end."""
    obstacle = find_obstacle()
    if obstacle:
        if os.environ.get("CI") == "true":
            pytest.fail(obstacle)
        pytest.skip(obstacle)
    for left in FOLDERS.glob(f"{PREFIX}-*"):
        if not Path(f"/proc/{left.name.split('-')[1]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-", dir=FOLDERS))
    made = None
    try:
        with new_namespaces() as init:
            dockerd = shutil.which("dockerd", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin") or "dockerd"
            made = Engine(folder, init, dockerd, find_iptables(init))
            (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
            subprocess.run(
                [*made.inside("mount"), "sh", "-euc", OWN_FILES, "sh", str(folder / "resolv.conf")], check=True
            )
            made.begin()
            yield made
    finally:
        if made is not None and made.process is not None:
            made.process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def copy_images(engine: Engine) -> None:
    """Copy the images of a stack and what they are built on."""
    base = Settings().base_image
    with contextlib.closing(docker.from_env(timeout=300)) as here, contextlib.closing(engine.client()) as there:
        for name in (base, *(context.tag for context in build_contexts(base).values())):
            for line in there.api.load_image(here.api.get_image(name)):
                assert "errorDetail" not in line, line


def images_of(stack: Stack, name: str) -> str:
    """
    Take from a stack's state what it says of images, for another stack whose engine has them too.

    Without it `pulumi up` would build them again, which takes a mirror and minutes.
    """
    kept = ("pulumi:pulumi:Stack", "pulumi:providers:docker", "memharbor:infra:Images", "docker:index/remoteImage")
    exported = json.loads(stack.run("pulumi", "stack", "export", "--stack", stack.name).stdout)
    resources = [each for each in exported["deployment"]["resources"] if each["type"].startswith(kept)]
    for resource in resources:
        if resource["type"] == "pulumi:pulumi:Stack":
            resource.pop("outputs", None)
    deployment = {"manifest": exported["deployment"]["manifest"], "resources": resources}
    return json.dumps({**exported, "deployment": deployment}).replace(stack.name, name)


@pytest.fixture(scope="module")
def restarted(engine: Engine, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack in that engine, rolled out; it goes with the engine, only its files are removed."""
    begun_at = time.monotonic()
    copy_images(engine)
    name = f"{PREFIX}-{os.getpid()}-{secrets.token_hex(2)}"
    folder = tmp_path_factory.mktemp("stack")
    environ = stack_environment(name, folder, dims=8)
    made = Stack(name, {**environ, "DOCKER_HOST": engine.host}, engine.inside("net"))
    made.seconds["images"] = round(time.monotonic() - begun_at, 1)
    (folder / "images.json").write_text(images_of(stack, name))
    try:
        made.memharbor("stack", "init")
        made.run("pulumi", "stack", "import", "--stack", name, "--file", str(folder / "images.json"))
        made.up()
        made.memharbor("schema", "apply")
        yield made
    finally:
        remove_files(name)
        sys.stderr.write(f"\nseconds by step: {made.seconds}\n")


def write_row(stack: Stack, text: str) -> None:
    """Let a client of the pool commit a memory."""
    insert = f"insert into public.memories (user_id, memory) values ('alice', '{text}') returning memory"
    assert stack.run("python", "-c", CLIENT, insert, DSN=stack.dsn("service")).stdout == f"{text}\n"


def assert_all_is_well(stack: Stack, text: str) -> None:
    """What was committed last is there, a client finds it where it found it before, and `doctor` agrees."""
    query = f"select user_id from public.memories where memory = '{text}'"
    assert stack.run("python", "-c", CLIENT, query, DSN=stack.dsn("service")).stdout == "alice\n"
    doctor = stack.memharbor("doctor", check=False)
    assert doctor.returncode == 0, f"{doctor.stdout}\n{doctor.stderr}"


# Where names are not resolved any more, PostgreSQL retries its archive for two minutes before the engine stops it.
@pytest.mark.parametrize("how", [pytest.param("restart", marks=pytest.mark.soak), "power loss"])
def test_the_containers_come_back_by_themselves(restarted: Stack, engine: Engine, how: str) -> None:
    write_row(restarted, how)
    before = states(engine)
    services = {name.removeprefix(f"{restarted.name}-") for name in before}
    assert services == {"backup-store-0", "custodian-0", "pgbouncer-0", "postgres-0"}

    begun_at = time.monotonic()
    engine.end(signal.SIGTERM) if how == "restart" else engine.lose_power()
    restarted.seconds[f"{how} until all is down"] = round(time.monotonic() - begun_at, 1)
    begun_at = time.monotonic()
    engine.begin()
    wait_for(
        lambda: all(
            state == "healthy" and started_at != before[name][1] for name, (state, started_at) in states(engine).items()
        ),
        HEALTHY_SECONDS,
        lambda: f"not back: {before}\n{states(engine)}\n{engine.log()}",
    )
    restarted.seconds[f"{how} until all is up"] = round(time.monotonic() - begun_at, 1)
    assert states(engine).keys() == before.keys()
    assert_all_is_well(restarted, how)


def test_what_a_killed_dockerd_leaves_stopped_is_named_and_brought_back(restarted: Stack, engine: Engine) -> None:
    """
    The next dockerd stops the containers that outlived it, and then takes that for a stop on purpose.

    Source: moby, `restore` in `daemon/daemon.go`; an engine that does better needs nothing of this.
    """
    write_row(restarted, "killed")
    engine.end(signal.SIGKILL)
    engine.begin()
    if any(state == "exited" for state, _ in states(engine).values()):
        doctor = restarted.memharbor("doctor", check=False)
        assert doctor.returncode == 10
        assert "docker start" in doctor.stdout, doctor.stdout
        assert restarted.memharbor("status", check=False).returncode == 10
        validation = restarted.memharbor("validate", "--output", "json", check=False)
        assert Counter(check["state"] for check in json.loads(validation.stdout)) == {"failed": 1, "not run": 9}
        restarted.up("--refresh")
    assert_all_is_well(restarted, "killed")


def states(engine: Engine) -> dict[str, tuple[str, str]]:
    """Health, or the state where it does not run, and start of every service; the carriers of files never start."""
    found = {}
    with contextlib.closing(engine.client()) as client:
        for container in client.containers.list(all=True, filters={"label": "memharbor.stack"}):
            state = container.attrs["State"]
            if "Health" in state:
                health = state["Health"]["Status"] if state["Running"] else state["Status"]
                found[str(container.name)] = (str(health), str(state["StartedAt"]))
    return found
