"""
Run external tools: one way to call them, to show what they say and to fail.

Must not be given secrets as arguments: they belong into the environment, a file or standard input. `MemharborError`s carry the tool's
own words verbatim.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from memharbor.errors import ExternalToolError


def find_tool(name: str) -> str | None:
    """Find a tool on PATH; `None` where there is none."""
    return shutil.which(name)


def run(
    arguments: Sequence[str],
    *,
    cwd: Path | None = None,
    environ: Mapping[str, str] | None = None,
    input_text: str | None = None,
    timeout_seconds: float | None = None,
    hint: str | Sequence[str] = (),
) -> str:
    """
    Run a tool to its end and return its standard output.

    Args:
        arguments: The tool and its arguments, without secrets.
        cwd: Folder to run in.
        environ: Variables on top of the present environment.
        input_text: What the tool reads from standard input, the place for secrets; by default that of this process.
        timeout_seconds: When to give up; `None` waits for ever.
        hint: Next commands for the error, if it fails.

    Raises:
        ExternalToolError: The tool is missing, failed or took too long; the message ends with its own last lines.
    """
    tool = arguments[0]
    try:
        done = subprocess.run(  # noqa: S603 - arguments are a list, no shell
            arguments,
            cwd=cwd,
            env={**os.environ, **(environ or {})},
            input=input_text,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except FileNotFoundError as exc:
        raise ExternalToolError(f"`{tool}` is not installed or not on PATH", hint=hint or "run `make setup`") from exc
    except subprocess.TimeoutExpired as exc:
        raise ExternalToolError(f"`{tool}` did not answer within {timeout_seconds:.0f} seconds", hint=hint) from exc
    if done.returncode != 0:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-12:])
        raise ExternalToolError(
            f"`{' '.join(arguments[:3])}` failed with exit code {done.returncode}:\n{said}", hint=hint
        )
    return done.stdout
