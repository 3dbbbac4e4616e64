"""
Fetch official releases: ask first whether they can be reached at all, then hold the archive to its checksum.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from toolchain.report import ToolchainError
from toolchain.tools import Tool

PROBE_TIMEOUT_SECONDS = 5
_STALL_TIMEOUT_SECONDS = 60

# Opens a URL with a time-out; tests bring their own.
Opener = Callable[[str, float], IO[bytes]]


def open_url(url: str, timeout_seconds: float) -> IO[bytes]:
    """
    Open `url`, with the machine's proxies and certificate authorities.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "memharbor-toolchain"})  # noqa: S310 - https, from tools
    answer: IO[bytes] = urllib.request.urlopen(request, timeout=timeout_seconds)  # noqa: S310 - as above
    return answer


@dataclass(frozen=True)
class Reachability:
    """
    What the official hosts answered.

    Args:
        checksums: Text of the publisher's checksums file by tool name, for those that answered.
        refusals: Why not, for the others.
    """

    checksums: dict[str, str]
    refusals: dict[str, str]


def probe(
    tools: Iterable[Tool], opener: Opener = open_url, timeout_seconds: float = PROBE_TIMEOUT_SECONDS
) -> Reachability:
    """
    Fetch all checksums files at once, waiting `timeout_seconds` in all.

    They are small and needed anyway, and only a host that serves them can serve the archive.
    """
    result = Reachability({}, {})
    threads: list[threading.Thread] = []
    wanted = list(tools)
    answers: dict[str, str | Exception] = {}

    def ask(tool: Tool) -> None:
        try:
            with opener(tool.release.checksums_url, timeout_seconds) as stream:
                answers[tool.name] = stream.read(1 << 20).decode("utf-8", "replace")
        except (OSError, ValueError) as failure:
            answers[tool.name] = failure

    for tool in wanted:
        # Daemons: a name look-up that hangs cannot be interrupted, and must not hold up the end of the program.
        threads.append(threading.Thread(target=ask, args=(tool,), daemon=True))
        threads[-1].start()
    deadline = time.monotonic() + timeout_seconds
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    for tool in wanted:
        answer = answers.get(tool.name)
        host = urlsplit(tool.release.checksums_url).hostname
        if isinstance(answer, str):
            result.checksums[tool.name] = answer
        elif answer is None:
            result.refusals[tool.name] = f"`{host}` did not answer within {timeout_seconds:.0f} s"
        else:
            result.refusals[tool.name] = f"`{host}` cannot be reached ({_shorten(answer)})"
    return result


def _shorten(failure: Exception) -> str:
    reason = failure.reason if isinstance(failure, urllib.error.URLError) else failure
    return str(reason) or type(failure).__name__


def find_checksum(text: str, archive_name: str) -> str | None:
    r"""
    Return the hex digest that a checksums file has for an archive.

    >>> find_checksum("aa11  ./one.tar.gz\nbb22 *two.tar.gz\n", "two.tar.gz")
    'bb22'
    """
    for line in text.splitlines():
        digest, _, name = line.strip().partition(" ")
        if name.strip().lstrip("*").removeprefix("./") == archive_name:
            return digest.lower()
    return None


def check_archive(tool: Tool, archive: Path, checksums: str) -> str:
    """
    Hold `archive` to the publisher's digest and return that digest; raise ToolchainError where it differs.
    """
    expected = find_checksum(checksums, tool.release.archive_name)
    algorithm = {40: "sha1", 64: "sha256", 128: "sha512"}.get(len(expected or ""))
    if expected is None or algorithm is None:
        raise ToolchainError(
            f"cannot take `{tool.name}` from its official release: `{tool.release.checksums_url}` has no checksum for"
            f" `{tool.release.archive_name}`",
            hints=["look at that address: the publisher may have renamed the file"],
        )
    with archive.open("rb") as stream:
        actual = hashlib.file_digest(stream, algorithm).hexdigest()
    if actual != expected:
        raise ToolchainError(
            f"refused `{tool.name}` from its official release: {algorithm} of `{tool.release.archive_url}` is"
            f" `{actual}`, its publisher says `{expected}`",
            hints=["run this again; if it stays so, something on the way changes downloads: do not use it"],
        )
    return f"{algorithm}:{expected}"


def fetch_release(tool: Tool, checksums: str, folder: Path, target: Path, opener: Opener = open_url) -> str:
    """
    Download, verify and unpack the programs of a release into `target`, flat; return the digest it was held to.
    """
    archive = folder / tool.release.archive_name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with opener(tool.release.archive_url, _STALL_TIMEOUT_SECONDS) as stream, archive.open("wb") as output:
            shutil.copyfileobj(stream, output, 1 << 20)
        digest = check_archive(tool, archive, checksums)
        unpack_programs(archive, target)
    except (OSError, tarfile.TarError) as failure:
        raise ToolchainError(
            f"cannot take `{tool.name}` from its official release at `{tool.release.archive_url}`: {failure}",
            hints=["run this again"],
        ) from failure
    finally:
        archive.unlink(missing_ok=True)
    if not (target / tool.program).is_file():
        raise ToolchainError(
            f"cannot take `{tool.name}` from its official release: `{tool.release.archive_url}` holds no"
            f" `{tool.program}`"
        )
    return digest


def unpack_programs(archive: Path, target: Path) -> None:
    """
    Write every executable of a tar archive into `target`, without its folders.
    """
    with tarfile.open(archive) as stream:
        for member in stream:
            content = stream.extractfile(member) if member.isfile() and member.mode & 0o100 else None
            if content is None:
                continue
            path = target / Path(member.name).name
            with content, path.open("wb") as output:
                shutil.copyfileobj(content, output, 1 << 20)
            path.chmod(0o755)
