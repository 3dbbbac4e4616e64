"""`backup verify` beside what is no damage: a backup that runs, WAL on its way, a server or a store that is down."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from memharbor.backup.verify_report import Verification
from memharbor.commands import main
from memharbor.errors import ExternalToolError, StateRefusedError
from memharbor.server_files.postgres import STANZA
from tests.corruption import NAMES_EXCHANGED, SEGMENTS, Laboratory

ROWS = "select count(*) || ' ' || md5(string_agg(md5(t::text), '' order by id)) from t"
# Restores to the end of the archive beside the server and says which rows came.
RESTORED_ROWS = """
set -eu
export PGDATA=/var/lib/postgresql/restored
trap 'pg_ctl --wait --silent --mode=immediate stop >/dev/null 2>&1 || true; rm -rf "$PGDATA"' EXIT
mkdir -m 0700 "$PGDATA"
pgbackrest --stanza=main --pg1-path="$PGDATA" --archive-mode=off restore >/dev/null
pg_ctl --wait --silent --log="$PGDATA/log" start -o "-p 5498 -c listen_addresses='' -c shared_buffers=16MB \\
  -c unix_socket_directories=/run/postgresql"
until [ "$(psql -XqAt -p 5498 -d postgres -c 'select pg_is_in_recovery()')" = f ]; do sleep 0.2; done
psql -XqAt -p 5498 -d postgres -c "$1"
"""


def backups_of(laboratory: Laboratory) -> list[str]:
    return [backup.id for backup in laboratory.backups.list_backups()]


def assert_good(result: Verification) -> None:
    assert result.is_good, result.as_text()


@contextmanager
def beside(work: object) -> Iterator[None]:
    """Run something in a thread until the block ends, and let its failure be seen."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as exc:  # noqa: BLE001 - handed on below
            failed.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert not failed, failed[0]


def test_a_backup_that_runs_is_not_accused(laboratory: Laboratory) -> None:
    with laboratory.changing():
        laboratory.change()
        with beside(lambda: laboratory.backup("incr")):
            assert_good(laboratory.verifier().verify())
        assert_good(laboratory.verifier().verify())


@pytest.mark.soak
def test_neither_backups_nor_expiry_nor_annotations_are_accused(laboratory: Laboratory) -> None:
    ended = threading.Event()

    def work() -> None:
        for kind in ("full", "incr", "full", "diff"):
            laboratory.backup(kind)
            laboratory.pgbackrest(f"--set={backups_of(laboratory)[-1]}", "--annotation=memharbor-test=1", "annotate")
        ended.set()

    with laboratory.changing(), beside(work):
        while not ended.is_set():
            assert_good(laboratory.verifier().verify())


def test_wal_that_is_on_its_way_is_not_accused(laboratory: Laboratory) -> None:
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            laboratory.insert(20)
            laboratory.sql("select pg_switch_wal()")

    with laboratory.changing(), beside(write):
        try:
            assert_good(laboratory.verifier().verify())
        finally:
            ended.set()


def test_a_backup_that_was_killed_is_not_accused(laboratory: Laboratory) -> None:
    with laboratory.changing():
        command = f"pgbackrest --stanza={STANZA} --type=full backup & sleep 1; kill -9 $!; wait"
        laboratory.postgres.exec_run(["sh", "-c", command])
        result = laboratory.verifier().verify()
        assert_good(result)
        laboratory.backup("incr")
        assert_good(laboratory.verifier().verify())


def test_one_backup_is_judged_by_what_it_needs(laboratory: Laboratory) -> None:
    known = laboratory.backups.list_backups()
    diff, first = next((each.id, each.references[0]) for each in known if len(each.references) == 1)
    other = next(each.id for each in known if not {diff, first} & {each.id, *each.references})
    try:
        file = laboratory.files(f"backup/{STANZA}/{first}/bundle/1")[0]
        laboratory.shell('truncate -s 1000 "$1"', file)
        assert_good(laboratory.verifier().verify(other))
        (finding,) = laboratory.verifier().verify(diff).findings
        assert finding.unusable == (first, diff)
        assert "too short" in finding.what
    finally:
        laboratory.heal()
    result = laboratory.verifier().verify(diff)
    assert_good(result)
    assert [backup.id for backup in result.backups] == [first, diff]


def test_a_backup_that_does_not_exist_is_refused(laboratory: Laboratory) -> None:
    with pytest.raises(StateRefusedError, match="no backup `nothing`"):
        laboratory.verifier().verify("nothing")


def test_a_store_that_is_down_is_an_error_and_no_damage(laboratory: Laboratory) -> None:
    laboratory.store.stop()
    try:
        with pytest.raises(ExternalToolError):
            laboratory.verifier().verify()
    finally:
        laboratory.start_store()


def test_a_server_that_is_down_is_said_and_a_missing_segment_still_found(laboratory: Laboratory) -> None:
    laboratory.postgres.stop()
    laboratory.copy()  # with the last segment, which a server that ends archives
    try:
        result = laboratory.verifier().verify(backups_of(laboratory)[0])
        assert_good(result)
        laboratory.shell(f'rm "$(ls {SEGMENTS} | tail -1)"')
        result = laboratory.verifier().verify()
        assert {finding.kind for finding in result.findings} == {"wal-missing"}
        assert any("does not answer" in note for note in result.notes)
    finally:
        laboratory.heal()
        laboratory.start_server()


def test_the_command_exits_with_10_and_names_the_next_one(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("memharbor.operations.backup_engine", lambda stack: laboratory.backups)
    laboratory.shell("rm -r backup archive")
    try:
        with pytest.raises(SystemExit) as ended:
            main(["backup", "verify", "--output", "json"])
        assert ended.value.code == 10
        data = json.loads(capsys.readouterr().out)
        assert data["good"] is False
        assert [finding["kind"] for finding in data["findings"]] == ["empty"]
        with pytest.raises(SystemExit) as ended:
            main(["backup", "verify"])
        assert ended.value.code == 10
        assert "next: run `memharbor backup undelete" in capsys.readouterr().out
    finally:
        laboratory.heal()


@pytest.mark.soak
def test_what_only_a_restore_sees(laboratory: Laboratory) -> None:
    """Two segments with each other's names, checksums and all: each is intact, and replay ends before the first."""
    with laboratory.changing():
        for _ in range(3):
            laboratory.insert(10)
            laboratory.switch_wal()
    live = laboratory.sql(ROWS)
    assert laboratory.run(["sh", "-c", RESTORED_ROWS, "restored", ROWS]) == live
    with laboratory.damaged(NAMES_EXCHANGED, random.Random(1)):
        assert_good(laboratory.verifier().verify())
        # Replay ends early: with fewer rows, or before the backup is consistent and then not at all.
        done = laboratory.postgres.exec_run(["sh", "-c", RESTORED_ROWS, "restored", ROWS])
        assert (done.exit_code, done.output.decode()) != (0, live)
