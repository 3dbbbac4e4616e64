"""The command line on a database, in this process: what is said, and what is refused and how."""

from __future__ import annotations

import json
import re
from typing import Any

from click.testing import CliRunner, Result

from memharbor.commands import cli


def memharbor(dsn: str, *arguments: str, **environ: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), env={"MEMHARBOR_DSN": dsn, **environ})


def ok(dsn: str, *arguments: str, **environ: str) -> Any:
    done = memharbor(dsn, *arguments, "--output", "json", **environ)
    assert done.exit_code == 0, f"{done.output}\n{done.stderr}\n{done.exception!r}"
    return json.loads(done.stdout)


def refused(code: int, pattern: str, dsn: str, *arguments: str, **environ: str) -> None:
    done = memharbor(dsn, *arguments, **environ)
    error: Any = done.exception
    assert getattr(error, "exit_code", done.exit_code) == code, f"{done.output}\n{error!r}"
    assert re.search(pattern, getattr(error, "message", done.output)), getattr(error, "message", done.output)
