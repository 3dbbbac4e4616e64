"""
Merge the rows of a logical backup into a live database, bit for bit, in one transaction.

Every row is judged first: it is new, the same, taken by another version, taken by another user, or hangs on a memory that
is not there. What was foretold is what is done, or nothing is. Triggers must not rewrite what comes back, nor the audit
trail record it; foreign keys are then held by hand. Why: docs/adr/0014-logical-backups.md.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from memharbor.backup.access import may_set
from memharbor.backup.chain import Link
from memharbor.backup.logical import stage
from memharbor.backup.logical_files import Keys
from memharbor.backup.rows import DatabaseRows
from memharbor.backup.selection import DIGEST_SETTINGS, Table
from memharbor.backup.staging import Staging
from memharbor.backup.tables import SCHEMA
from memharbor.database import Connection, run_statement, translated_errors
from memharbor.errors import StateRefusedError, VerificationError
from memharbor.output import Output
from memharbor.templates import ident, literal, render

OnConflict = Literal["skip", "overwrite", "new-id"]

_UNIQUE = {"categories": "name", "configs": "key"}
# Columns that name a memory, by table.
_ENDS = {
    "memory_relationships": ("source_memory_id", "target_memory_id"),
    "memory_categories": ("memory_id",),
    "memory_history": ("memory_id",),
}
_WORDS = {
    "insert": "inserted",
    "overwrite": "overwritten",
    "skip": "skipped",
    "same": "same",
    "orphan": "orphaned",
}


@dataclass(frozen=True)
class MergeOptions:
    """
    How rows are merged.

    Args:
        on_conflict: What becomes of a row whose key is taken by a different one; `None` refuses a database with memories.
        user_sha256: Only this user's rows.
        new_owner: Whose rows they become.
        erased: When the erasure of a user was requested, by SHA-256 of the id; such rows never come back.
        dry_run: Foretell and change nothing.
        point: Name of the restore point that is written before the first row; `None` where the server has no backups.
    """

    on_conflict: OnConflict | None = None
    user_sha256: str | None = None
    new_owner: str | None = None
    erased: Mapping[str, datetime] = field(default_factory=dict)
    dry_run: bool = False
    point: str | None = None


@dataclass(frozen=True)
class MergeReport:
    """What was (or would be) done: counts by table and by `inserted`, `overwritten`, `skipped`, `same`, `orphaned`."""

    backup: str
    counts: dict[str, dict[str, int]]
    erased_users: int
    dry_run: bool
    undo_point: str | None = None

    def total(self, word: str) -> int:
        """Add up one kind of count."""
        return sum(counts[word] for counts in self.counts.values())

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        return {
            "backup": self.backup,
            "dry_run": self.dry_run,
            **{word: self.total(word) for word in _WORDS.values()},
            "erased_users_left_out": self.erased_users,
            "undo_point": self.undo_point,
            "tables": self.counts,
        }


def merge_backup(
    connection: Connection, chain: list[Link], options: MergeOptions, keys: Keys, output: Output
) -> MergeReport:
    """
    Merge a backup into a database.

    Args:
        connection: Straight to the database, as its administrator; in autocommit.
        chain: The backup and all it builds on, oldest first, its files checked.
        options: How.
        keys: Decrypts by its identities.
        output: Where progress is said.

    Raises:
        StateRefusedError: It is not allowed, or rows changed meanwhile; nothing was changed.
        SourceDataError: The backup is damaged; nothing was changed.
        VerificationError: What came back is not what was backed up; nothing was changed.
    """
    with translated_errors("merging the backup"), connection.transaction(force_rollback=options.dry_run):
        for name, value in DIGEST_SETTINGS.items():
            connection.execute("select pg_catalog.set_config(%s, %s, true)", (name, value))
        if options.on_conflict is None:
            _refuse_rows(connection)
        staging = Staging(connection, chain, keys)
        with output.step(f"Read and check backup {staging.manifest.id}"):
            staging.load(output)
        if options.user_sha256 is not None:
            staging.keep_user(options.user_sha256)
        erased_users = _leave_out_erased(connection, staging, options)
        if options.new_owner is not None:
            staging.rename_owner(options.new_owner)
        staging.analyze()
        merge = _Merge(staging, options.on_conflict or "skip", whole=options.user_sha256 is None)
        counts = merge.judge()
        if not options.dry_run:
            if options.point:
                connection.execute("select pg_catalog.pg_create_restore_point(%s)", (options.point,))
            with output.step(f"Merge {sum(each['inserted'] + each['overwritten'] for each in counts.values()):,} rows"):
                merge.apply(counts)
            # An erasure that committed meanwhile would be undone; one that comes later waits for this transaction.
            if _leave_out_erased(connection, staging, options):
                raise StateRefusedError(
                    "a user was erased while the backup was merged, and nothing was", hint="run the same command again"
                )
            _note(connection, staging.manifest.id, options, counts)
    return MergeReport(staging.manifest.id, counts, erased_users, options.dry_run, options.point)


def _refuse_rows(connection: Connection) -> None:
    (row,) = DatabaseRows(connection).query(f"select count(*), current_database() from {SCHEMA}.memories")
    if row[0] != "0":
        raise StateRefusedError(
            f"cannot restore into database `{row[1]}`: it has {int(row[0] or 0):,} memories",
            hint="say what becomes of rows that differ: `--on-conflict skip`, `overwrite` or `new-id`",
        )


def _leave_out_erased(connection: Connection, staging: Staging, options: MergeOptions) -> int:
    erased = dict(options.erased)
    with translated_errors("reading the erase ledger"):
        rows = connection.execute("select user_id_sha256, max(requested_at) from memharbor.erase_ledger group by 1")
        for user, at in rows.fetchall():
            erased[user] = max(at, erased.get(user, at))
    left_out = staging.leave_out_erased(erased)
    if left_out and options.user_sha256 is not None:
        raise StateRefusedError(
            "this user was erased after the backup was taken, and does not come back",
            hint="a backup that was taken after the erasure has what they have written since",
        )
    return left_out


def _note(connection: Connection, backup: str, options: MergeOptions, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Note the merge in the ledger of data migrations: the audit trail is the user's own and comes back as it was."""
    detail = {"on_conflict": options.on_conflict, "user_sha256": options.user_sha256, "undo_point": options.point}
    written = sum(each["inserted"] + each["overwritten"] for each in counts.values())
    connection.execute(
        """
        insert into memharbor.migration_ledger
          (run_id, step, source, state, row_count, detail, started_at, finished_at)
        values (%s, 'restore', %s, 'done', %s, %s, now(), clock_timestamp())
        """,
        (uuid.uuid4(), backup, written, json.dumps({**detail, "tables": counts})),
    )


class _Merge:
    """Judges staged rows against the live ones and puts them in."""

    def __init__(self, staging: Staging, on_conflict: OnConflict, *, whole: bool) -> None:
        self._staging = staging
        self._connection = staging.connection
        self._on_conflict = on_conflict
        self._whole = whole

    def judge(self) -> dict[str, dict[str, int]]:
        """Give every staged row a verdict, and count them by table."""
        for table in self._staging.tables:
            stage(self._connection, _verdict(table), table.name, table.key, with_verdict=True)
        if self._staging.find("categories") and self._staging.find("memory_categories"):
            self._adopt_categories()
        if self._on_conflict == "new-id":
            run_statement(self._connection, render("logical/renumbered.sql", {}))
        for table in self._staging.tables:
            self._judge_table(table)
            if self._on_conflict == "new-id" and table.key == ("id",) and not table.is_shared and not table.identity:
                self._renumber(table)
        for table in self._staging.tables:
            self._find_orphans(table)
            self._decide(table)
        return {table.name: self._count(table) for table in self._staging.tables}

    def apply(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """
        Write what was judged.

        Raises:
            StateRefusedError: Rows changed since they were judged.
            VerificationError: A row in the database is not the one that was backed up.
        """
        with self._without_triggers() as holds_keys:
            for table in self._staging.tables:
                if holds_keys:
                    self._hold_ends(table)
                for done, word in ((self._insert(table), "inserted"), (self._overwrite(table), "overwritten")):
                    if done != counts[table.name][word]:
                        raise StateRefusedError(
                            f"rows of `{table.name}` changed while the backup was merged, and nothing was",
                            hint="run the same command again",
                        )
        for table in self._staging.tables:
            self._verify(table)

    def _judge_table(self, table: Table) -> None:
        staged, live = f"{self._staging.name(table)} s", f"{table.relation} t"
        if table.name == "memory_history":
            # Numbers of the audit trail mean nothing: the row itself is what is the same or is not.
            verdict = (
                f"case when exists (select from {live} where t.memory_id = s.memory_id"
                f" and {table.digest_of('t')} = {table.digest_of('s')}) then 'same' else 'insert' end"
            )
            source = staged
        elif table.is_shared:
            unique = ident(_UNIQUE[table.name])
            verdict = (
                f"case when not exists (select from {live} where t.id = s.id or t.{unique} = s.{unique}) then 'insert'"
                f" when exists (select from {live} where t.id = s.id and {table.digest_of('t')} = {table.digest_of('s')})"
                f" then 'same' when exists (select from {live} where t.id = s.id) and {literal(self._whole)}"
                " then 'conflict' else 'skip' end"
            )
            source = staged
        else:
            verdict = (
                f"case when t.{ident(table.key[0])} is null then 'insert'"
                f" when {table.digest_of('t')} = {table.digest_of('s')} then 'same'"
                f" when {table.owner_of('t')} is distinct from {table.owner_of('s')} then 'foreign' else 'conflict' end"
            )
            source = f"{staged} left join {live} on ({table.key_of('t')}) = ({table.key_of('s')})"
        self._run(f"truncate {_verdict(table)}")
        self._run(f"insert into {_verdict(table)} select {table.key_of('s')}, {verdict} from {source}")
        self._run(f"analyze {_verdict(table)}")

    def _adopt_categories(self) -> None:
        """Let a category of the same name stand for one whose id the database does not know."""
        categories = f"{SCHEMA}.categories"
        self._run(
            f"update {self._staging.name('memory_categories')} c set category_id = t.id"
            f" from {self._staging.name('categories')} s join {categories} t on t.name = s.name"
            f" where c.category_id = s.id and not exists (select from {categories} known where known.id = s.id)"
        )

    def _renumber(self, table: Table) -> None:
        """Give rows whose id is taken a new one, the same each time, and let what names a memory follow."""
        staged, verdict = self._staging.name(table), _verdict(table)
        taken = f"select id from {verdict} where verdict in ('conflict', 'foreign')"
        new_id = f"encode(substring({table.digest_of('s')} from 1 for 16), 'hex')::uuid"
        if table.name != "memories":
            self._run(f"update {staged} s set id = {new_id} where s.id in ({taken})")
            self._judge_table(table)
            return
        self._run(f"insert into renumbered select s.id, {new_id} from {staged} s where s.id in ({taken})")
        self._run(f"update {staged} s set id = n.new_id from renumbered n where n.old_id = s.id")
        for name, columns in _ENDS.items():
            for column in columns if self._staging.find(name) else ():
                self._run(
                    f"update {self._staging.name(name)} s set {column} = n.new_id from renumbered n where n.old_id = s.{column}"
                )
        if self._staging.find("entities"):
            links = "jsonb_array_elements(s.payload -> 'linked_memory_ids') with ordinality as link(memory_id, place)"
            self._run(
                f"update {self._staging.name('entities')} s set payload = jsonb_set(s.payload, '{{linked_memory_ids}}', ("
                "select jsonb_agg(coalesce(to_jsonb(n.new_id::text), link.memory_id) order by link.place)"
                f" from {links} left join renumbered n on to_jsonb(n.old_id::text) = link.memory_id))"
                " where jsonb_typeof(s.payload -> 'linked_memory_ids') = 'array' and s.payload -> 'linked_memory_ids' <> '[]'"
            )
        self._judge_table(table)

    def _find_orphans(self, table: Table) -> None:
        if table.name not in ("memory_relationships", "memory_categories"):
            return
        pairs = [(column, "memories") for column in _ENDS[table.name]]
        pairs += [("category_id", "categories")] if table.name == "memory_categories" else []
        for column, referred in pairs:
            staged = (
                f"select p.id from {self._staging.name(referred)} p"
                if self._staging.find(referred)
                else "select null::uuid where false"
            )
            self._run(
                f"update {_verdict(table)} v set verdict = 'orphan' from {self._staging.name(table)} s"
                f" where ({table.key_of('s')}) = ({table.key_of('v')}) and v.verdict in ('insert', 'conflict')"
                f" and s.{column} not in ({staged})"
                f" and not exists (select from {SCHEMA}.{referred} t where t.id = s.{column})"
            )

    def _decide(self, table: Table) -> None:
        if self._on_conflict == "overwrite":
            (row,) = self._rows(f"select count(*) from {_verdict(table)} where verdict = 'foreign'")
            if row[0] != "0":
                raise StateRefusedError(
                    f"{row[0]} rows of `{table.name}` belong to other users now, and are not overwritten",
                    hint="let them come in under new ids with `--on-conflict new-id`",
                )
        conflict = "overwrite" if self._on_conflict == "overwrite" else "skip"
        self._run(
            f"update {_verdict(table)} set verdict = case verdict when 'conflict' then '{conflict}' else 'skip' end"
            " where verdict in ('conflict', 'foreign')"
        )

    def _count(self, table: Table) -> dict[str, int]:
        rows = self._rows(f"select verdict, count(*) from {_verdict(table)} group by verdict")
        found = {row[0]: row[1] for row in rows}
        return {word: int(found.get(verdict) or 0) for verdict, word in _WORDS.items()}

    def _insert(self, table: Table) -> int:
        columns = [ident(column.name) for column in table.columns if column.name != table.identity]
        order = f" order by s.{ident(table.identity)}" if table.identity else ""
        return self._run(
            f"insert into {table.relation} ({', '.join(columns)}) select {', '.join(f's.{each}' for each in columns)}"
            f" from {self._judged(table, 'insert')}{order}"
        )

    def _overwrite(self, table: Table) -> int:
        columns = [ident(column.name) for column in table.columns if column.name not in table.key]
        changes = ", ".join(f"{each} = s.{each}" for each in columns)
        return self._run(
            f"update {table.relation} t set {changes} from {self._judged(table, 'overwrite')}"
            f" where ({table.key_of('t')}) = ({table.key_of('s')})"
        )

    def _judged(self, table: Table, verdict: str) -> str:
        return (
            f"{self._staging.name(table)} s join {_verdict(table)} v"
            f" on v.verdict = '{verdict}' and ({table.key_of('v')}) = ({table.key_of('s')})"
        )

    def _hold_ends(self, table: Table) -> None:
        """Hold the rows that a foreign key refers to until the end, as its trigger would."""
        if table.name not in ("memory_relationships", "memory_categories"):
            return
        pairs = [(column, "memories") for column in _ENDS[table.name]]
        pairs += [("category_id", "categories")] if table.name == "memory_categories" else []
        for column, referred in pairs:
            wanted = " union all ".join(
                f"select s.{column} from {self._judged(table, verdict)}" for verdict in ("insert", "overwrite")
            )
            self._run(f"select from {SCHEMA}.{referred} t where t.id in ({wanted}) order by t.id for key share of t")
            (row,) = self._rows(
                f"select count(*) from ({wanted}) wanted(id) left join {SCHEMA}.{referred} t using (id) where t.id is null"
            )
            if row[0] != "0":
                raise StateRefusedError(
                    f"rows that `{table.name}` refers to were deleted while the backup was merged",
                    hint="run the same command again",
                )

    def _verify(self, table: Table) -> None:
        where = f"({table.key_of('t')}) = ({table.key_of('s')})"
        if table.identity:
            where = "t.memory_id = s.memory_id"
        missing = 0
        for verdict in ("insert", "overwrite"):
            (row,) = self._rows(
                f"select count(*) from {self._judged(table, verdict)} where not exists ("
                f"select from {table.relation} t where {where} and {table.digest_of('t')} = {table.digest_of('s')})"
            )
            missing += int(row[0] or 0)
        if missing:
            raise VerificationError(
                f"{missing} rows of `{table.name}` did not come back as they were backed up; nothing was changed"
            )

    @contextmanager
    def _without_triggers(self) -> Iterator[bool]:
        """Let rows be written as they are; says whether foreign keys are then ours to hold."""
        if may_set(self._connection, "session_replication_role"):
            self._connection.execute("set local session_replication_role = replica")
            yield True
            self._connection.execute("set local session_replication_role = origin")
            return
        # For an administrator who is no superuser. Other writers wait from here on.
        self._switch_triggers(enabled=False)
        yield False
        self._switch_triggers(enabled=True)

    def _switch_triggers(self, *, enabled: bool) -> None:
        run_statement(self._connection, render("logical/triggers.sql", {"enabled": enabled}))

    def _run(self, statement: str) -> int:
        with translated_errors("merging the backup"):
            return self._connection.execute(statement.encode()).rowcount

    def _rows(self, statement: str) -> list[tuple[str | None, ...]]:
        return DatabaseRows(self._connection).query(statement)


def _verdict(table: Table) -> str:
    return ident(f"verdict_{table.name}")
