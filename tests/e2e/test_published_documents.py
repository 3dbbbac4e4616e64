"""Every command that the documents show runs: all `bash` blocks of a page, in its order, in one shell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Stack

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


RUNNABLE = [page for page in PAGES if blocks(page, "bash")]


def test_there_are_documents_to_run() -> None:
    assert {"README.md", "backup-restore.md", "use-mem0.md"} <= {page.name for page in RUNNABLE}


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_the_commands_of_the_page_run(stack: Stack, page: Path) -> None:
    script = "\n".join(blocks(page, "bash"))
    done = stack.run("bash", "-euo", "pipefail", "-c", script, check=False)
    assert done.returncode == 0, f"{page.name}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_the_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
