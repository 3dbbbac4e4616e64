"""
Install Debian packages, and read which mirror this machine uses. Adds no package source to the machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from toolchain.machine import Machine
from toolchain.report import ToolchainError

_SOURCES = Path("/etc/apt/sources.list")
_SOURCES_FOLDER = Path("/etc/apt/sources.list.d")
_ONE_LINE = re.compile(r"^deb\s+(?:\[[^\]]*\]\s*)?(?P<uri>\S+)\s+(?P<suite>\S+)\s*(?P<components>.*)$")

# (uri, suites, components) of one binary package source.
_Entry = tuple[str, list[str], list[str]]


def install_packages(machine: Machine, packages: Sequence[str], *, tool: str, log: Path) -> None:
    """
    Install packages without questions and without recommendations.
    """
    environment = {
        **machine.environment,
        "DEBIAN_FRONTEND": "noninteractive",
        "NEEDRESTART_MODE": "a",  # Ubuntu's needrestart would ask
    }
    options = ["-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0"]
    purpose = f"install `{tool}` from the distribution's packages"
    hints = [f"try it by hand: `apt-get update && apt-get install {' '.join(packages)}`"]
    # A stale or unreachable third-party source fails `update` as a whole; what counts is whether `install` works.
    for freshness in ([], ["-o", "Acquire::Check-Valid-Until=false"]):
        try:
            machine.run(["apt-get", *options, *freshness, "update"], purpose=purpose, log=log, environment=environment)
            break
        except ToolchainError:
            continue
    command = ["apt-get", *options, "install", "--yes", "--no-install-recommends", *packages]
    machine.run(command, purpose=purpose, log=log, environment=environment, hints=hints)


def parse_deb822(text: str) -> list[_Entry]:
    r"""
    Return the binary package sources of a `.sources` file.

    >>> parse_deb822("Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: main\n")
    [('http://mirror.example/debian', ['bookworm'], ['main'])]
    """
    entries: list[_Entry] = []
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, list[str]] = {}
        current: list[str] = []
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                current.extend(line.split())
            elif ":" in line:
                name, _, value = line.partition(":")
                current = fields.setdefault(name.strip().lower(), [])
                current.extend(value.split())
        disabled = fields.get("enabled", ["yes"])[:1] in (["no"], ["false"], ["0"])
        if "deb" in fields.get("types", []) and not disabled:
            suites, components = fields.get("suites", []), fields.get("components", [])
            entries.extend((uri, suites, components) for uri in fields.get("uris", []))
    return entries


def parse_one_line(text: str) -> list[_Entry]:
    """
    Return the binary package sources of a `.list` file.

    >>> parse_one_line("deb [arch=amd64] http://mirror.example/debian bookworm main contrib # ours")
    [('http://mirror.example/debian', ['bookworm'], ['main', 'contrib'])]
    """
    entries: list[_Entry] = []
    for line in text.splitlines():
        match = _ONE_LINE.match(line.split("#", 1)[0].strip())
        if match:
            entries.append((match["uri"], [match["suite"]], match["components"].split()))
    return entries


def choose_mirror(
    files: Mapping[str, str], os_release: Mapping[str, str], read_text: Callable[[str], str]
) -> str | None:
    """
    Return the Debian mirror that this machine installs from, or None on anything but Debian.

    The archive itself is told from other sources by the release's own suite with `main` in it; several of those are
    told apart by the path, which is `/debian` on every mirror of the official list.

    Args:
        files: Texts of apt's source files by name.
        os_release: Fields of `/etc/os-release`.
        read_text: Reads a file that a `mirror+file:` source names.
    """
    if os_release.get("ID") != "debian":
        return None
    entries: list[_Entry] = []
    for name in sorted(files):
        entries += parse_deb822(files[name]) if name.endswith(".sources") else parse_one_line(files[name])
    codename = os_release.get("VERSION_CODENAME", "")
    archive = [uri for uri, suites, components in entries if codename in suites and "main" in components]
    found = [mirror for uri in archive for mirror in _expand(uri, read_text)]
    found.sort(key=lambda uri: not uri.rstrip("/").endswith("/debian"))
    return found[0].rstrip("/") if found else None


def _expand(uri: str, read_text: Callable[[str], str]) -> Iterable[str]:
    # Debian's cloud images name a file that lists mirrors: mirror+file:///etc/apt/mirrors/debian.list
    if uri.startswith("mirror+file:"):
        path = "/" + uri.removeprefix("mirror+file:").lstrip("/")
        lines = (line.split()[0] for line in read_text(path).splitlines() if line.strip() and line[0] != "#")
        return [line for line in lines if line.startswith("http")]
    return [uri] if uri.startswith(("http:", "https:", "file:")) else []


def find_mirror() -> str | None:
    """
    Read this machine's own files and choose its Debian mirror.
    """
    paths = [_SOURCES, *_SOURCES_FOLDER.glob("*.list"), *_SOURCES_FOLDER.glob("*.sources")]
    files = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()}
    return choose_mirror(files, read_os_release(), lambda name: Path(name).read_text(encoding="utf-8"))


def read_os_release() -> dict[str, str]:
    """
    Return the fields of `/etc/os-release`.
    """
    pairs = (line.partition("=") for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines())
    return {name: value.strip("\"'") for name, separator, value in pairs if separator}
