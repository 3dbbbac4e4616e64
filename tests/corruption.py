"""
Everything that can go wrong with a backup repository's files, and a laboratory in which it is done to one.

The laboratory is a real PostgreSQL with a real store: two fulls, a diff, an incr, bundles and files of their own, WAL on
two timelines, and beside it another stanza. Damage is done to the store's volume, behind the gateway, and the good copy
is put back afterwards. `docs/reference/backup-faults.md` is generated from `KINDS`.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memharbor.backup.engine import BackupEngine
from memharbor.backup.verify import BackupVerifier
from memharbor.containers import Containers
from memharbor.server_files.postgres import STANZA, STORE_BUCKET, repository_path
from tests.containers import ThrowAway

OTHER = "other"
FAULTS_PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "backup-faults.md"
VECTORS = """
insert into t select {first} + i, md5(i::text),
  (select array_agg(random() + d * i * 0) from generate_series(1, 384) d)::vector from generate_series(1, {count}) i
"""
# A second cluster beside the first, in the same container, archiving to a stanza of its own.
OTHER_CLUSTER = """
set -eu
export PGDATA=/var/lib/postgresql/other
initdb --pgdata="$PGDATA" --username=postgres --auth=peer --data-checksums --no-instructions >/dev/null
push="--stanza=other --pg1-path=$PGDATA"
run="$push --pg1-port=5499"
pg_ctl --wait --silent --log=/dev/null start -o "-p 5499 -c listen_addresses='' -c unix_socket_directories=/run/postgresql \\
  -c shared_buffers=16MB -c archive_mode=on -c archive_command='pgbackrest $push archive-push %p'"
pgbackrest $run stanza-create
pgbackrest $run backup --type=full --archive-timeout=600
pg_ctl --wait --silent stop
rm -rf "$PGDATA"
"""


LOCK_HELD = 50  # pgBackRest error code: unable to acquire lock


class Laboratory:
    """
    A repository to be damaged.

    Args:
        engine: A client of the Docker engine.
        run: What owns the containers.
    """

    def __init__(self, engine: Any, run: ThrowAway) -> None:
        self._engine, self._run = engine, run
        self.store = run.backup_store()
        self.postgres = run.postgres(archive=True)
        self._containers = Containers()
        self.backups = BackupEngine(self._containers, self.postgres.name, STANZA)
        self._helper = self._start_helper()

    def verifier(self) -> BackupVerifier:
        return BackupVerifier(self.backups)

    def build(self) -> None:
        """Make the repository, and keep a copy of it."""
        # Nothing here has to survive a power cut, and waiting for the disk would cost half of the time.
        self.shell("chattr -R -SD /data/buckets /data/versions || true")
        self.pgbackrest("stanza-create")
        # Two thirds of a new cluster's thousand files, of which every backup and every look at one would have each.
        self.sql("update pg_database set datistemplate = false")
        for template in ("template0", "template1"):
            self.sql(f"drop database {template}")
        self.sql("create extension vector")
        self.sql("create table t (id int primary key, payload text, embedding vector(384))")
        self.insert(3000)
        self.backup("full")
        self.shell(f"cp backup/{STANZA}/backup.info /data/older-backup.info")
        self.change()
        self.backup("diff")
        self.insert(200)
        self.switch_wal()
        self.backup("full")
        self.sql("select pg_create_restore_point('fork')")
        self.insert(10)
        self.switch_wal()
        self.switch_timeline("fork")
        self.insert(10)
        self.backup("incr")
        for _ in range(2):
            self.insert(10)
            self.switch_wal()
        self.run(["sh", "-c", OTHER_CLUSTER])
        # Older than any backup: nobody needs it, expiry would remove it, and damage to it is not accused.
        self.shell(f"rm archive/{STANZA}/*/*/000000010000000000000001-*")
        self.keep()

    # What the server does.

    def run(self, command: list[str]) -> str:
        deadline = time.monotonic() + 60
        # The processes of a pgBackRest that was killed hold its lock until they notice.
        while (done := self.postgres.exec_run(command)).exit_code == LOCK_HELD and time.monotonic() < deadline:
            time.sleep(0.2)
        assert done.exit_code == 0, done.output.decode(errors="replace")
        return str(done.output.decode(errors="replace"))

    def sql(self, statement: str) -> str:
        return self.run(["psql", "--no-psqlrc", "-qAt", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-c", statement])

    def pgbackrest(self, *arguments: str) -> str:
        return self.run(["pgbackrest", f"--stanza={STANZA}", *arguments])

    def backup(self, kind: str) -> None:
        self.pgbackrest(f"--type={kind}", "--archive-timeout=600", "backup")

    def insert(self, count: int) -> None:
        first = int(self.sql("select coalesce(max(id), 0) from t"))
        self.sql(VECTORS.format(first=first, count=count))

    def change(self) -> None:
        self.sql("update t set payload = payload || 'x' where id % 100 = 0")

    def switch_wal(self) -> None:
        """Let the present segment be archived, and wait until nothing is left to archive."""
        self.sql("select pg_create_restore_point('switch')")
        self.sql("select pg_switch_wal()")
        self.settle()

    def settle(self) -> None:
        until = time.monotonic() + 300
        while ".ready" in self.run(["sh", "-c", 'ls "$PGDATA/pg_wal/archive_status"']):
            assert time.monotonic() < until, "the archive does not follow"
            time.sleep(0.1)

    def switch_timeline(self, point: str) -> None:
        """Restore in place to a named point, so that a new timeline begins there."""
        self.postgres.stop()
        command = ["pgbackrest", f"--stanza={STANZA}", "--delta", "--type=name", f"--target={point}"]
        done = self._containers.run_job(
            self.postgres.name, [*command, "--target-action=promote", "restore"], owns_data=True
        )
        assert done.exit_code == 0, done.last_words
        self.start_server()

    def start_server(self) -> None:
        self.postgres.start()
        self._run.wait(self.postgres)

    def start_store(self) -> None:
        self.store.start()
        self._run.wait(self.store)

    # What is done to the store's files.

    def shell(self, script: str, *arguments: str) -> str:
        """Run a script in the repository's folder, as root; `$1` and on are the arguments."""
        folder = f"/data/buckets/{STORE_BUCKET}{repository_path(self._run.name)}"
        whole = f"set -eu\n[ ! -d {folder} ] || cd {folder}\n{script}"
        done = self._helper.exec_run(["sh", "-c", whole, "damage", *arguments])
        assert done.exit_code == 0, f"{script}: {done.output.decode(errors='replace')}"
        return str(done.output.decode(errors="replace"))

    def files(self, pattern: str) -> list[str]:
        """List files by a shell pattern, sorted."""
        return self.shell(f"ls -d {pattern} 2>/dev/null || true").split()

    def size(self, file: str) -> int:
        return int(self.shell('stat -c %s "$1"', file))

    def keep(self) -> None:
        """Let everything be archived, and take the present state for the good one."""
        self.switch_wal()
        self.copy()

    def copy(self) -> None:
        """Take the present state for the good one."""
        self.shell(
            "rm -rf /data/good /data/good-files && cp -a /data/buckets /data/good && cp -a /files /data/good-files"
        )

    def heal(self) -> None:
        """Put the good copy back."""
        bucket = f"/data/buckets/{STORE_BUCKET}"
        self.shell(
            f"cd / && rm -rf {bucket}/pgbackrest && cp -a /data/good/{STORE_BUCKET}/pgbackrest {bucket}/"
            " && cp -a /data/good-files/. /files/"
        )

    @contextmanager
    def damaged(self, kind: Kind, chance: random.Random) -> Iterator[str]:
        """Do one kind of damage, and heal it when the block ends; says what was done."""
        try:
            yield kind.damage(self, chance)
        finally:
            self.heal()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let the repository change in the block, and keep what it became."""
        try:
            yield
        finally:
            self.keep()

    def close(self) -> None:
        """Close what was opened to the engine."""
        self._containers._client.close()

    def _start_helper(self) -> Any:
        helper = self._engine.containers.create(
            self.store.image.id,
            name=f"{self._run.name}-damage",
            labels=self._helper_labels(),
            user="0:0",
            entrypoint=["sleep"],
            command=["infinity"],
            network_mode="none",
            init=True,
            volumes={
                f"{self._run.name}-backup-store-0": {"bind": "/data", "mode": "rw"},
                f"{self._run.name}-postgres-0-files": {"bind": "/files", "mode": "rw"},
            },
        )
        helper.start()
        return helper

    def _helper_labels(self) -> dict[str, str]:
        self.store.reload()
        labels: dict[str, str] = self.store.attrs["Config"]["Labels"]
        return {name: value for name, value in labels.items() if name.startswith("memharbor.test")}


Damage = Callable[[Laboratory, random.Random], str]


@dataclass(frozen=True)
class Kind:
    """
    One kind of damage.

    Args:
        name: Short, for the test's name.
        what: In words, for the table.
        damage: Does it, and says to which file.
        found: The kinds of findings of which at least one must come.
        caught_by: `verify`, or `drill` where only a restore shows it.
    """

    name: str
    what: str
    damage: Damage
    found: frozenset[str]
    caught_by: str = "verify"


# How a file is damaged: name, words, script. `$1` is the file, `$2` another one of its sort, `$3` a random offset.
OPERATIONS: dict[str, tuple[str, str]] = {
    "flip": (
        "one bit flipped in {}",
        'byte=$(dd if="$1" bs=1 skip="$3" count=1 2>/dev/null | od -An -tu1 | tr -d " ")\n'
        'printf "\\\\$(printf %03o $((byte ^ 4)))" | dd of="$1" bs=1 seek="$3" conv=notrunc 2>/dev/null',
    ),
    "truncate": ("{} truncated", 'truncate -s "$3" "$1"'),
    "zero": (
        "{} overwritten with zeros",
        'size=$(stat -c %s "$1"); truncate -s 0 "$1"; truncate -s "$size" "$1"',
    ),
    "delete": ("{} deleted", 'rm "$1"'),
    "swap": ("{} with the content of another", 'cat "$2" >"$1"'),
}
SEGMENTS = f"archive/{STANZA}/*/*/*.zst"
MANIFESTS = f"backup/{STANZA}/2*/backup.manifest"

# Which files: words, shell patterns (of the file, and of its copy where both are hit), and what must be found.
TARGETS: dict[str, tuple[str, tuple[str, ...], set[str]]] = {
    "data-file": ("a data file", (f"backup/{STANZA}/2*/pg_data/base/*/*",), {"backup-file"}),
    "bundle": ("a bundle", (f"backup/{STANZA}/2*/bundle/*",), {"backup-file"}),
    "manifest": ("a manifest", (MANIFESTS,), {"metadata-copy"}),
    "manifest-copy": ("the copy of a manifest", (f"{MANIFESTS}.copy",), {"metadata-copy"}),
    "both-manifests": (
        "a manifest and its copy",
        (MANIFESTS, f"{MANIFESTS}.copy"),
        {"backup-manifest", "backup-missing", "backup-file"},
    ),
    "backup-info": ("`backup.info`", (f"backup/{STANZA}/backup.info",), {"metadata-copy"}),
    "backup-info-copy": ("`backup.info.copy`", (f"backup/{STANZA}/backup.info.copy",), {"metadata-copy"}),
    "both-backup-infos": (
        "`backup.info` and its copy",
        (f"backup/{STANZA}/backup.info", f"backup/{STANZA}/backup.info.copy"),
        {"metadata-lost"},
    ),
    "archive-info": ("`archive.info`", (f"archive/{STANZA}/archive.info",), {"metadata-copy"}),
    "archive-info-copy": ("`archive.info.copy`", (f"archive/{STANZA}/archive.info.copy",), {"metadata-copy"}),
    "both-archive-infos": (
        "`archive.info` and its copy",
        (f"archive/{STANZA}/archive.info", f"archive/{STANZA}/archive.info.copy"),
        {"metadata-lost"},
    ),
    "wal": ("a WAL segment", (SEGMENTS,), {"wal-damaged", "wal-missing"}),
    "history": ("a timeline's history file", (f"archive/{STANZA}/*/*.history",), {"history"}),
}


def _damage(patterns: tuple[str, ...], script: str) -> Damage:
    def damage(laboratory: Laboratory, chance: random.Random) -> str:
        found = laboratory.files(patterns[0])
        file = chance.choice(found)
        size = laboratory.size(file)
        others = [each for each in found if each != file]
        # Where there is but one of its sort: a file of another sort.
        other = chance.choice(others) if others else laboratory.files(MANIFESTS)[0]
        offset = chance.randrange(size)
        for target in (file, *(f"{file}{pattern.removeprefix(patterns[0])}" for pattern in patterns[1:])):
            laboratory.shell(script, target, other, str(offset))
        return f"{file} (offset {offset} of {size})"

    return damage


def _script(script: str) -> Damage:
    return lambda laboratory, chance: laboratory.shell(script).strip()


def _segment(position: str) -> Damage:
    def damage(laboratory: Laboratory, chance: random.Random) -> str:
        found = laboratory.files(SEGMENTS)
        # The first that the oldest backup needs; one of timeline 2 in the middle; the last that was archived.
        file = {"first": found[0], "middle": found[len(found) // 2], "last": found[-1]}[position]
        if position == "first":
            needed = laboratory.backups.list_backups()[0].start_segment
            file = next(each for each in found if needed in each)
        laboratory.shell('rm "$1"', file)
        return file

    return damage


def _copy_older_list(laboratory: Laboratory, chance: random.Random) -> str:
    # The store keeps every version; this is the one that was current when there was one backup.
    laboratory.shell(
        'cp "$1" backup/main/backup.info && cp "$1" backup/main/backup.info.copy', "/data/older-backup.info"
    )
    return "backup.info"


FOREIGN = f"archive/{OTHER}/*/*/*.zst"
SPECIAL = [
    Kind(
        "wal-first-missing",
        "the first WAL segment that is needed, missing",
        _segment("first"),
        frozenset({"wal-missing"}),
    ),
    Kind("wal-middle-missing", "a WAL segment in the middle, missing", _segment("middle"), frozenset({"wal-missing"})),
    Kind("wal-last-missing", "the last archived WAL segment, missing", _segment("last"), frozenset({"wal-missing"})),
    Kind(
        "wal-all-missing",
        "every WAL segment missing",
        _script(f"rm -r archive/{STANZA}/*/*/"),
        frozenset({"wal-missing"}),
    ),
    Kind(
        "wal-timeline-missing",
        "every WAL segment of the present timeline missing, with its history file",
        _script(f"rm -r archive/{STANZA}/*/00000002*"),
        frozenset({"wal-missing", "history"}),
    ),
    Kind(
        "wal-twice",
        "a WAL segment twice, with different checksums",
        _script(
            f'f=$(ls {SEGMENTS} | tail -2 | head -1); cp -a "$f" "${{f%-*}}-$(echo | sha1sum | cut -c1-40).zst"; echo "$f"'
        ),
        frozenset({"wal-duplicate"}),
    ),
    Kind(
        "wal-under-another-name",
        "a WAL segment under the name of the next, which is gone",
        _script(
            f'set -- $(ls {SEGMENTS} | tail -3); rm "$2"; name=${{2##*/}} from=${{1##*/}}; '
            'cp -a "$1" "${2%/*}/${name%%-*}-${from#*-}"; echo "$1"'
        ),
        frozenset({"wal-misplaced"}),
    ),
    Kind(
        "backup-deleted",
        "the folder of a backup deleted",
        _script(f'd=$(ls -d backup/{STANZA}/2* | tail -1); rm -r "$d"; echo "$d"'),
        frozenset({"backup-missing"}),
    ),
    Kind(
        "backups-deleted",
        "every backup deleted, the lists too",
        _script(f"rm -r backup/{STANZA}"),
        frozenset({"metadata-lost"}),
    ),
    Kind(
        "archive-deleted", "the whole archive deleted", _script(f"rm -r archive/{STANZA}"), frozenset({"metadata-lost"})
    ),
    Kind("prefix-deleted", "the whole prefix deleted", _script("rm -r backup archive"), frozenset({"empty"})),
    Kind(
        "older-list",
        "an older `backup.info`, of when there was one backup",
        _copy_older_list,
        frozenset({"backup-unlisted"}),
    ),
    Kind(
        "wrong-key",
        "the stack has another key",
        _script(
            "sed -i 's/^repo1-cipher-pass=.*/repo1-cipher-pass=not-the-key/' /files/pgbackrest/conf.d/secrets.conf"
        ),
        frozenset({"wrong-key"}),
    ),
    Kind(
        "other-stanza-lists",
        "another stanza's `backup.info` and `archive.info`, with their copies",
        _script(f"for k in backup archive; do cp $k/{OTHER}/$k.info* $k/{STANZA}/; done"),
        frozenset({"backup-unlisted", "foreign-cluster", "metadata-lost", "report"}),
    ),
    Kind(
        "other-stanza-backup-info",
        "another stanza's `backup.info`, with its copy",
        _script(f"cp backup/{OTHER}/backup.info* backup/{STANZA}/"),
        frozenset({"metadata-lost", "backup-unlisted", "foreign-cluster", "report", "backup-missing"}),
    ),
    Kind(
        "other-stanza-archive-info",
        "another stanza's `archive.info`, with its copy",
        _script(f"cp archive/{OTHER}/archive.info* archive/{STANZA}/"),
        frozenset({"wal-damaged", "foreign-cluster", "report", "metadata-lost"}),
    ),
    Kind(
        "other-stanza-bundle",
        "another stanza's bundle in place of one",
        _script(f'f=$(ls backup/{STANZA}/2*/bundle/1 | head -1); cat backup/{OTHER}/2*/bundle/1 >"$f"; echo "$f"'),
        frozenset({"backup-file"}),
    ),
    Kind(
        "other-stanza-wal",
        "another stanza's WAL segment in place of one",
        _script(f'f=$(ls {SEGMENTS} | tail -1); cat $(ls {FOREIGN} | head -1) >"$f"; echo "$f"'),
        frozenset({"wal-damaged"}),
    ),
    Kind(
        "other-stanza-manifest",
        "another stanza's manifest in place of one, with its copy",
        _script(f'd=$(ls -d backup/{STANZA}/2* | head -1); cp backup/{OTHER}/2*/backup.manifest* "$d"; echo "$d"'),
        frozenset({"backup-manifest", "backup-file"}),
    ),
    Kind(
        "garbage-appended",
        "a data file with something appended",
        _script(f'f=$(ls backup/{STANZA}/2*/pg_data/base/*/* | tail -1); echo garbage >>"$f"; echo "$f"'),
        frozenset({"backup-file"}),
    ),
]
KINDS = [
    Kind(f"{operation}-{target}", words.format(of), _damage(patterns, script), frozenset(found))
    for target, (of, patterns, found) in TARGETS.items()
    for operation, (words, script) in OPERATIONS.items()
] + SPECIAL
# Each file is intact, so only replay sees it.
NAMES_EXCHANGED = Kind(
    "wal-names-exchanged",
    "two WAL segments with each other's names, checksums and all",
    _script(
        f"set -- $(ls {SEGMENTS} | tail -3)\none=${{1##*/}} two=${{2##*/}} folder=${{1%/*}}\n"
        'mv "$1" /tmp/one; mv "$2" "$folder/${one%%-*}-${two#*-}"; mv /tmp/one "$folder/${two%%-*}-${one#*-}"'
    ),
    frozenset(),
    caught_by="drill",
)


def impersonal(what: str) -> str:
    """
    Take the names of one run's backups and segments out of a sentence.

    >>> impersonal("WAL segment 000000010000000000000005 is missing")
    'WAL segment SEGMENT is missing'
    """
    what = re.sub(r"\d{8}-\d{6}F(_\d{8}-\d{6}[DI])?", "BACKUP", what)
    what = re.sub(r"[0-9A-F]{24}", "SEGMENT", what)
    return re.sub(r"\b\d{12,}\b", "IDENTIFIER", what)


def faults_page(found: dict[str, str]) -> str:
    """Write the table of every kind of damage with what `backup verify` said of it."""
    rows = [f"| {kind.what} | `{kind.name}` | {kind.caught_by} | {found[kind.name]} |" for kind in KINDS]
    rows.append(f"| {NAMES_EXCHANGED.what} | `{NAMES_EXCHANGED.name}` | {NAMES_EXCHANGED.caught_by} | nothing |")
    return "\n".join([FAULTS_HEAD, *rows]) + "\n"


FAULTS_HEAD = """\
<!-- generated by `pytest tests/integration/test_corruption_matrix.py -m soak --update-golden`; do not edit -->
# What can go wrong with a backup store, and how it is found

Each kind of damage was done to the files of a real repository, behind the store's back; then `memharbor backup verify` ran against the store.
Files and places within them are drawn by a seed.
None was called good, and the repository without damage was never accused: not while a backup ran, and not right after new WAL.
`memharbor backup verify` exits with 10, says which backups cannot be restored and what still can be, and names the next command.
A store that does not answer is exit code 6 and not damage.

What lies under `backup.history` is not looked at: a restore does not read it.
What is intact by itself and stands in the wrong place is seen by a restore alone: run `memharbor drill`.

| What was done | Kind | Found by | `backup verify` says |
|---|---|---|---|"""
