"""Erasure that survives a restore: a restore to before it, and the user is still gone, and everybody else identical."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from memharbor.backup.erasure import user_digest
from tests.e2e.conftest import ROOT, Stack
from tests.e2e.test_rollback import connect, fingerprints, insert, of, without

pytestmark = pytest.mark.timeout(1800)

USER, OTHER = "erase-canary-4711", "erase-other"


@pytest.fixture(scope="module", autouse=True)
def memories(stack: Stack) -> Iterator[None]:
    with connect(stack) as connection:
        for user in (USER, OTHER):
            insert(connection, user, 50)
    stack.memharbor("backup", "create")
    yield
    with connect(stack) as connection:
        connection.execute("delete from memharbor.memories where user_id in (%s, %s)", (USER, OTHER))
        connection.execute("delete from memharbor.memory_history where user_id in (%s, %s)", (USER, OTHER))


def name_point(stack: Stack, name: str) -> None:
    with connect(stack) as connection:
        connection.execute("select pg_create_restore_point(%s)", (name,))


def test_01_a_dry_run_counts_and_erases_nothing(stack: Stack) -> None:
    before = fingerprints(stack)
    said = stack.json("user", "erase", USER, "--reason", "request 4711", "--dry-run")
    assert said["counts"] == {"memories": 50, "memory_history": 50}
    assert fingerprints(stack) == before


def test_02_after_a_restore_to_before_the_erasure_the_user_is_still_gone(stack: Stack) -> None:
    name_point(stack, "before-the-erasure")
    before = fingerprints(stack)
    report = stack.json("user", "erase", USER, "--reason", "request 4711", "--yes")
    assert report["counts"] == {"memories": 50, "memory_history": 50}
    assert without(USER, fingerprints(stack)) == without(USER, before) == fingerprints(stack)

    stack.memharbor("restore", "--name", "before-the-erasure", "--yes")

    after = fingerprints(stack)
    assert of(USER, after) == {}
    assert after == without(USER, before)
    with connect(stack) as connection:
        found = connection.execute("select id::text, user_id_sha256 from memharbor.erase_ledger").fetchall()
        row = connection.execute("select count(*) from memharbor.memory_history where old_value::text ~ %s", (USER,))
        assert row.fetchone() == (0,)
    assert (report["id"], user_digest(USER)) in found


def test_03_a_second_erasure_says_when_it_was_done(stack: Stack) -> None:
    report = stack.json("user", "erase", USER, "--reason", "request 4711", "--yes")
    assert (report["already_erased"], report["erased_now"]) == (True, {})


def test_04_the_certificate_verifies_with_openssl_and_names_nobody(stack: Stack) -> None:
    written = (ROOT / ".memharbor" / stack.name / "erasures").glob("*.certificate.json")
    (certificate,) = (each for each in written if json.loads(each.read_text())["user_sha256"] == user_digest(USER))
    assert USER not in certificate.read_text()
    assert verify(stack, certificate, certificate) == 0
    forged = certificate.with_suffix(".forged")
    forged.write_text(certificate.read_text().replace('"total": 100', '"total": 1'))
    try:
        assert forged.read_text() != certificate.read_text()
        assert verify(stack, certificate, forged) != 0
    finally:
        forged.unlink()


def verify(stack: Stack, certificate: Path, content: Path) -> int:
    command = ["openssl", "smime", "-verify", "-binary", "-purpose", "any", "-no_check_time", "-inform", "PEM"]
    files = ["-in", str(certificate.with_suffix(".p7s")), "-content", str(content)]
    authority = ["-CAfile", str(ROOT / ".memharbor" / stack.name / "ca.crt")]
    return subprocess.run([*command, *files, *authority], capture_output=True, check=False).returncode


def test_05_who_comes_back_is_not_erased_by_a_later_restore(stack: Stack) -> None:
    with connect(stack) as connection:
        insert(connection, USER, 3)
    name_point(stack, "came-back")
    before = fingerprints(stack)
    with connect(stack) as connection:
        connection.execute("delete from memharbor.memories where user_id = %s", (OTHER,))
    stack.memharbor("restore", "--name", "came-back", "--yes")
    assert fingerprints(stack) == before
    assert of(USER, before)
