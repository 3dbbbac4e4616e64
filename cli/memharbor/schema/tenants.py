"""
Vector indexes of single users: who has enough memories gets a partial HNSW of their own, everybody else exact search.

The planner picks such an index for Mem0's unmodified SQL because its condition is Mem0's own filter expression. Each one
costs a little on every search and insert, so there is a limit. Why this and not one index for all: docs/concepts/schema.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from memharbor.database import Connection, run_statement, transaction, translated_errors
from memharbor.errors import StateRefusedError
from memharbor.schema import ledger
from memharbor.schema.downgrade import SERVICE
from memharbor.schema.migrations import context
from memharbor.schema.sessions import concurrent_session, drop_invalid_indexes, session
from memharbor.schema.statements import split_statements
from memharbor.settings import Settings
from memharbor.templates import render

INDEX_NAME_PREFIX = "memories_hnsw_"

TenantProgress = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class TenantIndex:
    """The vector index of one user; `row_count` is 0 where it is not known any more."""

    user_id: str
    index_name: str
    row_count: int


@dataclass(frozen=True)
class TenantIndexReport:
    """What was (or would be) done; `repaired` are invalid indexes that an interrupted build had left."""

    created: tuple[TenantIndex, ...]
    dropped: tuple[TenantIndex, ...]
    kept: tuple[TenantIndex, ...]
    waiting: tuple[TenantIndex, ...]
    repaired: tuple[str, ...]
    dry_run: bool = False

    @property
    def changed(self) -> bool:
        """Whether an index was (or would be) made or dropped."""
        return bool(self.created or self.dropped or self.repaired)


@dataclass(frozen=True)
class TenantChoice:
    """Which users get, lose and keep an index, and who waits because the limit is reached."""

    create: tuple[str, ...]
    drop: tuple[str, ...]
    keep: tuple[str, ...]
    wait: tuple[str, ...]


def index_name(user_id: str) -> str:
    """
    Name a user's index: the same each time, and safe whatever the user id holds.

    >>> index_name("alice")
    'memories_hnsw_6384e2b2184bcbf58eccf10ca7a6563c'
    """
    return INDEX_NAME_PREFIX + hashlib.md5(user_id.encode(), usedforsecurity=False).hexdigest()


def choose_tenants(
    row_counts: Mapping[str, int], indexed: frozenset[str], *, threshold_rows: int, limit: int
) -> TenantChoice:
    """
    Choose by size, and keep what there is until it is clearly too small, so that nobody's index comes and goes.

    Args:
        row_counts: Memories by user; users below half the threshold may be left out.
        indexed: Users who have an index.
        threshold_rows: From how many memories on a user gets one.
        limit: How many there may be.

    >>> choose_tenants({"a": 900, "b": 600, "c": 500}, frozenset({"c"}), threshold_rows=800, limit=1)
    TenantChoice(create=('a',), drop=('c',), keep=(), wait=())
    >>> choose_tenants({"c": 500}, frozenset({"c"}), threshold_rows=800, limit=1).keep
    ('c',)
    """
    wanted = sorted(
        (
            user
            for user, count in row_counts.items()
            if count >= (threshold_rows / 2 if user in indexed else threshold_rows)
        ),
        key=lambda user: (-row_counts[user], user not in indexed, user),
    )
    chosen, waiting = wanted[:limit], wanted[limit:]
    return TenantChoice(
        create=tuple(user for user in chosen if user not in indexed),
        drop=tuple(sorted(indexed - set(chosen))),
        keep=tuple(user for user in chosen if user in indexed),
        wait=tuple(user for user in waiting if user not in indexed),
    )


def tenant_indexes(
    connection: Connection, settings: Settings, *, dry_run: bool = False, progress: TenantProgress | None = None
) -> TenantIndexReport:
    """
    Give each large user a vector index, take it from those who became small. A second run does nothing.

    Indexes are built CONCURRENTLY: reads and writes go on. An interrupted run is continued by the next one.

    Args:
        connection: Straight to the database, as its administrator.
        settings: The configuration: threshold, limit and index parameters.
        dry_run: Say what would be done and change nothing; where the schema is missing, that is nothing.
        progress: Called before each index with `create` or `drop`, its name, the number and how many there are.

    Raises:
        StateRefusedError: The schema is not rolled out, or another roll-out is running.
        DatabaseError: A statement was refused.
    """
    with session(connection), ledger.advisory_lock(connection):
        if dry_run and not _is_rolled_out(connection):
            return TenantIndexReport((), (), (), (), (), dry_run)
        _refuse_missing_schema(connection)
        invalid = _read_invalid(connection) if dry_run else drop_invalid_indexes(connection)
        counts = _count_rows(connection, settings)
        indexed = frozenset(_read_indexed(connection) - {user for user in counts if index_name(user) in invalid})
        choice = choose_tenants(
            counts,
            indexed,
            threshold_rows=settings.tenant_index_threshold_rows,
            limit=settings.tenant_index_limit,
        )
        if not dry_run:
            _carry_out(connection, settings, choice, progress or (lambda *_: None))

        def described(users: tuple[str, ...]) -> tuple[TenantIndex, ...]:
            return tuple(TenantIndex(user, index_name(user), counts.get(user, 0)) for user in users)

        return TenantIndexReport(
            described(choice.create),
            described(choice.drop),
            described(choice.keep),
            described(choice.wait),
            invalid,
            dry_run,
        )


def _carry_out(connection: Connection, settings: Settings, choice: TenantChoice, progress: TenantProgress) -> None:
    work = [("drop", user) for user in choice.drop] + [("create", user) for user in choice.create]
    with concurrent_session(connection):
        for number, (verb, user) in enumerate(work, start=1):
            # The id of a user is the user's own data: progress and errors name the index, not whom it is for.
            name = index_name(user)
            progress(verb, name, number, len(work))
            variables = {**context(settings), "index_name": name, "user_id": user}
            with translated_errors(f"{verb} the vector index `{name}`"):
                for statement in split_statements(render(f"tenant/{verb}_index.sql", variables)):
                    run_statement(connection, statement)
        if work:
            # The planner weighs the new index against exact search by these numbers.
            with translated_errors("analyze memharbor.memories"):
                connection.execute("analyze memharbor.memories")


def _refuse_missing_schema(connection: Connection) -> None:
    if not _is_rolled_out(connection):
        raise StateRefusedError("the schema is not rolled out to this database", hint="memharbor schema apply")


def _is_rolled_out(connection: Connection) -> bool:
    return any(step.component == "policies" for step in ledger.read_applied(connection).values())


def _read_invalid(connection: Connection) -> tuple[str, ...]:
    with translated_errors("look for invalid indexes"), transaction(connection):
        return tuple(row[0] for row in connection.execute(render("catalog/invalid_indexes.sql", {})))


def _count_rows(connection: Connection, settings: Settings) -> dict[str, int]:
    minimum = max(1, settings.tenant_index_threshold_rows // 2)
    query = render("tenant/count_rows.sql", {"row_count_minimum": minimum})
    # The service role, because its policy shows every row, also to an administrator who is no superuser.
    with translated_errors("count the memories of each user"), transaction(connection, role=SERVICE):
        connection.execute("set local statement_timeout = 0")
        return dict(connection.execute(query).fetchall())


def _read_indexed(connection: Connection) -> set[str]:
    """Read who has an index; its comment is the user id, and its name proves it."""
    with translated_errors("read the users' vector indexes"), transaction(connection):
        rows = connection.execute(
            """
            select c.relname, coalesce(obj_description(c.oid, 'pg_class'), '') from pg_catalog.pg_index i
            join pg_catalog.pg_class c on c.oid = i.indexrelid
            where i.indrelid = pg_catalog.to_regclass('memharbor.memories') and i.indisvalid
              and c.relname like %s
            """,
            (INDEX_NAME_PREFIX.replace("_", r"\_") + "%",),
        ).fetchall()
    return {user for name, user in rows if name == index_name(user)}
