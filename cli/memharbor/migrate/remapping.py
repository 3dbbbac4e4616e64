"""
Read which user of a source becomes which user here.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

from memharbor.errors import SourceDataError


def read_remap(path: Path) -> dict[str, str]:
    """
    Read a file that maps users: a JSON object, or CSV with the id in the source and the new one.

    Raises:
        SourceDataError: It is neither, or maps one user twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("{"):
            pairs = json.loads(text, object_pairs_hook=list)
        else:
            pairs = [tuple(cell.strip() for cell in row) for row in csv.reader(text.splitlines()) if row]
    except (OSError, ValueError) as exc:
        raise SourceDataError(f"`{path}` cannot be read: {exc}") from exc
    if not all(len(pair) == 2 and all(isinstance(part, str | int) and str(part) for part in pair) for pair in pairs):
        raise SourceDataError(f"`{path}` maps no users", hint='for instance {"1": "alice"}, or a line `1,alice`')
    names = {str(old): str(new) for old, new in pairs}
    if len(names) != len(pairs):
        raise SourceDataError(f"`{path}` maps one user twice")
    return names
