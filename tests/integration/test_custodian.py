"""The custodian against two real stores: purge, undelete after a theft, a copy kept in step, and the way back."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import docker
import pytest

from memharbor.errors import ConfigError
from memharbor.server_files.postgres import STORE_BUCKET, STORE_PORT
from memharbor_custodian.copying import Keys, OffsiteCopy
from memharbor_custodian.errors import CustodianError, RefusedError, UnreachableError
from memharbor_custodian.keeping import is_info, purge, undelete
from memharbor_custodian.places import PART_BYTES, Place, connect
from memharbor_custodian.versions import group
from tests.containers import ThrowAway, find_engine_problem, throw_away

STACK = "copied"
REPOSITORY = f"pgbackrest/{STACK}/"
INFO = f"{REPOSITORY}backup/main/backup.info"
KEEP = timedelta(days=30)
# Small, so that what spans two pages of a list is tested with few objects.
PAGE = 7


class Site:
    """One store of its own, with a client for each of its keys."""

    def __init__(self, run: ThrowAway, folder: Path) -> None:
        self.run, self.container = run, run.backup_store()
        self._ca_file = folder / f"{run.name}.crt"
        self._ca_file.write_text(run.secrets.authority.certificate)
        self.find()

    def find(self) -> None:
        """Look up the port: the engine gives another one at each start, and sometimes when a network is joined or left."""
        self.custodian, self.backup_key = self.place("custodian"), self.place("pgbackrest")

    def place(self, key: str, folder: str = "", *, secret: str = "") -> Place:
        secret = secret or self.run.secrets.store_secrets[key]
        client = connect(self.run.store_url(self.container), "us-east-1", (key, secret), str(self._ca_file))
        return Place("backup store", client, STORE_BUCKET, folder, page_size=PAGE)

    def restart(self) -> None:
        self.container.start()
        self.run.wait(self.container)
        self.find()

    def empty(self) -> None:
        self.custodian.delete_entries(self.custodian.entries())


def unavailable(problem: str) -> None:
    """Skip, or fail where everything must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(problem)
    pytest.skip(problem)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Site]]:
    problem = find_engine_problem()
    if problem:
        unavailable(f"no Docker engine answers: {problem}")
    folder = tmp_path_factory.mktemp("sites")
    with ExitStack() as stack:
        engine = stack.enter_context(closing(docker.from_env(timeout=120)))
        runs = [stack.enter_context(throw_away(engine)) for _ in range(2)]
        try:
            started = Site(runs[0], folder), Site(runs[1], folder)
        except ConfigError as exc:
            unavailable(f"{exc.message}: {exc.hints[0]}")
        yield started


@pytest.fixture
def first(sites: tuple[Site, Site]) -> Site:
    sites[0].empty()
    return sites[0]


@pytest.fixture
def second(sites: tuple[Site, Site]) -> Site:
    sites[1].empty()
    return sites[1]


@pytest.fixture
def copy(first: Site, second: Site) -> OffsiteCopy:
    return OffsiteCopy(first.custodian, second.place("custodian", f"{STACK}/"), STACK)


def now() -> datetime:
    return datetime.now(UTC)


def contents(place: Place) -> dict[str, bytes]:
    return {key: place.read(key) or b"" for key in place.objects()}


def fill(place: Place, label: str = "A") -> dict[str, bytes]:
    """Write what a backup and some WAL would be: files first, the lists last, twice as pgBackRest does."""
    files = {f"{REPOSITORY}backup/main/{label}/bundle/{number}": os.urandom(100) for number in range(6)}
    files |= {f"{REPOSITORY}backup/main/{label}/empty": b"", f"{REPOSITORY}backup/main/{label}/backup.manifest": b"m"}
    files |= {f"{REPOSITORY}archive/main/18-1/{label}{number:04d}": os.urandom(50) for number in range(6)}
    lists = {
        name: f"list of {label}".encode() for name in (INFO, f"{INFO}.copy", f"{REPOSITORY}archive/main/archive.info")
    }
    records = {f"memharbor/{STACK}/manifests/{label}.json": b"{}"}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(place.write, (files | records).keys(), (files | records).values()))
    for key, content in lists.items():
        place.write(key, content)
    return files | records | lists


def silent(done: int, of: int, size_bytes: int) -> None:
    pass


def bring_in_step(copy: OffsiteCopy, **options: Any) -> dict[str, Any]:
    return copy.copy(now=now(), on_progress=silent, **options)


def test_every_entry_is_listed_once_however_the_pages_fall(first: Site) -> None:
    keys = [f"k/{number:02d}" for number in range(15)]
    for content in (b"1", b"2"):
        for key in keys:
            first.backup_key.write(key, content)
    first.backup_key.delete(keys)
    entries = first.custodian.entries()
    assert len(entries) == 45
    history = group(entries)
    assert [[entry.is_marker for entry in history[key]] for key in keys] == [[True, False, False]] * 15


def test_a_theft_is_undone_to_the_last_byte(first: Site) -> None:
    before = fill(first.backup_key)
    entries = first.custodian.entries()
    # Everything that the stolen key can do: delete, overwrite, and try to delete every version.
    half = sorted(before)[::2]
    for key in half:
        first.backup_key.write(key, b"ransom")
    moment = max(entry.made_at for entry in entries) + timedelta(milliseconds=1)
    first.backup_key.delete(before)
    assert contents(first.custodian) == {}
    denied = 0
    for entry in first.custodian.entries():
        with pytest.raises(CustodianError, match="AccessDenied"):
            first.backup_key.delete_entries([entry])
        denied += 1
    assert denied == len(before) * 2 + len(half)

    planned = undelete(first.custodian, now=now(), keep=KEEP, at=moment, dry_run=True)
    assert contents(first.custodian) == {}
    done = undelete(first.custodian, now=now(), keep=KEEP, at=moment)
    assert planned == done
    assert (done["brought_back"], done["copies"]) == (len(before), len(half))
    assert contents(first.custodian) == before


def test_undelete_alone_brings_back_what_was_deleted_last(first: Site) -> None:
    before = fill(first.backup_key)
    first.backup_key.delete(before)
    first.backup_key.delete(list(before)[:3])  # once more: two markers
    assert undelete(first.custodian, now=now(), keep=KEEP)["brought_back"] == len(before)
    assert contents(first.custodian) == before
    assert undelete(first.custodian, now=now(), keep=KEEP)["brought_back"] == 0


def test_a_large_object_comes_back_whole(first: Site) -> None:
    large = os.urandom(PART_BYTES * 2 + 5)
    first.backup_key.write("large", large)
    moment = first.custodian.entries()[0].made_at
    time.sleep(0.01)
    first.backup_key.write("large", b"small")
    undelete(first.custodian, now=now(), keep=KEEP, at=moment)
    assert b"".join(part for part, _, _ in first.custodian.parts("large")) == large


@pytest.mark.parametrize("moment", [timedelta(days=31), timedelta(days=-1)])
def test_a_moment_beyond_the_promise_is_refused(first: Site, moment: timedelta) -> None:
    with pytest.raises(RefusedError):
        undelete(first.custodian, now=now(), keep=KEEP, at=now() - moment)


def test_a_purge_deletes_what_is_old_and_nothing_else(first: Site) -> None:
    before = fill(first.backup_key)
    gone, rewritten = sorted(key for key in before if not is_info(key))[:2]
    first.backup_key.write(rewritten, b"again")
    first.backup_key.delete([gone])
    left = contents(first.custodian)
    assert purge(first.custodian, None, now=now(), keep=KEEP)["versions"] == 0
    later = now() + timedelta(days=6)
    dry = purge(first.custodian, None, now=later, keep=timedelta(days=5), dry_run=True)
    assert (dry["versions"], dry["keys"]) == (2, 1)
    assert len(first.custodian.entries()) == len(before) + 2
    assert purge(first.custodian, None, now=later, keep=timedelta(days=5)) == dry
    assert contents(first.custodian) == left
    assert {entry.key for entry in first.custodian.entries()} == set(left)


def test_a_purge_by_the_real_clock(first: Site) -> None:
    fill(first.backup_key)
    first.backup_key.write("k", b"1")
    first.backup_key.write("k", b"2")
    time.sleep(1.5)
    first.backup_key.write("k", b"3")
    purge(first.custodian, None, now=now(), keep=timedelta(seconds=1))
    assert len([entry for entry in first.custodian.entries() if entry.key == "k"]) == 2


def test_nothing_is_purged_while_the_backups_are_deleted(first: Site) -> None:
    before = fill(first.backup_key)
    first.backup_key.delete(before)
    with pytest.raises(RefusedError, match="somebody deletes backups"):
        purge(first.custodian, None, now=now() + timedelta(days=6), keep=timedelta(days=5))
    assert len(first.custodian.entries()) == 2 * len(before)


def test_an_upload_that_was_killed_is_given_up(first: Site) -> None:
    client = first.backup_key._client
    upload = client.create_multipart_upload(Bucket=STORE_BUCKET, Key="killed")
    client.upload_part(Bucket=STORE_BUCKET, Key="killed", UploadId=upload["UploadId"], PartNumber=1, Body=b"x")
    fill(first.backup_key)
    assert purge(first.custodian, None, now=now(), keep=KEEP)["unfinished_uploads"] == 0
    assert purge(first.custodian, None, now=now() + timedelta(days=3), keep=KEEP)["unfinished_uploads"] == 1
    assert purge(first.custodian, None, now=now() + timedelta(days=3), keep=KEEP)["unfinished_uploads"] == 0


def own(files: dict[str, bytes]) -> dict[str, bytes]:
    """What the custodian itself keeps in a store is not of the backups."""
    return {key: content for key, content in files.items() if "/custodian/" not in key}


def test_the_copy_follows_and_keeps_what_is_deleted_until_it_is_purged(
    first: Site, second: Site, copy: OffsiteCopy
) -> None:
    files = fill(first.backup_key)
    large = os.urandom(PART_BYTES + 1)
    first.backup_key.write(f"{REPOSITORY}backup/main/A/large", large)
    report = bring_in_step(copy)
    place = second.place("custodian", f"{STACK}/")
    assert own(contents(place)) == files | {f"{REPOSITORY}backup/main/A/large": large}
    assert report["copied"] == len(files) + 2
    assert bring_in_step(copy)["copied"] == 0, "an upload in parts is another ETag, and the same object"

    files |= fill(first.backup_key, "B")
    expired = [key for key in files if "/A/" in key]
    first.backup_key.delete(expired)
    assert copy.waiting()["waiting_objects"] == 6 + 2 + 6 + 3 + 1
    bring_in_step(copy)
    assert set(own(contents(place))) == set(files) | {f"{REPOSITORY}backup/main/A/large"}
    assert copy.waiting()["only_in_copy"] == len(expired)
    later = now() + timedelta(days=6)
    purge(first.custodian, place, now=later, keep=timedelta(days=5))
    assert set(own(contents(place))) == set(files) - set(expired) | {f"{REPOSITORY}backup/main/A/large"}
    assert {entry.key for entry in first.custodian.entries()} & set(expired) == set()


def test_the_lists_arrive_last(first: Site, copy: OffsiteCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(first.backup_key)
    bring_in_step(copy)
    fill(first.backup_key, "B")

    def cut(self: Place, source: Place, key: str, **options: Any) -> tuple[str, str]:
        raise UnreachableError("the way is cut")

    monkeypatch.setattr(Place, "copy_from", cut)
    with pytest.raises(UnreachableError):
        bring_in_step(copy)
    assert copy._offsite.read(INFO) == b"list of A", "a list that names what is not there is worse than an old one"
    monkeypatch.undo()
    bring_in_step(copy)
    assert copy._offsite.read(INFO) == b"list of B"


def test_a_backup_that_ends_while_the_copy_runs_is_not_named_before_it_is_there(
    first: Site, copy: OffsiteCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(first.backup_key)
    original = Place.copy_from
    written: list[str] = []

    def meanwhile(self: Place, source: Place, key: str, **options: Any) -> tuple[str, str]:
        if not written:
            written.append(key)
            fill(first.backup_key, "B")
        return original(self, source, key, **options)

    monkeypatch.setattr(Place, "copy_from", meanwhile)
    bring_in_step(copy)
    assert copy._offsite.read(INFO) == b"list of A"
    assert not [key for key in copy._offsite.objects() if "/B/" in key]


@pytest.mark.parametrize("key", [f"{REPOSITORY}archive/main/18-1/A0003", INFO])
def test_a_damaged_object_does_not_replace_its_good_copy(first: Site, copy: OffsiteCopy, key: str) -> None:
    fill(first.backup_key)
    path = f"/data/buckets/{STORE_BUCKET}/{key}"
    done = first.container.exec_run(["sh", "-c", f"printf X | dd of={path} bs=1 seek=3 conv=notrunc"])
    assert done.exit_code == 0, done.output
    with pytest.raises(CustodianError, match=f"`{key}` is damaged in the backup store"):
        bring_in_step(copy)
    assert copy._offsite.read(key) is None


def test_a_damaged_copy_is_made_again(first: Site, second: Site, copy: OffsiteCopy) -> None:
    files = fill(first.backup_key)
    bring_in_step(copy)
    victim = sorted(files)[5]
    copy._offsite.write(victim, b"something else")
    copy._offsite.delete([sorted(files)[6]])
    assert bring_in_step(copy)["copied"] == 2
    assert own(contents(copy._offsite)) == files


@pytest.mark.parametrize("what", ["emptied", "new", "overwritten"])
def test_a_store_that_was_emptied_lost_or_encrypted_is_not_followed(first: Site, copy: OffsiteCopy, what: str) -> None:
    files = fill(first.backup_key) | fill(first.backup_key, "B")
    bring_in_step(copy)
    kept = contents(copy._offsite)
    if what == "emptied":
        first.backup_key.delete(files)
    elif what == "new":
        first.empty()
        fill(first.backup_key, "A")
    else:
        for key in files:
            first.backup_key.write(key, b"ransom")
    with pytest.raises(RefusedError) as caught:
        bring_in_step(copy)
    assert caught.value.hint
    assert contents(copy._offsite) == kept
    if what == "overwritten":
        bring_in_step(copy, accept_changes=True)
        assert copy._offsite.read(INFO) == b"ransom"


def test_a_purge_that_cannot_reach_the_copy_leaves_the_order_to_delete(first: Site, second: Site) -> None:
    files = fill(first.backup_key)
    place = second.place("custodian", f"{STACK}/")
    OffsiteCopy(first.custodian, place, STACK).copy(now=now(), on_progress=silent)
    key = sorted(key for key in files if not is_info(key))[0]
    first.backup_key.delete([key])
    later = now() + timedelta(days=6)
    stranger = second.place("custodian", f"{STACK}/", secret="wrong")
    with pytest.raises(CustodianError):
        purge(first.custodian, stranger, now=later, keep=timedelta(days=5))
    (left,) = [entry for entry in first.custodian.entries() if entry.key == key]
    assert left.is_marker
    purge(first.custodian, place, now=later, keep=timedelta(days=5))
    assert place.read(key) is None
    assert not [entry for entry in first.custodian.entries() if entry.key == key]


def test_a_purge_of_a_new_store_deletes_nothing_from_the_copy_of_the_old_one(first: Site, copy: OffsiteCopy) -> None:
    files = fill(first.backup_key)
    bring_in_step(copy)
    kept = contents(copy._offsite)
    first.empty()
    fill(first.backup_key)
    first.backup_key.delete([key for key in files if not is_info(key)])
    with pytest.raises(RefusedError, match="not the one that was copied"):
        purge(
            first.custodian,
            copy._offsite,
            now=now() + timedelta(days=6),
            keep=timedelta(days=5),
            check_copy=copy.check,
        )
    assert contents(copy._offsite) == kept


def test_a_lost_store_is_filled_from_its_copy(first: Site, copy: OffsiteCopy) -> None:
    files = fill(first.backup_key)
    large = os.urandom(PART_BYTES + 1)
    first.backup_key.write(f"{REPOSITORY}backup/main/A/large", large)
    bring_in_step(copy)
    identity = first.custodian.read(Keys(STACK).identity)
    first.empty()
    # What pgBackRest does by itself: an empty stanza with a key of its own, and segments that only this key reads.
    foreign = {INFO: b"another key", f"{REPOSITORY}archive/main/18-1/A0099": b"unreadable"}
    for key, content in foreign.items():
        first.backup_key.write(key, content)
    planned = copy.fetch(dry_run=True, on_progress=silent)
    assert own(contents(first.custodian)) == foreign
    done = copy.fetch(on_progress=silent)
    assert done == planned
    assert done["deleted"] == 1
    assert own(contents(first.custodian)) == files | {f"{REPOSITORY}backup/main/A/large": large}
    assert first.custodian.read(Keys(STACK).identity) == identity
    assert bring_in_step(copy)["copied"] == 0


def test_a_fetch_that_was_interrupted_goes_on(first: Site, copy: OffsiteCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    files = fill(first.backup_key)
    bring_in_step(copy)
    first.empty()
    original = Place.copy_from
    left = [10]

    def cut(self: Place, source: Place, key: str, **options: Any) -> tuple[str, str]:
        left[0] -= 1
        if left[0] < 0:
            raise UnreachableError("the way is cut")
        return original(self, source, key, **options)

    monkeypatch.setattr(Place, "copy_from", cut)
    with pytest.raises(UnreachableError):
        copy.fetch(on_progress=silent)
    assert first.custodian.read(INFO) is None
    monkeypatch.undo()
    copy.fetch(on_progress=silent)
    assert own(contents(first.custodian)) == files


@pytest.mark.parametrize("lost", [False, True])
def test_a_store_with_backups_of_its_own_is_not_replaced_by_accident(
    first: Site, copy: OffsiteCopy, lost: bool
) -> None:
    files = fill(first.backup_key)
    bring_in_step(copy)
    if lost:
        first.empty()
    fill(first.backup_key, "C")
    with pytest.raises(RefusedError, match="1 backups of its own" if lost else "not lost"):
        copy.fetch(on_progress=silent)
    copy.fetch(replace=True, on_progress=silent)
    found = own(contents(first.custodian))
    assert found.pop(f"memharbor/{STACK}/manifests/C.json") == b"{}", "records are of the store, not of the repository"
    assert found == files


def test_nothing_is_fetched_from_a_place_without_a_complete_copy(copy: OffsiteCopy) -> None:
    with pytest.raises(RefusedError, match="no complete copy"):
        copy.fetch(on_progress=silent)


def test_a_copy_that_cannot_be_reached_says_so_at_once_and_catches_up(first: Site, second: Site) -> None:
    files = fill(first.backup_key)
    place = second.place("custodian", f"{STACK}/")
    copy = OffsiteCopy(first.custodian, place, STACK)
    copy.copy(now=now(), on_progress=silent)
    files |= fill(first.backup_key, "B")
    second.container.stop()
    try:
        begun_at = time.monotonic()
        with pytest.raises(UnreachableError, match="off-site|backup store"):
            copy.copy(now=now(), on_progress=silent)
        assert time.monotonic() - begun_at < 30
    finally:
        second.restart()
    again = OffsiteCopy(first.custodian, second.place("custodian", f"{STACK}/"), STACK)
    again.copy(now=now(), on_progress=silent)
    assert own(contents(again._offsite)) == files


@pytest.fixture
def container(first: Site, second: Site) -> Iterator[Callable[..., tuple[int, list[dict[str, Any]]]]]:
    """The custodian's own container, between the two stores on the first one's network."""
    alias = f"{second.run.name}-backup-store-0"
    with closing(docker.from_env(timeout=120)) as engine:
        network = engine.networks.get(first.run.name)
        network.connect(second.container, aliases=[alias])
        second.find()
        started = first.run.custodian(
            ("custodian", second.run.secrets.store_secrets["custodian"]),
            offsite_endpoint=f"https://{alias}:{STORE_PORT}",
            offsite_bucket=STORE_BUCKET,
            offsite_ca_certificate=second.run.secrets.authority.certificate,
        )

        def call(*command: str) -> tuple[int, list[dict[str, Any]]]:
            done = started.exec_run(["/usr/local/lib/memharbor/custodian", *command])
            return done.exit_code, [json.loads(line) for line in done.output.decode().splitlines()]

        try:
            yield call
        finally:
            inspected, log = str(started.attrs), started.logs().decode()
            for secret in (*first.run.secrets.store_secrets.values(), *second.run.secrets.store_secrets.values()):
                assert secret not in inspected
                assert secret not in log
            started.remove(force=True)
            network.disconnect(second.container)
            second.find()


def test_the_container_copies_purges_and_tells(
    first: Site, second: Site, container: Callable[..., tuple[int, list[dict[str, Any]]]]
) -> None:
    name = first.run.name
    first.backup_key.write(f"pgbackrest/{name}/backup/main/backup.info", b"list")
    first.backup_key.write("k", b"1")
    code, said = container("copy")
    assert (code, said[-1]["result"]["objects"]) == (0, 3)
    place = second.place("custodian", f"{name}/")
    assert place.read("k") == b"1"
    first.backup_key.delete(["k"])
    time.sleep(1.1)
    code, said = container("purge", "--keep-seconds", "1")
    assert (code, said[-1]["result"]["keys"]) == (0, 1)
    assert place.read("k") is None
    code, said = container("status")
    status = said[-1]["result"]
    assert code == 0
    assert status["offsite"]["waiting_objects"] == 0
    assert status["offsite"]["is_versioned"] is True
    assert status["purge"]["result"]["keys"] == 1
    assert status["copy"]["last_good_at"]

    second.container.stop()
    try:
        code, said = container("copy")
        assert code == 4
        assert "off-site copy" in said[-1]["error"]["message"]
        status = container("status")[1][-1]["result"]
        assert status["copy"]["error"]
        assert status["copy"]["last_good_at"], "what was good last stays known"
        assert "error" in status["offsite"]
    finally:
        second.restart()
