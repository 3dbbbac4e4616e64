"""Loading the steps: order, checksums, headers, and what is wrong with a template."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from memharbor.errors import ConfigError
from memharbor.schema import load_steps
from memharbor.schema.fingerprint import Difference, differences, fingerprint_of, with_differences
from memharbor.schema.migrations import LEDGER_COMPONENTS, contract_views, split_header
from memharbor.settings import Settings
from memharbor.templates import template_root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Path(shutil.copytree(template_root(), tmp_path / "sql_templates"))


def test_components_come_in_their_order_and_versioned_steps_before_repeatable_ones() -> None:
    steps = load_steps(Settings())
    places = [(LEDGER_COMPONENTS.index(step.component), step.kind == "repeatable") for step in steps]
    assert places == sorted(places)
    versioned = [step.name for step in steps if step.kind == "versioned"]
    assert versioned == sorted(versioned)


def test_a_checksum_follows_the_sql_and_not_the_header(root: Path) -> None:
    before = {step.name: step.checksum for step in load_steps(Settings(), root=root)}
    file = root / "versioned" / "0002_history.up.sql"
    file.write_text(file.read_text().replace("-- purpose: what", "-- purpose: whatever"))
    assert {step.name: step.checksum for step in load_steps(Settings(), root=root)} == before
    file.write_text(file.read_text() + "\n-- edited\n")
    changed = {step.name for step in load_steps(Settings(), root=root) if step.checksum != before[step.name]}
    assert changed == {"0002_history"}


def test_dimensions_change_only_the_step_that_makes_the_tables() -> None:
    few, many = (load_steps(Settings(embedding_dims=dims)) for dims in (384, 1536))
    changed = {a.name for a, b in zip(few, many, strict=True) if a.checksum != b.checksum}
    assert changed == {"0001_memories"}


def test_settings_of_search_change_only_repeatable_steps() -> None:
    one = load_steps(Settings())
    two = load_steps(Settings(hnsw_ef_search=200, statement_timeout_ms=5, lock_timeout_ms=100, leakproof=False))
    changed = {a.name for a, b in zip(one, two, strict=True) if a.checksum != b.checksum}
    assert changed == {"search_settings", "role_settings", "leakproof"}


def test_the_graph_and_the_history_can_be_left_out() -> None:
    small = load_steps(Settings(), include_graph=False, include_history=False)
    assert {"0002_history", "0003_graph"}.isdisjoint(step.name for step in small)
    text = "".join(step.sql for step in small)
    assert "memory_relationships" not in text.replace("drop", "")
    assert "memory_history" not in text


def test_the_contract_views_are_the_ones_that_mem0_and_older_programs_name() -> None:
    assert set(contract_views(load_steps(Settings()))) == {
        "memories", "mem0", "mem0_entities", "memories_entities", "memory_relationships", "memory_history",
        "mem0_memories", "mem0_history", "mem0_metadata",
    }  # fmt: skip


def test_a_step_without_a_verify_twin_is_refused(root: Path) -> None:
    (root / "versioned" / "0002_history.verify.sql").unlink()
    with pytest.raises(ConfigError, match="has no verify twin"):
        load_steps(Settings(), root=root)


def test_two_steps_at_the_same_place_are_refused(root: Path) -> None:
    for suffix in (".up.sql", ".verify.sql"):
        shutil.copy(root / "versioned" / f"0002_history{suffix}", root / "versioned" / f"0002_other{suffix}")
    with pytest.raises(ConfigError, match="same place"):
        load_steps(Settings(), root=root)


def test_an_unknown_component_is_refused(root: Path) -> None:
    file = root / "versioned" / "0002_history.up.sql"
    file.write_text(file.read_text().replace("-- component: tables", "-- component: chairs"))
    with pytest.raises(ConfigError, match="unknown component `chairs`"):
        load_steps(Settings(), root=root)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("select 1;", "lacks component"),
        ("-- component: tables\n-- purpose: x\nselect 1;", "lacks variables"),
        (
            "-- component: tables\n-- purpose: x\n-- variables: none\n-- runs as: root\n-- safe to repeat: x\n",
            "unknown",
        ),
    ],
)
def test_a_header_that_says_too_little_or_nonsense_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        split_header(text, "versioned/0009_x.up.sql")


def test_a_fingerprint_does_not_depend_on_order() -> None:
    assert fingerprint_of({"a": [1], "b": {"c": None}}) == fingerprint_of({"b": {"c": None}, "a": [1]})
    assert fingerprint_of({"a": [1]}) != fingerprint_of({"a": [2]})


def test_carrying_all_differences_over_gives_the_other_catalog() -> None:
    before, after = {"a": 1, "b": 2}, {"b": 3, "c": 4}
    assert with_differences(before, differences(before, after)) == after
    assert with_differences({"drifted": 1}, (Difference("a", 1, None),)) == {"drifted": 1}
