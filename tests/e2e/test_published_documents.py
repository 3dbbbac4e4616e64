"""
Everything that the documents show runs: all `bash` blocks of a page in one shell, all `python` blocks in one program.
"""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from tests.e2e.conftest import ROOT, Stack
from tests.e2e.pages import blocks, follow
from tests.openai_stub import OpenAIStub

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Runbooks are run on a stack to which it has happened: test_runbooks.py.
RUNNABLE = [page for page in PAGES if page.parent.name != "runbooks" and blocks(page, "bash")]


def test_there_are_documents_to_run() -> None:
    assert {"README.md", "backup-restore.md", "use-mem0.md"} <= {page.name for page in RUNNABLE}


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_the_commands_of_the_page_run(stack: Stack, page: Path) -> None:
    follow(stack, page)


# What the pages say of their programs, asked in the same process: `memory` is the service's, `alice` is one user's.
CLAIMS = """
mine, other = {"user_id": "alice"}, {"user_id": "bob"}
texts = lambda found: [each["memory"] for each in found["results"]]
assert texts(memory.search("hiking", filters=mine)) == ["I like hiking"], "the service does not find the memory"
assert texts(alice.get_all(filters=mine)) == ["I like hiking"], "alice does not see her memory"
assert texts(alice.search("hiking", filters=mine)) == ["I like hiking"]
memory.add("I like sailing", user_id="bob", infer=False)
assert texts(memory.get_all(filters=other)) == ["I like sailing"]
assert texts(alice.get_all(filters=other)) == [], "alice sees what is bob's"
assert texts(alice.search("sailing", filters=other)) == []
try:
    alice.add("I like falling", user_id="bob", infer=False)
except Exception as exc:
    print(f"refused: {type(exc).__name__}: {exc}")
assert texts(memory.get_all(filters=other)) == ["I like sailing"], "alice wrote for bob"
memory.delete_all(user_id="alice")
memory.delete_all(user_id="bob")
print("every claim holds")
"""


def test_the_programs_of_the_mem0_page_run_and_do_what_it_says(stack: Stack, tmp_path: Path) -> None:
    page = ROOT / "docs" / "how-to" / "use-mem0.md"
    parts = blocks(page, "python")
    assert len(parts) == 2
    # The one change: this stack has other dimensions than the default, and says so in the variable of `stack env`.
    program = "\n".join(parts).replace('dims": 1536', 'dims": int(os.environ["MEMHARBOR_EMBEDDING_DIMS"])')
    assert "1536" not in program
    (tmp_path / "program.py").write_text(program + CLAIMS)
    with psycopg.connect(stack.dsn("service")) as connection:
        connection.execute("delete from public.memories where user_id in ('alice', 'bob')")
    with OpenAIStub(384) as embedder:
        done = stack.run(
            "python",
            str(tmp_path / "program.py"),
            check=False,
            **stack.json("stack", "env"),
            OPENAI_BASE_URL=embedder.base_url,
            OPENAI_API_KEY="unused",  # pragma: allowlist secret
            NO_PROXY="127.0.0.1",
            MEM0_DIR=str(tmp_path),
        )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "refused: " in done.stdout
    assert done.stdout.endswith("every claim holds\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_the_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
