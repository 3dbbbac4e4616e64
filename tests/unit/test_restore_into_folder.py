"""Files of a restored server come into a folder as their new owner's, and stay inside it."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from memharbor.backup.into_folder import _tamed
from memharbor.errors import SourceDataError


def member(name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o600) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.mode, made.uid, made.gid, made.uname = kind, mode, 999, 999, "postgres"
    return made


def test_a_file_belongs_to_who_extracts_it(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(member("./base", tarfile.DIRTYPE, 0o777))
        file = member("./base/1", mode=0o4666)
        file.size = 3
        archive.addfile(file, io.BytesIO(b"abc"))
    packed.seek(0)
    with tarfile.open(fileobj=packed, mode="r|") as archive:
        for each in archive:
            archive.extract(_tamed(each), tmp_path)
    found = (tmp_path / "base" / "1").stat()
    assert (found.st_uid, found.st_mode & 0o7777, found.st_size) == (os.getuid(), 0o644, 3)
    assert (tmp_path / "base").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize(
    "wrong",
    [
        member("/etc/passwd"),
        member("../outside"),
        member("base/../../outside"),
        member("pg_wal", tarfile.SYMTYPE),
        member("pg_wal", tarfile.LNKTYPE),
        member("pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda each: f"{each.name} {each.type!r}",
)
def test_what_is_no_file_of_a_server_is_refused(wrong: tarfile.TarInfo) -> None:
    with pytest.raises(SourceDataError, match="neither a file nor a folder"):
        _tamed(wrong)
