"""
Go back to a checkpoint, exactly: to the row and to the bits of every vector.

Three ways are exact, each under its own conditions: put back the rows that were copied at the checkpoint (the tables
are still made as they were), fetch those rows out of a restored copy first, or restore the whole cluster to the
checkpoint's restore point (also where tables were changed or dropped). The cheapest that is exact is taken. Whatever is
put back by rows happens in one transaction, whose result is compared with what was recorded before it is committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from memharbor.backup.access import in_locked_transaction, may_execute, may_set, present_tables, qualified, run_script
from memharbor.backup.changes import (
    Change,
    count_changes,
    find_changes,
    find_definition_changes,
    refuse_missing_copies,
    same_key,
)
from memharbor.backup.checkpoint import KEYS, OWNERS, Checkpoint, copy_name, read_fingerprints, summarise
from memharbor.backup.plan import RestorePlan
from memharbor.backup.rows import DatabaseRows, RowSource, differences, fingerprint
from memharbor.database import Connection, transaction, translated_errors
from memharbor.errors import DatabaseError, StateRefusedError, VerificationError
from memharbor.names import ROLES
from memharbor.templates import ident, render

Way = Literal["copies", "restored-copy", "restore"]

# A restore point is a record of about 100 bytes, and may begin a page.
_POINT_BYTES_MAX = 16_384

# Orders of magnitude on the machine of docs/adr/0015, at 384 dimensions; good enough to choose by.
_SECONDS_PER_ROW_READ = 50e-6
_SECONDS_PER_ROW_WRITTEN = 400e-6
_BYTES_PER_SECOND = 50e6
_RESTORE_SECONDS = 20.0


@dataclass(frozen=True)
class RollbackPlan:
    """
    What a rollback will do.

    Args:
        checkpoint: Where to.
        way: How.
        why: Why this way and none of the others.
        seconds: The estimate of each way that is exact.
        refused: Why each of the other ways is not.
        changes: Rows that are not as they were, by table; `None` where that cannot be told beforehand.
        restore: The restore that the way needs, if it does.
    """

    checkpoint: Checkpoint
    way: Way
    why: str
    seconds: Mapping[Way, float]
    refused: Mapping[Way, str]
    changes: Mapping[str, Change] | None
    restore: RestorePlan | None

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        changes = self.changes
        return {
            "checkpoint": self.checkpoint.name,
            "scope": self.checkpoint.scope,
            "way": self.way,
            "why": self.why,
            "estimated_seconds": {way: round(seconds, 1) for way, seconds in self.seconds.items()},
            "refused": dict(self.refused),
            "changes": None if changes is None else {table: vars(change) for table, change in changes.items()},
        }


def plan_rollback(
    checkpoint: Checkpoint,
    connection: Connection | None,
    find_restore: Callable[[], RestorePlan] | None,
    *,
    wanted: Way | None = None,
) -> RollbackPlan:
    """
    Choose the cheapest way that is exact.

    Args:
        checkpoint: Where to.
        connection: The database, as its administrator; `None` where it does not answer.
        find_restore: Plans a restore to the checkpoint's point; `None` where there are no backups of ours.
        wanted: The way that is asked for.

    Raises:
        StateRefusedError: No way is exact, or not the one that is asked for.
    """
    refused: dict[Way, str] = {}
    seconds: dict[Way, float] = {}
    changes: dict[str, Change] | None = None
    problem = _refuse_rows(checkpoint, connection)
    restore, no_restore = _plan_restore(checkpoint, find_restore)
    rows_seconds = 1 + checkpoint.rows * 2 * _SECONDS_PER_ROW_READ
    if problem is not None:
        refused |= {"copies": problem, "restored-copy": problem}
    elif connection is not None and checkpoint.copies:
        changes = find_changes(connection, checkpoint)
        seconds["copies"] = rows_seconds + sum(each.total for each in changes.values()) * _SECONDS_PER_ROW_WRITTEN
        refused["restored-copy"] = "the rows were copied at the checkpoint"
    else:
        refused["copies"] = "its rows were not copied"
    if restore is None:
        refused |= {way: no_restore for way in ("restored-copy", "restore") if way not in refused}
    else:
        replay = max(0, (restore.target_lsn or 0) - restore.backup.stop_lsn)
        restore_seconds = _RESTORE_SECONDS + (restore.backup.database_bytes + replay) / _BYTES_PER_SECOND
        if "restored-copy" not in refused:
            seconds["restored-copy"] = restore_seconds + rows_seconds
        if checkpoint.is_everything:
            seconds["restore"] = restore_seconds
        else:
            refused["restore"] = f"it would take back more than {checkpoint.scope}"
    possible = [each for each in sorted(seconds, key=lambda each: seconds[each]) if wanted in (None, each)]
    if not possible:
        raise _no_way(checkpoint, refused, wanted)
    way = possible[0]
    return RollbackPlan(checkpoint, way, _why(way, seconds, refused), seconds, refused, changes, restore)


def _why(way: Way, seconds: Mapping[Way, float], refused: Mapping[Way, str]) -> str:
    said = {"copies": "puts the copied rows back", "restored-copy": "puts rows back out of a restored copy"}
    doing = said.get(way, "restores the whole cluster to the restore point, and whatever else is in it")
    others = [f"{other} takes about {cost:.0f} s" for other, cost in seconds.items() if other != way]
    others += [f"{other} is out: {reason}" for other, reason in refused.items()]
    return f"{doing}, exact, about {seconds[way]:.0f} s; {'; '.join(others)}" if others else f"{doing}, exact"


def _no_way(checkpoint: Checkpoint, refused: Mapping[Way, str], wanted: Way | None) -> StateRefusedError:
    reasons = [f"{way}: {reason}" for way, reason in refused.items() if wanted in (None, way)]
    hint = "run `memharbor backup list`"
    if checkpoint.point is not None and not checkpoint.is_everything:
        hint = f"to take everybody back: memharbor restore --name {checkpoint.point}"
    return StateRefusedError(
        "\n".join([f"no way back to checkpoint `{checkpoint.name}` would be exact", *reasons]), hint=hint
    )


def _refuse_rows(checkpoint: Checkpoint, connection: Connection | None) -> str | None:
    """Say why rows alone would not be exact; `None` where they are."""
    if connection is None:
        return "the database does not answer"
    try:
        changed = find_definition_changes(connection, checkpoint)
    except DatabaseError as exc:
        return f"the tables cannot be looked at: {exc.message}"
    if changed is None:
        return "the database does not know the checkpoint any more"
    if changed:
        return f"definitions are not as they were: {'; '.join(changed[:3])}{' …' if len(changed) > 3 else ''}"
    if not may_set(connection, "session_replication_role"):
        return "the administrator may not set session_replication_role, so that triggers would run"
    return None


def _plan_restore(
    checkpoint: Checkpoint, find_restore: Callable[[], RestorePlan] | None
) -> tuple[RestorePlan | None, str]:
    if find_restore is None or checkpoint.point is None:
        return None, "there are no backups of this database that Memharbor could restore"
    try:
        plan = find_restore()
    except StateRefusedError as exc:
        return None, exc.message
    distance = checkpoint.lsn - (plan.target_lsn or 0)
    if plan.timeline != checkpoint.timeline or not 0 <= distance <= _POINT_BYTES_MAX:
        return None, f"the newest restore point `{checkpoint.point}` is not this checkpoint's"
    return plan, ""


def put_rows_back(connection: Connection, checkpoint: Checkpoint) -> tuple[dict[str, Change], str | None]:
    """
    Make the rows in a checkpoint's scope what they were, from its copies, in one transaction.

    Writers wait, readers go on. Triggers do not run: what they made is in the copies too. Users who were erased since
    stay erased.

    Args:
        connection: Straight to the database, as its administrator; commits by statement.
        checkpoint: Has copies.

    Returns:
        What was put back, by table; and the restore point that was named before, if the server would name one.

    Raises:
        StateRefusedError: The tables' definitions are not as they were, or others do not let it have its locks.
        VerificationError: The rows would not be what was recorded; nothing was changed.
        DatabaseError: A statement was refused; nothing was changed.
    """
    refuse_missing_copies(connection, checkpoint)
    done: list[tuple[dict[str, Change], str | None]] = []

    def work(rows: DatabaseRows) -> None:
        changed = find_definition_changes(connection, checkpoint)
        if changed is None or changed:
            raise StateRefusedError("the tables were changed in this very moment", hint="run the command again")
        point = None
        if may_execute(connection, "pg_catalog.pg_create_restore_point(text)"):
            point = f"memharbor-before-rollback-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
            connection.execute("select pg_catalog.pg_create_restore_point(%s)", (point,))
        connection.execute("select pg_catalog.set_config('session_replication_role', 'replica', true)")
        erased = _erased_since(connection, checkpoint)
        changes = count_changes(connection, checkpoint)
        _replace_rows(connection, checkpoint)
        _refuse_wrong_result(connection, rows, checkpoint, erased)
        done.append((changes, point))

    everything = present_tables(connection, [*KEYS, "erase_ledger"])
    in_locked_transaction(connection, everything, "exclusive", work, what="the rollback")
    return done[-1]


def _replace_rows(connection: Connection, checkpoint: Checkpoint) -> None:
    for table in reversed(checkpoint.tables):
        connection.execute(
            f"""
            delete from {qualified(table)} t where {checkpoint.condition(table)} and not exists (
              select from {copy_name(checkpoint.copies[table])} s where {same_key(table)} and (t *= s)
            )
            """.encode()  # noqa: S608 - names of our own
        )
    for table in checkpoint.tables:
        connection.execute(
            f"""
            insert into {qualified(table)} overriding system value
            select s.* from {copy_name(checkpoint.copies[table])} s
            where not exists (select from {qualified(table)} t where {same_key(table)})
            """.encode()  # noqa: S608 - names of our own
        )


def _erased_since(connection: Connection, checkpoint: Checkpoint) -> set[str]:
    rows = connection.execute(
        "select distinct user_id_sha256 from memharbor.erase_ledger where coalesce(erased_at, requested_at) >= %s",
        (checkpoint.created_at,),
    ).fetchall()
    return {str(row[0]) for row in rows}


def _refuse_wrong_result(
    connection: Connection, rows: RowSource, checkpoint: Checkpoint, erased: Iterable[str]
) -> None:
    left = {table: change.total for table, change in count_changes(connection, checkpoint).items() if change.total}
    if left:
        table, count = next(iter(left.items()))
        raise VerificationError(
            f"{count:,} rows of `{table}` would not be as they were: others have taken their keys; nothing was changed",
            hint="run `memharbor checkpoint diff` with `--verbose`",
        )
    _refuse_orphans(connection, checkpoint)
    gone = set(erased)
    expected = {key: each for key, each in read_fingerprints(rows, checkpoint).items() if key[0] not in gone}
    found = {key: each for key, each in fingerprint(rows).items() if checkpoint.covers(each)}
    # What others had attached to an erased user's memories is gone with them: those tables were compared by row above.
    tables = [
        each for each in checkpoint.tables if not gone or each not in ("memory_relationships", "memory_categories")
    ]
    said = differences(expected, found, tables=tables)
    if said:
        raise VerificationError("\n".join(["the rows would not be what was recorded; nothing was changed", *said[:10]]))


def _refuse_orphans(connection: Connection, checkpoint: Checkpoint) -> None:
    """Check the foreign keys, which are triggers and did not run, wherever the scope touches them."""
    keys = connection.execute(
        """
        select c.conrelid::regclass::text, c.confrelid::regclass::text, k.attname, f.attname, r.relname
        from pg_catalog.pg_constraint c
        join pg_catalog.pg_class r on r.oid = c.conrelid
        join pg_catalog.pg_class p on p.oid = c.confrelid
        join pg_catalog.pg_attribute k on k.attrelid = c.conrelid and k.attnum = c.conkey[1]
        join pg_catalog.pg_attribute f on f.attrelid = c.confrelid and f.attnum = c.confkey[1]
        where c.contype = 'f' and cardinality(c.conkey) = 1 and c.connamespace = to_regnamespace('memharbor')
          and (r.relname = any (%(tables)s) or p.relname = any (%(tables)s))
        """,
        {"tables": list(checkpoint.tables)},
    ).fetchall()
    for child, parent, column, key, table in keys:
        row = connection.execute(
            f"""
            select count(*) from {child} c where c.{ident(column)} is not null
              and not exists (select from {parent} p where p.{ident(key)} = c.{ident(column)})
            """.encode()  # noqa: S608 - names of the catalog
        ).fetchone()
        if row and row[0]:
            raise StateRefusedError(
                f"{row[0]:,} rows of `{child}` would refer to rows of `{parent}` that are not there",
                hint=f"make checkpoints that cover `{table}` too",
            )


def fetch_copies(connection: Connection, checkpoint: Checkpoint, source: RowSource) -> Checkpoint:
    """
    Copy the rows in a checkpoint's scope out of a database that was restored to its point, as if at the checkpoint.

    Args:
        connection: The live database, as its administrator; commits by statement.
        checkpoint: Has no copies.
        source: The restored database.

    Returns:
        The checkpoint with copies, which are to be dropped in the end: `drop_fetched`.

    Raises:
        VerificationError: The restored rows are not those of the checkpoint.
    """
    refuse_other_rows(source, checkpoint)
    copies = {table: f"c{checkpoint.number}_{table}" for table in checkpoint.tables}
    erased = sorted(_erased_since(connection, checkpoint))
    drop_fetched(connection, checkpoint.with_copies(copies))  # of a run that was killed
    with translated_errors("fetch rows of the restored copy"), transaction(connection):
        for table, copy in copies.items():
            variables = {"condition": "false", "copy": copy, "owner": ROLES["owner"], "table": table}
            run_script(connection, render("checkpoint/copy_table.sql", variables))
            wanted = f"select * from {qualified(table)} where {checkpoint.condition(table)}"  # noqa: S608
            with connection.cursor() as cursor:
                with cursor.copy(f"copy {copy_name(copy)} from stdin (format binary)".encode()) as into:
                    for piece in source.copy_out(f"copy ({wanted}) to stdout (format binary)"):
                        into.write(piece)
                if table in OWNERS and erased:
                    digest = f"encode(sha256(convert_to({OWNERS[table]}, 'UTF8')), 'hex')"
                    cursor.execute(f"delete from {copy_name(copy)} where {digest} = any (%s)".encode(), (erased,))  # noqa: S608
    return checkpoint.with_copies(copies)


def drop_fetched(connection: Connection, checkpoint: Checkpoint) -> None:
    """Drop what `fetch_copies` fetched."""
    with translated_errors("drop fetched rows"), transaction(connection):
        run_script(connection, render("checkpoint/drop_copies.sql", {"copies": list(checkpoint.copies.values())}))


def refuse_other_rows(source: RowSource, checkpoint: Checkpoint) -> None:
    """
    Compare a database that was restored to a checkpoint's point with what was recorded.

    Raises:
        VerificationError: Its rows are not those of the checkpoint.
    """
    found = summarise(each for each in fingerprint(source).values() if checkpoint.covers(each))
    recorded = {table: list(summary) for table, summary in checkpoint.summary.items()}
    wrong = sorted(table for table in {*found, *recorded} if found.get(table) != recorded.get(table))
    if wrong:
        raise VerificationError(
            f"the rows of {', '.join(wrong)} are not those of checkpoint `{checkpoint.name}`",
            hint="run `memharbor backup verify`",
        )
