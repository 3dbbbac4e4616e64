"""
Every kind of damage to a repository is caught by `backup verify`, and an undamaged one is never accused.

`make test` runs a sample that a seed draws (MEMHARBOR_TEST_SEED) and what costs little; `make soak` runs every kind with
several seeds. With `--update-golden` the table in docs/reference/backup-faults.md is written from what was found.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from memharbor.backup.verify_report import Verification
from tests.corruption import FAULTS_PAGE, KINDS, Kind, Laboratory, faults_page, impersonal

SEED = int(os.environ.get("MEMHARBOR_TEST_SEED", "1"))
SEEDS = range(SEED, SEED + 3)
CHEAP = ("prefix-deleted", "backups-deleted", "wrong-key", "wal-middle-missing", "older-list")
SAMPLE = random.Random(SEED).sample([kind.name for kind in KINDS if kind.name not in CHEAP], 4)
BY_NAME = {kind.name: kind for kind in KINDS}
# What was found in this run and earlier ones, so that the table can be written after one that was interrupted.
FOUND = Path(__file__).resolve().parents[2] / "build" / "backup-faults.json"


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Write the table of the docs at the end, where it is asked for and every kind was done."""
    yield
    if request.config.getoption("--update-golden") and FOUND.exists():
        found = json.loads(FOUND.read_text())
        if set(found) >= set(BY_NAME):
            FAULTS_PAGE.write_text(faults_page(found))


def assert_caught(laboratory: Laboratory, kind: Kind, chance: random.Random) -> Verification:
    with laboratory.damaged(kind, chance) as done:
        result = laboratory.verifier().verify()
    assert not result.is_good, f"{kind.name} is called good: {done}"
    found = [finding for finding in result.findings if finding.kind in kind.found]
    assert found, f"{kind.name} ({done}) is found as {result.as_text()}"
    assert all(finding.what and finding.hint for finding in result.findings)
    keep(kind.name, impersonal(found[0].what))
    return result


def keep(name: str, what: str) -> None:
    FOUND.parent.mkdir(exist_ok=True)
    known = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    FOUND.write_text(json.dumps({**known, name: what}, indent=1))


@pytest.mark.parametrize("name", [*CHEAP, *SAMPLE])
def test_a_kind_of_damage_is_caught(laboratory: Laboratory, name: str) -> None:
    assert_caught(laboratory, BY_NAME[name], random.Random(SEED))


@pytest.mark.soak
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_of_damage_is_caught(laboratory: Laboratory, kind: Kind, seed: int) -> None:
    assert_caught(laboratory, kind, random.Random(f"{kind.name}:{seed}"))


def test_an_undamaged_repository_is_never_accused(laboratory: Laboratory) -> None:
    for _ in range(2):
        result = laboratory.verifier().verify()
        assert result.is_good, result.as_text()
        assert {backup.state for backup in result.backups} == {"good"}
        assert all(backup.reaches_end for backup in result.backups)
        assert result.notes == ()
