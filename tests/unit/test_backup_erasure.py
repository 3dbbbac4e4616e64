"""Erasures without a database: records, reasons, the statement, certificates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memharbor.backup import certificate
from memharbor.backup.certificate import Signer
from memharbor.backup.erase_user import FolderRecords, describe_remains
from memharbor.backup.erasure import (
    Erasure,
    erase_statement,
    find_erasure,
    new_erasure,
    pending_erasures,
    replay_erasures,
    user_digest,
)
from memharbor.backup.tables import USER_TABLES
from memharbor.errors import SourceDataError, UsageError, VerificationError
from memharbor.schema.statements import split_statements

NOW = datetime(2026, 1, 2, tzinfo=UTC)
TEXT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1)


class FakeRows:
    """A restored database whose ledger knows some erasures, and in which erased users have so many rows left."""

    def __init__(self, known: set[str], *, left: int = 0, has_schema: bool = True, takes: bool = True) -> None:
        self.known, self.left, self.has_schema, self.takes = known, left, has_schema, takes
        self.statements: list[str] = []

    def query(self, statement: str) -> list[tuple[str | None, ...]]:
        if "to_regclass" in statement and "do $erase$" not in statement:
            return [("t" if self.has_schema else "f",)]
        if "select id from memharbor.erase_ledger" in statement:
            return [(each,) for each in self.known]
        if "coalesce(sum(" in statement:
            return [(str(self.left),)]
        self.statements.append(statement)
        if self.takes:
            self.known |= {each for each in self.pending if each in statement}
        return []

    pending: frozenset[str] = frozenset()

    def copy_out(self, statement: str) -> Iterator[bytes]:
        raise NotImplementedError


def request(user: str = "alice", **changes: Any) -> Erasure:
    return new_erasure(user, reason="request 1", requested_by="operator", now=NOW, **changes)


def test_a_record_says_who_only_by_a_digest_and_reads_back() -> None:
    erasure = request()
    record = erasure.as_record()
    assert record["state"] == "requested"
    assert "alice" not in json.dumps(record)
    assert record["user_sha256"] == user_digest("alice")
    assert Erasure.from_record(json.loads(json.dumps(record))) == erasure
    done = Erasure.from_record({**record, "erased_at": NOW.isoformat(), "counts": {"memories": 2}})
    assert done.as_record()["state"] == "erased"


@pytest.mark.parametrize(
    ("user", "reason"), [("alice", "Alice asked"), ("", "asked"), ("alice", " "), ("alice", "x" * 401)]
)
def test_a_reason_that_cannot_be_kept_is_refused(user: str, reason: str) -> None:
    with pytest.raises(UsageError):
        new_erasure(user, reason=reason)


def test_the_requester_is_not_the_erased_user_by_name() -> None:
    with pytest.raises(UsageError, match="--requested-by"):
        new_erasure("alice", reason="asked", requested_by="alice")


@given(st.lists(TEXT.filter(str.strip), min_size=1, max_size=5))
def test_the_statement_is_one_whatever_the_reasons_say(reasons: list[str]) -> None:
    erasures = [
        new_erasure("\x01nobody", reason=reason[:400], requested_by="x") for reason in reasons if reason[:400].strip()
    ]
    assert len(split_statements(erase_statement(erasures, drop_indexes=True))) == 1


def test_a_reason_does_not_end_the_statement() -> None:
    hostile = new_erasure("nobody", reason="$erase$; drop table x; do $erase$ '", requested_by="o'brien\\")
    assert len(split_statements(erase_statement([hostile], drop_indexes=True))) == 1
    assert erase_statement([hostile], drop_indexes=True).count("$erase$") == 2


def test_the_statement_covers_every_table_of_users() -> None:
    statement = erase_statement([request()], drop_indexes=False)
    assert all(f"'{table.name}'" in statement for table in USER_TABLES)
    assert "drop index" not in statement
    assert "drop index" in erase_statement([request()], drop_indexes=True)


def test_the_newest_erasure_of_a_user_is_found(tmp_path: Path) -> None:
    records = FolderRecords(tmp_path)
    assert find_erasure(records, "alice") is None
    for day, user in ((3, "alice"), (5, "bob"), (4, "alice")):
        erasure = new_erasure(user, reason="asked", requested_by="x", now=datetime(2026, 1, day, tzinfo=UTC))
        records.put(f"erasures/{erasure.id}.json", erasure.as_record())
    found = find_erasure(records, "alice")
    assert found is not None
    assert found["requested_at"].startswith("2026-01-04")


def test_only_what_the_ledger_does_not_have_is_replayed() -> None:
    known, new = request("alice"), request("bob")
    rows = FakeRows({known.id})
    rows.pending = frozenset({known.id, new.id})
    replayed = replay_erasures([known.as_record(), new.as_record()], rows)
    assert [record["id"] for record in replayed] == [new.id]
    assert len(rows.statements) == 1
    assert known.id not in rows.statements[0]


def test_many_erasures_go_in_pieces() -> None:
    erasures = [request(f"user{number}") for number in range(250)]
    rows = FakeRows(set())
    rows.pending = frozenset(each.id for each in erasures)
    assert len(replay_erasures([each.as_record() for each in erasures], rows)) == 250
    assert len(rows.statements) == 5
    assert all(len(statement.encode()) < 128 * 1024 for statement in rows.statements)


def test_a_statement_of_the_longest_reasons_is_one_argument() -> None:
    erasures = [new_erasure("nobody", reason="🐘" * 400, requested_by="operator") for _ in range(50)]
    assert len(erase_statement(erasures, drop_indexes=True).encode()) < 128 * 1024


@pytest.mark.parametrize("rows", [FakeRows(set(), left=3), FakeRows(set(), takes=False)])
def test_a_replay_that_leaves_rows_is_no_success(rows: FakeRows) -> None:
    erasure = request()
    rows.pending = frozenset({erasure.id})
    with pytest.raises(VerificationError):
        replay_erasures([erasure.as_record()], rows)


def test_a_database_without_the_schema_has_nobody_to_erase() -> None:
    assert pending_erasures([request().as_record()], FakeRows(set(), has_schema=False)) == []


def test_a_folder_keeps_records_apart_from_certificates_and_names_a_damaged_one(tmp_path: Path) -> None:
    records, erasure = FolderRecords(tmp_path), request()
    records.put(f"erasures/{erasure.id}.json", erasure.as_record())
    certificate.write(tmp_path, described(erasure), None)
    assert list(records.get_all("erasures")) == [f"erasures/{erasure.id}.json"]
    (tmp_path / "damaged.json").write_text("{")
    with pytest.raises(SourceDataError, match=r"damaged\.json"):
        records.get_all("erasures")


def described(erasure: Erasure) -> dict[str, Any]:
    return certificate.describe(
        erasure, database="memharbor", stack="dev", system_identifier="1", rewritten=False, remains="nowhere"
    )


def test_a_certificate_that_was_handed_out_is_kept(tmp_path: Path) -> None:
    erasure = request()
    first = certificate.write(tmp_path, described(erasure), None)
    text = first.certificate.read_bytes()
    assert certificate.write(tmp_path, described(erasure), None).certificate.read_bytes() == text
    rewritten = {**described(erasure), "files_rewritten": True}
    assert json.loads(certificate.write(tmp_path, rewritten, None).certificate.read_text())["files_rewritten"] is True
    assert certificate.write(tmp_path, described(erasure), None).certificate.read_bytes() != text
    assert first.signature is None
    assert first.certificate.stat().st_mode & 0o077 == 0
    assert "alice" not in text.decode()


def test_a_signers_key_is_never_shown() -> None:
    assert "secret" not in repr(Signer("certificate", "secret"))


def test_what_remains_is_said_for_each_kind_of_place() -> None:
    assert "data files" in describe_remains(rewritten=False, has_store=True)
    assert "data files" not in describe_remains(rewritten=True, has_store=True)
    assert "provider" in describe_remains(rewritten=True, has_store=False)
