"""
How a file of a logical backup is written and read: compressed, encrypted where recipients are named, digested, synced.

Which files there are is `logical_format`'s. Sources: age specification (age-encryption.org/v1), RFC 8878 (zstd).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import zstandard

from memharbor.backup.logical_format import MANIFEST, READ_SCRIPT, SUMS, Manifest, StoredFile, parse_manifest
from memharbor.errors import ConfigError, SourceDataError

_CHUNK_BYTES = 1 << 20
# Level 3 is zstd's own default: vectors are noise to any level, text gains little above it.
_ZSTD_LEVEL = 3


class Sink(Protocol):
    """What takes bytes."""

    def write(self, data: bytes, /) -> Any:
        """Take some bytes."""


@dataclass(frozen=True)
class Keys:
    """
    Age keys: who may read what is written, and by which what is read is opened.

    Args:
        recipients: pyrage's recipients; files are encrypted where there is one.
        identities: pyrage's identities. Secret.
    """

    recipients: tuple[Any, ...] = ()
    identities: tuple[Any, ...] = field(default=(), repr=False)


def read_keys(
    recipients: Sequence[str] = (), *, recipients_file: Path | None = None, identity_file: Path | None = None
) -> Keys:
    """
    Read age keys as the `age` program does: one a line, `#` begins a comment.

    Raises:
        ConfigError: A file cannot be read, or a key is none; the message never quotes an identity.
    """
    import pyrage

    wanted = [*recipients, *(_lines(recipients_file) if recipients_file else [])]
    parsed = []
    for text in wanted:
        try:
            recipient = pyrage.ssh.Recipient if text.startswith("ssh-") else pyrage.x25519.Recipient
            parsed.append(recipient.from_str(text))
        except pyrage.RecipientError as exc:
            raise ConfigError(
                f"`{text}` is no age recipient: {exc}", hint="make a pair of keys with `age-keygen --output key.txt`"
            ) from exc
    if recipients_file and not parsed:
        raise ConfigError(f"`{recipients_file}` names no recipient")
    identities = []
    for text in _lines(identity_file) if identity_file else []:
        try:
            identities.append(pyrage.x25519.Identity.from_str(text))
        except pyrage.IdentityError:
            raise ConfigError(f"`{identity_file}` holds a line that is no age identity") from None
    return Keys(tuple(parsed), tuple(identities))


def _lines(path: Path) -> list[str]:
    try:
        lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"`{path}` cannot be read: {exc}") from exc
    return [line for line in lines if line and not line.startswith("#")]


# --- files ------------------------------------------------------------------------------------------------------------


def stored_name(stem: str, *, encrypted: bool) -> str:
    """
    Name a file by what it holds and how it is packed.

    >>> stored_name("memories.copy", encrypted=True)
    'memories.copy.zst.age'
    """
    return f"{stem}.zst" + (".age" if encrypted else "")


def write_file(
    folder: Path,
    stem: str,
    chunks: Iterable[bytes],
    keys: Keys,
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> StoredFile:
    """
    Write one file of a backup, readable by its owner only, and wait until the disk has it; counts no rows.

    Args:
        folder: Of the backup.
        stem: What it holds, for instance `memories.copy`.
        chunks: Its content, in pieces of any size.
        keys: Encrypts for its recipients where there are any.
        on_bytes: Told how many bytes of content each piece has.
    """
    path = folder / stored_name(stem, encrypted=bool(keys.recipients))
    with open(path, "xb", opener=_private) as file:
        writer = _Hashing(file)
        pieces = _Pieces(_compress(chunks, on_bytes))
        if keys.recipients:
            import pyrage

            try:
                pyrage.encrypt_io(pieces, writer, list(keys.recipients))
            except pyrage.EncryptError as exc:
                # What failed may be the source, whose own error says more.
                raise pieces.failure or ConfigError(f"age cannot encrypt: {exc}") from exc
        else:
            for piece in pieces:
                writer.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(path.name, 0, writer.size_bytes, writer.digest.hexdigest())


def write_text(folder: Path, name: str, text: str) -> None:
    """Write a small file of a backup, readable by its owner only."""
    with open(folder / name, "x", encoding="utf-8", opener=_private) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def pour(folder: Path, file: StoredFile, sink: Sink, keys: Keys, on_bytes: Callable[[int], None] | None = None) -> None:
    """
    Read one file of a backup into a sink, decrypted and decompressed.

    Args:
        folder: Of the backup.
        file: Which one.
        sink: Takes the content in pieces.
        keys: Decrypts by its identities.
        on_bytes: Told how many stored bytes each piece had.

    Raises:
        ConfigError: It is encrypted, and no identity opens it.
        SourceDataError: It cannot be decrypted or decompressed.
    """
    unpacked = _Unpacking(sink)
    try:
        with (folder / file.name).open("rb") as stored:
            if file.name.endswith(".age"):
                _decrypt(stored, unpacked, keys, file.name)
                if on_bytes:
                    on_bytes(file.size_bytes)
            else:
                while piece := stored.read(_CHUNK_BYTES):
                    unpacked.write(piece)
                    if on_bytes:
                        on_bytes(len(piece))
    except (zstandard.ZstdError, OSError) as exc:
        raise SourceDataError(f"`{file.name}` of the backup is damaged: {exc}") from exc
    if not unpacked.is_complete:
        raise SourceDataError(f"`{file.name}` of the backup ends too early")


def _decrypt(stored: Any, unpacked: _Unpacking, keys: Keys, name: str) -> None:
    import pyrage

    if not keys.identities:
        raise ConfigError("the backup is encrypted", hint="name the file of your age identity with `--identity-file`")
    try:
        pyrage.decrypt_io(stored, unpacked, list(keys.identities))
    except (pyrage.DecryptError, OSError) as exc:
        if unpacked.failure is not None:
            raise unpacked.failure from exc
        if isinstance(exc, pyrage.DecryptError):
            raise ConfigError(f"no identity opens `{name}` of the backup: {exc}") from exc
        raise SourceDataError(f"`{name}` of the backup is damaged: {exc}") from exc


def write_sums(folder: Path, manifest: Manifest) -> None:
    """Write SHA256SUMS, last of all: a folder without it is no backup."""
    write_text(folder, SUMS, _sums(folder, manifest))


def _sums(folder: Path, manifest: Manifest) -> str:
    vouched = [(file.sha256, file.name) for file in manifest.files]
    vouched += [(sha256_of(folder / name), name) for name in (READ_SCRIPT, MANIFEST)]
    return "".join(f"{sha256}  {name}\n" for sha256, name in vouched)


def load(folder: Path, *, only_manifest: bool = False) -> tuple[Manifest, str]:
    """
    Read the manifest of a backup and its SHA-256; the files of rows are not looked at.

    Args:
        folder: Of the backup.
        only_manifest: The folder has nothing but the manifest and SHA256SUMS.

    Raises:
        SourceDataError: It is no backup, is not complete, or its manifest is damaged.
    """
    for name in (SUMS, MANIFEST) if only_manifest else (SUMS, MANIFEST, READ_SCRIPT):
        if not (folder / name).is_file():
            raise SourceDataError(
                f"`{folder.name}` is no complete logical backup: it has no {name}",
                hint="where its writing was interrupted, take another one",
            )
    said, digest = (folder / SUMS).read_bytes(), sha256_of(folder / MANIFEST)
    if f"{digest}  {MANIFEST}\n".encode() not in said:
        raise SourceDataError(f"the manifest of `{folder.name}` is damaged: its SHA-256 is not the one in {SUMS}")
    manifest = parse_manifest((folder / MANIFEST).read_text(encoding="utf-8"))
    if not only_manifest and said != _sums(folder, manifest).encode():
        raise SourceDataError(f"`{folder.name}` is damaged: {SUMS} does not fit {MANIFEST} and {READ_SCRIPT}")
    return manifest, digest


def check_files(folder: Path, manifest: Manifest) -> None:
    """
    Compare every file with what the manifest says of it.

    Raises:
        SourceDataError: One is missing or differs.
    """
    for file in manifest.files:
        path = folder / file.name
        if not path.is_file():
            raise SourceDataError(f"`{file.name}` of backup `{manifest.id}` is missing")
        if path.stat().st_size != file.size_bytes or sha256_of(path) != file.sha256:
            raise SourceDataError(
                f"`{file.name}` of backup `{manifest.id}` is damaged: its SHA-256 is not the recorded one"
            )


def sha256_of(path: Path) -> str:
    """Digest a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _compress(chunks: Iterable[bytes], on_bytes: Callable[[int], None] | None) -> Iterator[bytes]:
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compressobj()
    for chunk in chunks:
        if on_bytes:
            on_bytes(len(chunk))
        if packed := compressor.compress(chunk):
            yield packed
    yield compressor.flush()


class _Pieces:
    """An iterator of bytes as a file that is read, which remembers the error of its source."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def read(self, size: int = -1) -> bytes:
        try:
            while not self._rest:
                self._rest = next(self._pieces)
        except StopIteration:
            return b""
        except BaseException as exc:
            self.failure = exc
            raise
        taken = self._rest if size < 0 else self._rest[:size]
        self._rest = self._rest[len(taken) :]
        return taken


class _Hashing:
    """A file that is written, its length and its digest."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.size_bytes = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.digest.update(data)
        self.size_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


class _Unpacking:
    """A sink that decompresses, and remembers an error of the sink behind it."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._decompressor = zstandard.ZstdDecompressor().decompressobj()
        self.failure: BaseException | None = None

    @property
    def is_complete(self) -> bool:
        return bool(self._decompressor.eof)

    def write(self, data: bytes) -> int:
        try:
            if content := self._decompressor.decompress(data):
                self._sink.write(content)
        except zstandard.ZstdError as exc:
            self.failure = SourceDataError(f"a file of the backup is damaged: {exc}")
            raise self.failure from exc
        except BaseException as exc:
            self.failure = exc
            raise
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""
