"""A page of the documents as one shell runs it: all of its `bash` blocks, also those inside a list."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from tests.e2e.conftest import ROOT, Stack

RUNBOOKS = ROOT / "docs" / "runbooks"
_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """List the blocks of one language."""
    return [textwrap.dedent(text) for _, found, text in _BLOCK.findall(page.read_text()) if found == language]


def follow(stack: Stack, page: Path, **environ: str) -> str:
    """Run every command of a page, and return what was said; the test fails where one fails."""
    steps = blocks(page, "bash")
    assert steps, f"{page} has no step"
    done = stack.run("bash", "-euo", "pipefail", "-c", "\n".join(steps), check=False, **environ)
    assert done.returncode == 0, f"{page.name}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr
