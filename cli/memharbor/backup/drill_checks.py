"""
What a drill asks of a restored database. Each check really does what it is named after, inside the throw-away container.

A check returns what it found, or raises `DrillCheckError`, or `NotComparableError` where there is nothing to compare
with. Row level security and Mem0's statements are tried as the roles that applications have, with those roles' settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memharbor.backup.rows import Fingerprint, differences, fingerprint
from memharbor.backup.sandbox import Sandbox
from memharbor.backup.tables import USER_TABLES
from memharbor.names import ROLES
from memharbor.templates import literal

RECALL_MINIMUM = 0.9
_PROBES = 8
_NEAREST = 10
_LINES_MAX = 5
# Two distances of the same pair may differ in their last bits, by the order in which they were summed.
_EPSILON = 1e-6

# What an unmodified Mem0 sends, with `$user` and `$id` for a user and one of their memories.
# Source: mem0ai, as pinned, vector_stores/pgvector.py: search, list, get, keyword_search, insert, update, delete.
_MEM0_READS = {
    "search": "select id, vector <=> (select vector from public.mem0 where id = $id)::vector as distance, payload from mem0"
    " where payload ->> 'user_id' = $user order by distance limit 5",
    "list": "select id, payload from mem0 where payload ->> 'user_id' = $user limit 100",
    "get": "select id, payload from mem0 where id = $id",
}
_MEM0_MAYBE_EMPTY = {
    "keyword search": "select id, ts_rank_cd(to_tsvector('simple', payload ->> 'text_lemmatized'),"
    " plainto_tsquery('simple', 'drill')) as score, payload from mem0"
    " where to_tsvector('simple', payload ->> 'text_lemmatized') @@ plainto_tsquery('simple', 'drill')"
    " and payload ->> 'user_id' = $user order by score desc limit 5",
    "entities": "select id, payload from mem0_entities where payload ->> 'user_id' = $user limit 5",
}
_MEM0_WRITES = """
    begin;
    insert into mem0 (id, vector, payload) select '00000000-0000-4000-8000-000000000001', vector,
      jsonb_build_object('user_id', $user, 'data', 'drill') from mem0 where id = $id;
    update mem0 set payload = payload || '{"data": "drilled"}' where id = '00000000-0000-4000-8000-000000000001';
    select payload ->> 'data' from mem0 where id = '00000000-0000-4000-8000-000000000001';
    delete from mem0 where id = '00000000-0000-4000-8000-000000000001';
    rollback
"""


class DrillCheckError(Exception):
    """A check found the restored database to be wrong."""


class NotComparableError(Exception):
    """A check has nothing to compare with, or nothing to try itself on."""


@dataclass
class Probe:
    """
    A restored database under examination.

    Args:
        sandbox: Where it is.
        manifest: The backup's record, see docs/concepts/backup.md; `None` where there is none or another moment was
            restored.
        erasures: The records of erasures that were replayed, filled in when they are.
    """

    sandbox: Sandbox
    manifest: Mapping[str, Any] | None
    erasures: list[Mapping[str, Any]] = field(default_factory=list)
    _settings: dict[str, str] = field(default_factory=dict, repr=False)

    def query(self, statement: str, *, role: str = "", user_id: str | None = None) -> list[tuple[str | None, ...]]:
        """Ask the database, as its superuser or as a role of applications with that role's settings, for one user."""
        prelude = ""
        if role:
            if role not in self._settings:
                self._settings[role] = self._read_settings(role)
            prelude = f"{self._settings[role]}\nset role {ROLES[role]};"
        if user_id is not None:
            prelude += f"\nset app.user_id = {literal(user_id)};"
        return self.sandbox.rows(prelude=prelude).query(statement)

    def _read_settings(self, role: str) -> str:
        """Spell what the role would have from the start, had it logged in."""
        statement = f"""
            select format('set %s = %s;', split_part(each, '=', 1),
                          case when each like 'search_path=%' then substr(each, 13)
                               else quote_literal(substr(each, strpos(each, '=') + 1)) end)
            from pg_db_role_setting, unnest(setconfig) each
            where setrole = {literal(ROLES[role])}::regrole
        """  # noqa: S608 - names of roles are ours
        rows = self.sandbox.rows().query(statement)
        return "load 'vector';\n" + "\n".join(str(row[0]) for row in rows)


def check_reached(probe: Probe) -> str:
    """Say where the replay ended; that it was not too early was compared when the database opened."""
    from memharbor.backup.wal import format_lsn

    sandbox = probe.sandbox
    return f"{sandbox.plan.target}, reached {format_lsn(sandbox.reached_lsn)} of timeline {sandbox.plan.timeline}"


def check_rows(probe: Probe) -> str:
    """Compare every user's rows with what was recorded when the backup was made."""
    if probe.manifest is None:
        raise NotComparableError("nothing was recorded for this moment")
    if not probe.manifest.get("exact"):
        raise NotComparableError("no exact state could be recorded when the backup was made")
    recorded = (
        Fingerprint(str(row[0]), str(row[1]), int(row[2]), str(row[3])) for row in probe.manifest["fingerprints"]
    )
    expected = {(each.user_sha256, each.table): each for each in recorded}
    _require_same(expected, fingerprint(probe.sandbox.rows()))
    rows = sum(each.rows for each in expected.values())
    users = len({user for user, _ in expected if user})
    return f"{rows:,} rows of {users:,} users are the recorded ones, to the bit"


def _require_same(expected: dict[tuple[str, str], Fingerprint], found: dict[tuple[str, str], Fingerprint]) -> None:
    lines = differences(expected, found)
    if lines:
        more = f"; and {len(lines) - _LINES_MAX} more" if len(lines) > _LINES_MAX else ""
        raise DrillCheckError("; ".join(lines[:_LINES_MAX]) + more)


def check_policies(probe: Probe) -> str:
    """See that row level security is on and forced on every table with users' rows, and that it holds."""
    names = ", ".join(literal(table.name) for table in USER_TABLES)
    rows = probe.query(f"""
        select relname, relrowsecurity and relforcerowsecurity, (select count(*) from pg_policy where polrelid = c.oid)
        from pg_class c
        where relnamespace = to_regnamespace('memharbor') and relkind in ('r', 'p') and relname in ({names})
        order by relname
    """)  # noqa: S608 - our own names
    if not rows:
        raise NotComparableError("there is no schema in this backup")
    bare = [str(name) for name, is_forced, policies in rows if is_forced != "t" or policies == "0"]
    if bare:
        raise DrillCheckError(f"row level security is not enabled and forced on {', '.join(bare)}")
    seen = probe.query("select count(*) from public.memories", role="app")[0][0]
    if seen != "0":
        raise DrillCheckError(f"a client that does not say who it is sees {seen} memories")
    users = probe.query(
        "select user_id, count(*) from memharbor.memories where user_id <> '' and state = 'active'"
        " group by user_id order by 2 desc, 1 limit 2"
    )
    for user_id, _ in users:
        others = probe.query(
            f"select count(*) from public.memories where user_id is distinct from {literal(str(user_id))}",  # noqa: S608
            role="app",
            user_id=str(user_id),
        )[0][0]
        if others != "0":
            raise DrillCheckError(f"a user sees {others} memories of others")
    return f"enabled and forced on {len(rows)} tables; nobody sees nothing, {len(users)} users see their own only"


def check_indexes(probe: Probe) -> str:
    """Look for invalid indexes, and walk every table and B-tree."""
    invalid = probe.query(
        "select indexrelid::regclass::text from pg_index where not (indisvalid and indisready and indislive)"
    )
    if invalid:
        raise DrillCheckError(f"invalid: {', '.join(str(row[0]) for row in invalid)}")
    walked = probe.sandbox.execute(
        ["pg_amcheck", "--install-missing", "--heapallindexed", "--jobs=2", f"--database={probe.sandbox.database}"]
    )
    if walked.exit_code != 0:
        raise DrillCheckError((walked.stdout or walked.stderr).strip()[-600:])
    count = probe.query("select count(*) from pg_index")[0][0]
    return f"{count} indexes are valid; pg_amcheck walked every table and B-tree"


def check_recall(probe: Probe) -> str:
    """Ask Mem0's search for the nearest memories of some memories, with and without indexes."""
    samples = probe.query(f"""
        select user_id, id from (
          select user_id, id, row_number() over (partition by user_id order by id) as place,
                 count(*) over (partition by user_id) as rows
          from memharbor.memories where embedding is not null and state = 'active' and user_id <> ''
        ) each where place <= 2 order by rows desc, user_id, place limit {_PROBES}
    """)  # noqa: S608 - our own number
    if not samples:
        raise NotComparableError("no memory has a vector")
    # All in one session: what differs is whether indexes may be used.
    searches = [_spell_search(number, str(user), str(memory)) for number, (user, memory) in enumerate(samples)]
    without = "set enable_indexscan = off; set enable_bitmapscan = off;"
    by_index = _distances(probe.query(";".join(searches), role="service"))
    exact = _distances(probe.query(without + ";".join(searches), role="service"))
    recalls = [recall(exact[number], by_index.get(number, [])) for number in sorted(exact)]
    mean = sum(recalls) / len(recalls)
    if mean < RECALL_MINIMUM:
        raise DrillCheckError(f"recall@{_NEAREST} is {mean:.2f} over {len(recalls)} searches, below {RECALL_MINIMUM}")
    return f"recall@{_NEAREST} is {mean:.2f} over {len(recalls)} searches"


def _spell_search(number: int, user_id: str, memory_id: str) -> str:
    return f"""
        with given as materialized (select vector from public.mem0 where id = {literal(memory_id)})
        select {number:d}, vector <=> (select vector from given) as distance from public.mem0
        where payload ->> 'user_id' = {literal(user_id)} order by distance limit {_NEAREST}
    """  # noqa: S608 - quoted


def _distances(rows: Sequence[tuple[str | None, ...]]) -> dict[int, list[float]]:
    """Sort distances by the number of their search."""
    found: dict[int, list[float]] = {}
    for number, distance in rows:
        if number is not None and distance is not None:
            found.setdefault(int(number), []).append(float(distance))
    return found


def recall(exact: Sequence[float], found: Sequence[float]) -> float:
    """
    Tell which share of the nearest was found, by their distances: of two that are equally near either will do.

    >>> recall([0.0, 0.1, 0.2], [0.0, 0.2, 0.3]), recall([], [])
    (0.6666666666666666, 1.0)
    """
    left, hits = list(found), 0
    for distance in exact:
        match = next((each for each in left if abs(each - distance) <= _EPSILON), None)
        if match is not None:
            left.remove(match)
            hits += 1
    return hits / len(exact) if exact else 1.0


def check_mem0(probe: Probe) -> str:
    """Run the statements that an unmodified Mem0 sends, as the roles that it has; what they write is rolled back."""
    rows = probe.query(
        "select user_id, id, vector_dims(embedding) from memharbor.memories"
        " where embedding is not null and state = 'active' and user_id <> '' order by user_id, id limit 1"
    )
    if not rows:
        raise NotComparableError("no memory has a vector")
    user_id, identifier = literal(str(rows[0][0])), literal(str(rows[0][1]))
    texts = {**_MEM0_READS, **_MEM0_MAYBE_EMPTY}
    reads = ";".join(
        f"select {literal(name)}, count(*) from ({_spell(text, user_id, identifier)}) each"  # noqa: S608 - our own texts
        for name, text in texts.items()
    )
    for role in ("app", "service"):
        identity = str(rows[0][0])
        counts = {str(row[0]): row[1] for row in probe.query(reads, role=role, user_id=identity)}
        empty = [name for name in _MEM0_READS if counts.get(name, "0") == "0"]
        if empty:
            raise DrillCheckError(f"Mem0's {empty[0]} as {ROLES[role]} finds nothing")
        if probe.query(_spell(_MEM0_WRITES, user_id, identifier), role=role, user_id=identity) != [("drilled",)]:
            raise DrillCheckError(f"Mem0's writes as {ROLES[role]} are not what it reads back")
    return f"searched, listed, got, wrote and deleted as two roles, {int(str(rows[0][2]))} dimensions"


def _spell(text: str, user_id: str, identifier: str) -> str:
    return text.replace("$user", user_id).replace("$id", identifier)


def check_erasures(probe: Probe) -> str:
    """See that whom the erase ledger names has no rows after it was replayed, and that nobody else lost any."""
    digests = {str(record["user_sha256"]) for record in probe.erasures}
    after = fingerprint(probe.sandbox.rows())
    left = sorted({user for user, _ in after if user in digests})
    if left:
        raise DrillCheckError(
            f"{len(left)} erased users have rows: {', '.join(user[:12] for user in left[:_LINES_MAX])}"
        )
    if not digests:
        return "nobody was erased since this backup"
    return f"{len(probe.erasures)} erasures since this backup were replayed, and none of their rows is left"


def check_checksums(probe: Probe) -> str:
    """Shut the server down, and compare the checksum of every page of its files."""
    probe.sandbox.stop()
    done = probe.sandbox.execute(["pg_checksums", "--check"])
    if done.exit_code != 0:
        raise DrillCheckError((done.stderr or done.stdout).strip()[-600:])
    blocks = next((line.split()[-1] for line in done.stdout.splitlines() if line.startswith("Blocks scanned")), "?")
    return f"{blocks} pages have their checksums"
