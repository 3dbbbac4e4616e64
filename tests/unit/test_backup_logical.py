"""The files and the manifest of logical backups, where they are kept, and how times and keys are read; no database."""

from __future__ import annotations

import hashlib
import io
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyrage
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memharbor.backup.chain import open_chain, parse_time
from memharbor.backup.destinations import Bucket, Folder, find_backup, find_destination
from memharbor.backup.logical_files import Keys, check_files, load, pour, read_keys, write_file, write_sums, write_text
from memharbor.backup.logical_format import (
    MANIFEST,
    READ_SCRIPT,
    SUMS,
    Column,
    Manifest,
    Parent,
    Selection,
    StoredFile,
    StoredTable,
    parse_manifest,
)
from memharbor.backup.rows import Fingerprint
from memharbor.backup.selection import Choice, Table, TableColumn
from memharbor.errors import ConfigError, MemharborError, SourceDataError, StateRefusedError, UsageError

IDENTITY = pyrage.x25519.Identity.generate()
OPEN, SEALED = Keys(), Keys((IDENTITY.to_public(),), (IDENTITY,))
FILE = StoredFile("org_members.copy.zst", 2, 10, "ab")
MANIFESTED = Manifest(
    id="memharbor-x-20260101T000000000000Z",
    database='we"ird',
    taken_at=datetime(2026, 1, 1, 12, tzinfo=UTC),
    versions={"memharbor": "1", "postgresql": "18", "pgvector": "0.8"},
    selection=Selection("ab" * 32, datetime(2025, 1, 1, tzinfo=UTC), None),
    tables=(StoredTable("org_members", ("org_id", "user_id"), (Column("org_id", "text"),), FILE, FILE, None),),
    fingerprints=(Fingerprint("ab" * 32, "org_members", 2, "cd"), Fingerprint("", "configs", 1, "ef")),
    parent=Parent("other", "12"),
    encrypted=True,
    mem0_history=FILE,
)


# --- files ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(content=st.lists(st.binary(max_size=5000), max_size=20), keys=st.sampled_from([OPEN, SEALED]))
def test_what_is_written_is_read_back(
    content: list[bytes], keys: Keys, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("backup")
    stored = write_file(folder, "x.copy", iter(content), keys)
    path = folder / stored.name
    assert (stored.size_bytes, stored.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert path.name == ("x.copy.zst.age" if keys is SEALED else "x.copy.zst")
    read = io.BytesIO()
    pour(folder, stored, read, keys)
    assert read.getvalue() == b"".join(content)


@pytest.mark.parametrize("keys", [OPEN, SEALED], ids=["plain", "sealed"])
@pytest.mark.parametrize("where", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_damage_is_an_error_and_never_other_content(keys: Keys, where: float, tmp_path: Path) -> None:
    content = b"".join(hashlib.sha256(bytes([number % 256, number // 256])).digest() for number in range(3000))
    stored = write_file(tmp_path, "x.copy", [content], keys)
    path = tmp_path / stored.name
    good = path.read_bytes()
    place = min(int(len(good) * where), len(good) - 1)
    for bad in (good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :], good[:place]):
        path.write_bytes(bad)
        with pytest.raises(MemharborError) as caught:
            pour(tmp_path, stored, io.BytesIO(), keys)
        # A damaged key slot of age cannot be told from a wrong key; the sum, which is compared first, can.
        assert caught.value.exit_code in (3, 7)


def test_the_error_of_a_source_and_of_a_sink_comes_through_the_encryption(tmp_path: Path) -> None:
    def failing() -> object:
        yield b"x" * 100_000
        raise StateRefusedError("the source broke")

    class Full:
        def write(self, data: bytes) -> None:
            raise StateRefusedError("the sink broke")

    for keys in (OPEN, SEALED):
        with pytest.raises(StateRefusedError, match="the source broke"):
            write_file(tmp_path, f"broken{len(keys.recipients)}", failing(), keys)  # type: ignore[arg-type]
        stored = write_file(tmp_path, f"good{len(keys.recipients)}", [b"x" * 100_000], keys)
        with pytest.raises(StateRefusedError, match="the sink broke"):
            pour(tmp_path, stored, Full(), keys)


def test_keys_are_read_as_age_reads_them(tmp_path: Path) -> None:
    public, secret = tmp_path / "public.txt", tmp_path / "secret.txt"
    public.write_text(f"# ours\n\n{IDENTITY.to_public()}\n")
    secret.write_text(f"# created\n{IDENTITY}\n")
    keys = read_keys(recipients_file=public, identity_file=secret)
    stored = write_file(tmp_path, "x", [b"content"], keys)
    read = io.BytesIO()
    pour(tmp_path, stored, read, keys)
    assert read.getvalue() == b"content"
    assert "AGE-SECRET" not in repr(keys)
    secret.write_text("AGE-SECRET-KEY-1BROKEN\n")
    with pytest.raises(ConfigError) as caught:
        read_keys(identity_file=secret)
    assert "BROKEN" not in caught.value.message
    public.write_text("# nobody\n")
    for options in ({"recipients_file": public}, {"recipients_file": tmp_path / "absent"}, {"recipients": ["age1x"]}):
        with pytest.raises(ConfigError):
            read_keys(**options)  # type: ignore[arg-type]


# --- the manifest -----------------------------------------------------------------------------------------------------


def test_a_manifest_is_read_back() -> None:
    assert parse_manifest(MANIFESTED.as_text()) == MANIFESTED
    assert MANIFESTED.counts == {"org_members": 2, "configs": 1}
    assert MANIFESTED.user_count == 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 1}', MANIFESTED.as_text().replace('"org_members.copy.zst"', '"../x"'), "null", "1"],
)
def test_what_is_no_manifest_is_damaged_data(text: str) -> None:
    with pytest.raises(SourceDataError):
        parse_manifest(text)


def test_a_newer_format_is_said() -> None:
    with pytest.raises(SourceDataError, match="format 2"):
        parse_manifest(MANIFESTED.as_text().replace('"format": 1', '"format": 2'))


# --- where they are kept ----------------------------------------------------------------------------------------------


def write_backup(destination: Folder, name: str, parent: Parent | None = None) -> str:
    with destination.create(name) as folder:
        stored = write_file(folder, "org_members.copy", [name.encode()], OPEN)
        table = StoredTable("org_members", ("org_id",), (Column("org_id", "text"),), stored)
        manifest = replace(MANIFESTED, id=name, tables=(table,), mem0_history=None, parent=parent)
        write_text(folder, READ_SCRIPT, "select 1;\n")
        write_text(folder, MANIFEST, manifest.as_text())
        write_sums(folder, manifest)
    return load(destination.path / name)[1]


def test_a_folder_lists_what_is_complete(tmp_path: Path) -> None:
    kept = Folder(tmp_path / "a" / "b")
    assert kept.list_backups() == []
    write_backup(kept, "memharbor-x-2")
    write_backup(kept, "memharbor-x-1")
    (kept.path / "memharbor-x-3").mkdir()
    (kept.path / "notes.txt").write_text("")
    assert kept.list_backups() == ["memharbor-x-1", "memharbor-x-2"]


def test_what_fails_leaves_nothing_and_what_others_write_is_left_alone(tmp_path: Path) -> None:
    kept = Folder(tmp_path)
    killed = tmp_path / "memharbor-x-1.partial"
    killed.mkdir()
    (killed / "memories.copy.zst").write_text("half")
    with kept.create("memharbor-x-2") as folder:
        assert not killed.exists()
        with suppress(StateRefusedError), kept.create("memharbor-x-3"):
            assert folder.exists(), "a backup that is being written was taken for a leftover"
            raise StateRefusedError("broken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memharbor-x-2"]


def test_a_backup_is_found_by_its_place() -> None:
    folder, name = find_backup("/x/y/memharbor-x-1/")
    assert (folder.spell(name), name) == ("/x/y/memharbor-x-1", "memharbor-x-1")
    bucket, name = find_backup("s3://b/p/q/memharbor-x-1/")
    assert (bucket, name) == (Bucket("b", "p/q"), "memharbor-x-1")
    assert bucket.spell(name) == "s3://b/p/q/memharbor-x-1"
    assert find_backup("s3://b/memharbor-x-1")[0] == find_destination("s3://b/") == Bucket("b", "")
    for place in ("s3://", "gs://b/x", "s3:///x"):
        with pytest.raises(UsageError):
            find_destination(place)


def test_a_chain_is_whole_or_refused(tmp_path: Path) -> None:
    kept = Folder(tmp_path)
    first = write_backup(kept, "memharbor-x-1")
    second = write_backup(kept, "memharbor-x-2", Parent("memharbor-x-1", first))
    write_backup(kept, "memharbor-x-3", Parent("memharbor-x-2", second))
    write_backup(kept, "memharbor-x-4", Parent("memharbor-x-2", first))
    write_backup(kept, "memharbor-x-5", Parent("memharbor-x-0", first))
    with ExitStack() as stack:
        chain = open_chain(kept, "memharbor-x-3", stack)
        assert [link.manifest.id[-1] for link in chain] == ["1", "2", "3"]
        for name, said in (("memharbor-x-4", "another"), ("memharbor-x-5", "not beside it")):
            with pytest.raises(StateRefusedError, match=said):
                open_chain(kept, name, stack)
        (tmp_path / "memharbor-x-2" / "org_members.copy.zst").write_bytes(b"")
        with pytest.raises(SourceDataError, match="is damaged"):
            open_chain(kept, "memharbor-x-3", stack)


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    kept = Folder(tmp_path)
    write_backup(kept, "memharbor-x-1")
    folder = tmp_path / "memharbor-x-1"
    manifest, _ = load(folder)
    check_files(folder, manifest)
    (folder / "org_members.copy.zst").unlink()
    with pytest.raises(SourceDataError, match="is missing"):
        check_files(folder, manifest)
    for name in (READ_SCRIPT, MANIFEST, SUMS):
        (folder / name).unlink()
        with pytest.raises(SourceDataError, match=f"it has no {name}"):
            load(folder)


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "now", "2025-13-01", "2025-01-01T00:00:00", "20250101T00"])
def test_what_is_no_instant_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_time("--from", text)


def test_a_hostile_user_stays_inside_its_quotes() -> None:
    columns = (TableColumn("id", "uuid"), TableColumn("user_id", "text"), TableColumn('we"ird', "text"))
    table = Table("memories", ("id",), columns, "user_id")
    query = Choice("o'brien\\'; drop table x; --").query(table)
    assert query.endswith("t.user_id =  E'o''brien\\\\''; drop table x; --'")
    assert '"we""ird"' in query


def test_a_digest_leaves_out_what_the_database_numbers_and_takes_the_bits_of_embeddings() -> None:
    columns = (
        TableColumn("id", "bigint"),
        TableColumn("v", "vector(3)", '"public".vector_send'),
        TableColumn("a", "text"),
    )
    table = Table("memory_history", ("id",), columns, "user_id", identity="id")
    assert table.digest_of("s") == (
        'sha256(convert_to(row(s."a")::text, \'UTF8\') || coalesce("public".vector_send(s."v"), \'\'))'
    )
