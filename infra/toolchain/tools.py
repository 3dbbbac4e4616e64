"""
Decide which tools are wanted and where each is taken from. Pure: this module opens nothing and runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from toolchain.cache import Origin
from toolchain.pins import Pins

# Debian's and Go's name for an architecture, then Pulumi's, then the one in versitygw's file names.
_ARCHITECTURES = {"amd64": ("x64", "x86_64"), "arm64": ("arm64", "arm64")}
_MACHINES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


class Source(Enum):
    """
    Where a tool may come from, in the order of preference.
    """

    PATH = "on PATH"
    CACHE = "cached"
    OFFICIAL = "official release"
    REGISTRY = "built from the Go module registry"


@dataclass(frozen=True)
class Release:
    """
    An official archive with the checksums that its publisher puts beside it.
    """

    archive_url: str
    checksums_url: str

    @property
    def archive_name(self) -> str:
        """The file's name, as the checksums list it."""
        return self.archive_url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class Tool:
    """
    One tool that is wanted.

    Args:
        program: The executable by which it is known.
        version: What is downloaded or built.
        minimum: The oldest that is taken from PATH.
        companions: Programs that have to lie beside it on PATH, or it is not taken from there.
    """

    name: str
    program: str
    version: str
    minimum: tuple[int, ...]
    release: Release
    companions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """
    A program that is on PATH: `missing` names the companions that it lacks, `refusal` any other reason against it.
    """

    path: Path
    version: tuple[int, ...] | None
    missing: tuple[str, ...] = ()
    refusal: str = ""


@dataclass(frozen=True)
class Choice:
    """
    The source that was chosen for a tool, and why not an earlier one.

    Args:
        path: The program on PATH.
        origin: Where a cached tool came from when it was put into the cache.
    """

    source: Source
    version: str
    reason: str
    path: Path | None = None
    origin: str = ""


def parse_version(text: str) -> tuple[int, ...] | None:
    """
    Return the first dotted version in a program's output.

    >>> parse_version("go version go1.26.8 linux/amd64")
    (1, 26, 8)
    >>> parse_version("v3.259.0-alpha.1")
    (3, 259, 0)
    >>> parse_version("no version") is None
    True
    """
    match = re.search(r"(?<![\d.])v?(\d+(?:\.\d+)+)", text)
    return tuple(int(part) for part in match.group(1).split(".")) if match else None


def format_version(version: Sequence[int]) -> str:
    """
    Return a version the way it is written.

    >>> format_version((3, 231, 0))
    '3.231.0'
    """
    return ".".join(str(part) for part in version)


def is_new_enough(version: Sequence[int], minimum: Sequence[int]) -> bool:
    """
    Compare versions of different lengths, missing parts being zero.

    >>> is_new_enough((20, 10), (20, 10, 0))
    True
    >>> is_new_enough((3, 99, 9), (3, 231, 0))
    False
    """
    length = max(len(version), len(minimum))
    padded = [tuple(part) + (0,) * (length - len(part)) for part in (version, minimum)]
    return padded[0] >= padded[1]


def normalize_architecture(machine: str) -> str | None:
    """
    Return Go's name for what `uname -m` or an engine reports, or None where nothing is published for it.

    >>> normalize_architecture("aarch64")
    'arm64'
    """
    return _MACHINES.get(machine)


def refuse_found(tool: Tool, found: Found | None) -> str | None:
    """
    Return why the program on PATH is not taken, or None if it is.
    """
    if found is None:
        return "not on PATH"
    if found.version is None:
        return f"`{found.path}` does not tell its version"
    if not is_new_enough(found.version, tool.minimum):
        return f"PATH has {format_version(found.version)}, older than {format_version(tool.minimum)}"
    if found.missing:
        return f"`{found.path}` lacks {', '.join(f'`{name}`' for name in found.missing)} beside it"
    return found.refusal or None


def choose(tool: Tool, found: Found | None, cached: Origin | None, official_refusal: str | None) -> Choice:
    """
    Choose the source for one tool.

    Args:
        tool: What is wanted.
        found: What is on PATH.
        cached: Where the cached entry came from, or None where there is none.
        official_refusal: Why the official release cannot be had, or None if it can.
    """
    against_path = refuse_found(tool, found)
    if against_path is None and found is not None and found.version is not None:
        minimum = format_version(tool.minimum)
        return Choice(Source.PATH, format_version(found.version), f"on PATH and {minimum} or newer", found.path)
    if cached is not None:
        return Choice(Source.CACHE, tool.version, f"cached; {cached.reason}", origin=cached.source)
    if official_refusal is None:
        return Choice(Source.OFFICIAL, tool.version, against_path or "")
    return Choice(Source.REGISTRY, tool.version, f"{against_path}; {official_refusal}")


def describe_tools(pins: Pins, host: str, engine: str) -> dict[str, Tool]:
    """
    Return the tools by name.

    Args:
        pins: The versions.
        host: Architecture of this machine, for what runs here.
        engine: Architecture of the engine, for what goes into an image.

    The checksums cannot be pinned in this repository where only package registries can be reached, so the archive is
    held to the file that the publisher put beside it, over TLS. For pulumi-docker that file holds SHA-1 sums (its
    release workflow calls `shasum`), for the others SHA-256.
    """
    pulumi, docker, gateway = pins.PULUMI, pins.PULUMI_DOCKER, pins.VERSITYGW
    return {
        "pulumi": Tool(
            name="pulumi",
            program="pulumi",
            version=pulumi,
            minimum=pins.PULUMI_MINIMUM,
            companions=("pulumi-language-python", "pulumi-language-python-exec"),
            release=Release(
                f"https://get.pulumi.com/releases/sdk/pulumi-v{pulumi}-linux-{_ARCHITECTURES[host][0]}.tar.gz",
                f"https://get.pulumi.com/releases/sdk/pulumi-{pulumi}-checksums.txt",
            ),
        ),
        "pulumi-docker": Tool(
            name="pulumi-docker",
            program="pulumi-resource-docker",
            version=docker,
            minimum=parse_version(docker) or (),
            release=Release(
                f"https://get.pulumi.com/releases/plugins/pulumi-resource-docker-v{docker}-linux-{host}.tar.gz",
                f"https://get.pulumi.com/releases/plugins/pulumi-docker_{docker}_checksums.txt",
            ),
        ),
        "versitygw": Tool(
            name="versitygw",
            program="versitygw",
            version=gateway,
            minimum=parse_version(gateway) or (),
            release=Release(
                f"https://github.com/versity/versitygw/releases/download/v{gateway}/"
                f"versitygw_v{gateway}_Linux_{_ARCHITECTURES[engine][1]}.tar.gz",
                f"https://github.com/versity/versitygw/releases/download/v{gateway}/checksums.txt",
            ),
        ),
    }
