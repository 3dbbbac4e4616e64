"""
Keep what was downloaded or built outside the checkout, by version, shared by all clones.

An entry is complete or absent: it is made beside its place and renamed. Layout: `<root>/toolchain/<key>/bin/…` with a
`source.json` that says where it came from and why; `<root>/toolchain/.work` holds sources and module caches of the
builds in progress and is deleted after them; `<root>/logs` holds the output of every program that was run.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


def find_cache_root(environment: Mapping[str, str]) -> Path:
    """
    Return Memharbor's own cache folder by the XDG rules.

    >>> find_cache_root({"XDG_CACHE_HOME": "/var/cache/me", "HOME": "/srv/me"}).as_posix()
    '/var/cache/me/memharbor'
    >>> find_cache_root({"XDG_CACHE_HOME": "relative", "HOME": "/srv/me"}).as_posix()
    '/srv/me/.cache/memharbor'
    """
    configured = environment.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    if configured.startswith("/"):
        return Path(configured) / "memharbor"
    return Path(environment.get("HOME") or Path.home()) / ".cache" / "memharbor"


def make_key(name: str, version: str, *ingredients: str) -> str:
    """
    Return the folder name for one tool: readable at the front, exact at the end.

    >>> make_key("pulumi", "3.1.0", "amd64") == make_key("pulumi", "3.1.0", "amd64")
    True
    >>> make_key("pulumi", "3.1.0", "amd64") == make_key("pulumi", "3.1.0", "arm64")
    False
    """
    digest = hashlib.sha256("\0".join((name, version, *ingredients)).encode()).hexdigest()
    return f"{name}-{version}-{digest[:12]}"


def hash_folder(folder: Path) -> str:
    """
    Return one hash over the names and contents of the files directly in `folder`.
    """
    digest = hashlib.sha256()
    for path in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Origin:
    """
    Where an entry came from, as its `source.json` has it.
    """

    version: str
    source: str
    reason: str


class Cache:
    """
    Entries of finished tools below one root folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.entries = root / "toolchain"
        self.work = self.entries / ".work"

    def entry(self, key: str) -> Path:
        """Return where `key` lives, whether it is there or not."""
        return self.entries / key

    def log(self, name: str) -> Path:
        """Return the log file for `name`."""
        return self.root / "logs" / f"{name}.log"

    def read_origin(self, key: str) -> Origin | None:
        """Return where the entry came from, or None where there is no (complete) entry."""
        try:
            fields = json.loads((self.entry(key) / "source.json").read_text(encoding="utf-8"))
            return Origin(str(fields["version"]), str(fields["source"]), str(fields["reason"]))
        except (OSError, ValueError, KeyError):
            return None

    def publish(self, key: str, origin: Origin, fill: Callable[[Path], None]) -> Path:
        """
        Fill a new folder and put it in place in one rename.
        """
        incoming = self.work / f"{key}.incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        (incoming / "bin").mkdir(parents=True)
        fill(incoming / "bin")
        (incoming / "source.json").write_text(json.dumps(asdict(origin), indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(self.entry(key), ignore_errors=True)
        incoming.rename(self.entry(key))
        return self.entry(key)

    @contextlib.contextmanager
    def locked(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """
        Hold the one lock for writing here, so that two clones do not build the same thing at once.

        The kernel frees it when the process ends, however it ends.
        """
        self.entries.mkdir(parents=True, exist_ok=True)
        with (self.entries / ".lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield
