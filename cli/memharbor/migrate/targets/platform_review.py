"""
A file of the memories that Mem0 Platform has with other contents, for a person to decide: whole, or not there.

One JSON object a line: which memory it is there and here, both digests, and the memory as it is here. Nothing reads it
again; what is decided is done in the dashboard, or by deleting the memory there and exporting again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memharbor.errors import StateRefusedError, UsageError


@contextmanager
def review_file(path: Path, *, replace: bool = False) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """
    Lend what takes a memory for review, one after another; the file appears when the block ends well, be it empty.

    Args:
        path: The file; its folder must exist.
        replace: Whether one that is there may be replaced.

    Raises:
        UsageError: The folder is not there.
        StateRefusedError: There is such a file; it stays as it is.
    """
    if not path.parent.is_dir():
        raise UsageError(f"`{path.parent}` is no folder", hint=f"mkdir -p {path.parent}")
    _refuse(path, replace=replace)
    incoming = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Memories are in it: nobody else reads it.
        with os.fdopen(os.open(incoming, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:

            def put(found: Mapping[str, Any]) -> None:
                file.write(json.dumps(found, separators=(",", ":"), default=str) + "\n")

            yield put
            file.flush()
            os.fsync(file.fileno())
        _refuse(path, replace=replace)
        incoming.replace(path)
    finally:
        incoming.unlink(missing_ok=True)


def _refuse(path: Path, *, replace: bool) -> None:
    if path.exists() and not replace:
        raise StateRefusedError(f"`{path}` is there already", hint="pass `--replace`, or name another file")
