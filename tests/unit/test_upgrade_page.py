"""The blocks of docs/how-to/upgrade-mem0.md, executed by the releases of Mem0 that they name."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.client_platform import ClientPlatform
from tests.old_mem0 import OLD_RELEASES, environment, run_program
from tests.openai_stub import OpenAIStub
from tests.platform_server import KEY

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "upgrade-mem0.md"
RELEASES = {*OLD_RELEASES, "2.x"}
DIMS = 32

PREAMBLE = """
import os
import mem0.memory.main
from mem0 import Memory


def config_in(name):
    # 0.1 opens a store for telemetry in MEM0_DIR, telemetry or not, which only one `Memory` of a process can have.
    mem0.memory.main.mem0_dir = os.path.abspath(name + "-mem0")
    return {
        "vector_store": {
            "provider": "qdrant",
            "config": {"path": os.path.abspath(name), "on_disk": True, "embedding_model_dims": %d},
        },
        "embedder": {"provider": "openai", "config": {"embedding_dims": %d}},
        "llm": {"provider": "openai", "config": {"model": "stub"}},
        "history_db_path": os.path.abspath(name + ".db"),
    }


memory = Memory.from_config(config_in("qdrant"))
messages = [{"role": "user", "content": "I like hiking"}]
platform, key = os.environ["TEST_PLATFORM"], os.environ["TEST_KEY"]

"""


def blocks() -> list[tuple[set[str], str]]:
    """Every block of the page with the releases that execute it."""
    page = PAGE.read_text()
    found = re.findall(r"<!-- runs: ([^\n]*) -->\n```python\n(.*?)```\n", page, re.DOTALL)
    assert len(found) == page.count("```python"), "a block says by which releases it is executed"
    return [(set(releases.split()), text) for releases, text in found]


class Stub(OpenAIStub):
    """Answers prompts of all releases: facts to keep, what to do with them, and what a graph is made of."""

    def answer(self, path: str, request: Mapping[str, Any]) -> Mapping[str, Any] | None:
        answer = super().answer(path, request)
        if path == "/chat/completions" and answer:
            message = answer["choices"][0]["message"]
            content = {"facts": ["I like hiking"], "memory": [{"id": "0", "text": "I like hiking", "event": "ADD"}]}
            message["content"] = json.dumps(content)
            names = {each["function"]["name"] for each in request.get("tools") or ()}
            calls = [(name, arguments) for name, arguments in GRAPH.items() if name in names]
            if calls:
                message["tool_calls"] = [
                    {"id": "1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
                    for name, arguments in calls
                ]
        return answer


_LIKES = {"source": "user123", "relationship": "likes", "destination": "hiking"}
GRAPH: dict[str, Any] = {
    "extract_entities": {
        "entities": [
            {"entity": "user123", "entity_type": "person"},
            {"entity": "hiking", "entity_type": "activity"},
        ]
    },
    "establish_relationships": {"entities": [_LIKES]},
    "establish_relations": {"entities": [_LIKES]},
}


def execute_page(python: Path | str, release: str, folder: Path) -> None:
    """Run the page's blocks of a release as one program of a Python that has it."""
    chosen = [text for releases, text in blocks() if release in releases]
    ends = [f"{text}\nprint({number})\n" for number, text in enumerate(chosen)]
    with Stub(DIMS) as stub, ClientPlatform() as platform:
        printed = run_program(
            python,
            PREAMBLE % (DIMS, DIMS) + "\n".join(ends),
            folder / "page",
            stub.base_url,
            TEST_PLATFORM=platform.base_url,
            TEST_KEY=KEY,
        )
    assert printed.split() == [str(number) for number in range(len(chosen))]


def test_every_block_names_releases_and_every_release_has_its_blocks() -> None:
    found = blocks()
    assert all(releases and releases <= RELEASES for releases, _ in found)
    for release in RELEASES:
        assert sum(release in releases for releases, _ in found) >= 15


# Calls of the guide that everybody copies (issue 5), as far as they are Mem0's own.
CALLS = (
    "memory.add(",
    "memory.get_all(",
    "memory.search(",
    "threshold=0.7",
    "api_version",
    "output_format=",
    "MemoryType.PROCEDURAL.value",
    "MemoryConfig(",
    '"neo4j"',
    '["relations"]',
    "MemoryClient()",
    "org_id=",
    ".get_project(",
    ".update_project(",
    "project.get(",
    "project.update(",
    "retrieval_criteria=",
    "enable_graph=",
    "create_memory_export(",
    "get_memory_export(",
    "client.search(",
    "client.get_summary(",
    "class DataMigrator",
    "memory.config.custom_fact_extraction_prompt",
    "Memory(config=",
    "len(memories)",
)


@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_the_guide_is_executed_before_and_after(call: str) -> None:
    found = [releases for releases, text in blocks() if call in text]
    assert any(releases & set(OLD_RELEASES) for releases in found), "nothing old executes it"


def test_the_page_holds_on_the_present_release(tmp_path: Path) -> None:
    execute_page(sys.executable, "2.x", tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("release", OLD_RELEASES)
def test_the_page_holds_on_old_releases(release: str, tmp_path: Path) -> None:
    execute_page(environment(release), release, tmp_path)
