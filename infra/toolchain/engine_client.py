"""
Speak the engine's HTTP interface over whatever `DOCKER_HOST` names, so that no client program is needed.

Source: Docker Engine API reference, v1.41. Only what the set-up asks is here: version, images, import.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

DEFAULT_HOST = "unix:///var/run/docker.sock"
_BLOCK_BYTES = 1 << 20


class EngineError(Exception):
    """
    The engine did not answer, or answered with an error; the text is its own.
    """


@dataclass(frozen=True)
class EngineVersion:
    """
    What `GET /version` says.
    """

    version: str
    architecture: str


@dataclass(frozen=True)
class Image:
    """
    A local image: its id, labels, and the digests it was pulled by.
    """

    id: str
    labels: Mapping[str, str]
    digests: tuple[str, ...]


class EngineClient:
    """
    One engine, by the address that `DOCKER_HOST` would hold: unix, tcp (TLS by the usual variables) or ssh.
    """

    def __init__(self, host: str, environment: Mapping[str, str]) -> None:
        self.host = host
        self._environment = environment

    def read_version(self, timeout_seconds: float = 5) -> EngineVersion:
        """Return the engine's version; raise EngineError where it does not answer."""
        text = self._request("GET", "/version", timeout_seconds=timeout_seconds)
        try:
            answer = json.loads(text)
            return EngineVersion(str(answer["Version"]), str(answer["Arch"]))
        except (ValueError, KeyError, TypeError) as failure:
            raise EngineError(f"`{self.host}` does not speak the engine's language") from failure

    def find_image(self, reference: str) -> Image | None:
        """Return the local image of that name, or None."""
        try:
            answer = json.loads(self._request("GET", f"/images/{quote(reference)}/json", timeout_seconds=30))
        except EngineError as failure:
            if "No such image" in str(failure):
                return None
            raise
        labels = (answer.get("Config") or {}).get("Labels") or {}
        return Image(answer["Id"], labels, tuple(answer.get("RepoDigests") or ()))

    def find_registry_digest(self, reference: str, timeout_seconds: float) -> str:
        """Ask the engine for the digest that the registry has; raise EngineError where it cannot be reached."""
        path = f"/distribution/{quote(reference)}/json"
        answer = json.loads(self._request("GET", path, timeout_seconds=timeout_seconds))
        return str(answer["Descriptor"]["digest"])

    def pull_image(self, repository: str, tag: str) -> None:
        """Pull one image; raise EngineError where the pull breaks off."""
        query = urlencode({"fromImage": repository, "tag": tag})
        self._raise_for_stream(self._request("POST", f"/images/create?{query}", timeout_seconds=600))

    def import_image(self, repository: str, tag: str, archive: Iterable[bytes], changes: list[str]) -> None:
        """Make an image of one layer from a tar stream."""
        pairs = [("fromSrc", "-"), ("repo", repository), ("tag", tag), *(("changes", line) for line in changes)]
        answer = self._request("POST", f"/images/create?{urlencode(pairs)}", body=archive, timeout_seconds=600)
        self._raise_for_stream(answer)

    @staticmethod
    def _raise_for_stream(answer: bytes) -> None:
        # These calls answer 200 before the work is done; a failure is a line in the stream.
        for line in answer.decode("utf-8", "replace").splitlines():
            message: dict[str, Any] = json.loads(line) if line.strip() else {}
            if "error" in message:
                raise EngineError(str(message["error"]))

    def _request(self, method: str, path: str, *, timeout_seconds: float, body: Iterable[bytes] | None = None) -> bytes:
        try:
            with self._connection(timeout_seconds) as connection:
                headers = {"Transfer-Encoding": "chunked", "Content-Type": "application/x-tar"} if body else {}
                connection.request(method, path, body=body, headers=headers, encode_chunked=body is not None)
                response = connection.getresponse()
                answer = response.read()
        except (OSError, http.client.HTTPException) as failure:
            raise EngineError(str(failure) or type(failure).__name__) from failure
        if response.status >= 400:
            try:
                text = str(json.loads(answer)["message"])
            except (ValueError, KeyError):
                text = f"status {response.status}"
            raise EngineError(text)
        return answer

    @contextmanager
    def _connection(self, timeout_seconds: float) -> Iterator[http.client.HTTPConnection]:
        address = urlsplit(self.host)
        connection = http.client.HTTPConnection("docker", timeout=timeout_seconds)
        process: subprocess.Popen[bytes] | None = None
        try:
            if address.scheme == "unix":
                plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                plain.settimeout(timeout_seconds)
                connection.sock = plain
                plain.connect(address.path)
            elif address.scheme == "tcp":
                connection.sock = self._open_tcp(address.hostname or "localhost", address.port, timeout_seconds)
            elif address.scheme == "ssh":
                process, connection.sock = _open_ssh(self.host, timeout_seconds)
            else:
                raise EngineError(f"`{address.scheme}://` is not supported: use unix, tcp or ssh")
            yield connection
        finally:
            connection.close()
            if process is not None:
                process.kill()
                process.wait()

    def _open_tcp(self, name: str, port: int | None, timeout_seconds: float) -> socket.socket:
        verified = bool(self._environment.get("DOCKER_TLS_VERIFY"))
        plain = socket.create_connection((name, port or (2376 if verified else 2375)), timeout_seconds)
        if not verified:
            return plain
        home = Path(self._environment.get("HOME", "/")) / ".docker"
        folder = Path(self._environment.get("DOCKER_CERT_PATH") or home)
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        context.load_cert_chain(str(folder / "cert.pem"), str(folder / "key.pem"))
        return context.wrap_socket(plain, server_hostname=name)


def _open_ssh(host: str, timeout_seconds: float) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """
    Reach an engine as the docker client does: ssh runs `docker system dial-stdio` beside it.
    """
    address = urlsplit(host)
    target = f"{address.username}@{address.hostname}" if address.username else str(address.hostname)
    port = ["-p", str(address.port)] if address.port else []
    ours, theirs = socket.socketpair()
    ours.settimeout(max(timeout_seconds, 15))
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *port]
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - the address is the user's own DOCKER_HOST
            ["ssh", *options, "--", target, "docker", "system", "dial-stdio"],  # noqa: S607 - ssh is the user's own
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.DEVNULL,
        )
    return process, ours


def read_blocks(stream: Any) -> Iterator[bytes]:
    """
    Yield a binary stream in blocks of one MiB.
    """
    while block := stream.read(_BLOCK_BYTES):
        yield block


def find_host(environment: Mapping[str, str]) -> str:
    """
    Return the engine's address: what `DOCKER_HOST` says, else the default socket.
    """
    return environment.get("DOCKER_HOST") or DEFAULT_HOST


def can_open_socket(host: str) -> bool:
    """
    Tell whether this user may open the socket that `host` names; True for hosts that are not a socket here.
    """
    path = Path(urlsplit(host).path)
    return not host.startswith("unix://") or not path.exists() or os.access(path, os.R_OK | os.W_OK)
