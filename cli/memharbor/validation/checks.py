"""
The nine checks: each really does the thing it is named after.

A check returns what it found, or raises `CheckError`, or `NotApplicableError` where it cannot be made.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg import sql
from psycopg_pool import ConnectionPool

from memharbor import schema, versions
from memharbor.database import Connection, connect
from memharbor.mem0 import UserPool
from memharbor.validation.probe import Probe
from memharbor.validation.results import CheckError, NotApplicableError, require

# Above ten executions psycopg has prepared the statement and PostgreSQL may have chosen a plan for every user at once.
SEARCH_COUNT = 15
# How often two clients are compared until one gets the server connection of the other; a busy pool may lend it elsewhere.
POOL_TRIES = 50


def check_extension(probe: Probe) -> str:
    """Ask for pgvector's version and let it compute."""
    with closing(connect(probe.context.admin_dsn)) as connection:
        row = connection.execute("select extversion from pg_extension where extname = 'vector'").fetchone()
        require(row is not None, "extension `vector` is missing", "memharbor schema apply")
    version = str(row[0]) if row else ""
    found = tuple(int(part) for part in version.split(".")[:3])
    minimum = ".".join(map(str, versions.PGVECTOR_MINIMUM))
    require(found >= versions.PGVECTOR_MINIMUM, f"pgvector {version} is older than {minimum}", "memharbor doctor")
    with probe.act_as(probe.alice) as connection:
        distance = connection.execute("select '[1,2,3]'::vector <-> '[1,2,5]'::vector").fetchone()
    require(distance == (2.0,), f"pgvector computes {distance}, not 2")
    return f"pgvector {version} computes as {connection.info.user}"


def check_tables(probe: Probe) -> str:
    """Compare everything that was rolled out with what is there, and look as Mem0 looks."""
    with closing(connect(probe.context.admin_dsn, autocommit=True)) as connection:
        findings = schema.verify(
            connection, probe.context.settings, connect=lambda name: connect(probe.context.admin_dsn, dbname=name)
        )
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise CheckError(findings[0].message + more, findings[0].hint)
    with probe.act_as(probe.alice) as connection:
        query = "select table_name from information_schema.tables where table_schema = 'public'"
        seen = {row[0] for row in connection.execute(query)}
    missing = {"memories", "mem0", "mem0_entities", "memories_entities"} - seen
    require(not missing, f"Mem0 does not see {', '.join(sorted(missing))}", "memharbor schema apply")
    return "every object is as it was rolled out, and Mem0 finds its collections"


def check_indexes(probe: Probe) -> str:
    """Let PostgreSQL explain Mem0's own statements: each must be able to take its index."""
    vector = [1.0] * probe.context.settings.embedding_dims
    with closing(connect(probe.context.admin_dsn, autocommit=True)) as connection:
        invalid = connection.execute(
            "select indexrelid::regclass::text from pg_index join pg_class on oid = indrelid"
            " where relnamespace = 'memharbor'::regnamespace and not indisvalid"
        ).fetchall()
        require(not invalid, f"index {invalid[0][0] if invalid else ''} is invalid", "memharbor schema apply")
        tenants = schema.tenant_indexes(connection, probe.context.settings, dry_run=True)
    used = set()
    for pool in (probe.as_user(probe.alice), probe.service_pool):
        store = probe.mem0(pool).vector_store
        store.search("probe", vector, 60, {"user_id": probe.alice})
        used |= explain_noted(probe, pool)
    own = [index for index in tenants.kept if index.index_name in explain_for(probe, index.user_id)]
    store.keyword_search("probe", 60)  # everybody's, as the service role: only the text index can serve it
    used |= explain_noted(probe, probe.service_pool)
    detail = f"Mem0's own statements take {', '.join(sorted(used))}"
    if tenants.kept:
        detail += f"; {len(own)} of {len(tenants.kept)} large users' searches take their own index"
    if tenants.created:
        detail += f"; {len(tenants.created)} large users have none yet: memharbor schema apply --component indexes"
    return detail


def explain_noted(probe: Probe, pool: ConnectionPool[Any] | UserPool) -> set[str]:
    """
    Name the indexes in the plan of Mem0's last statement.

    In a small table reading everything is right, so it is asked what happens where that is not possible.

    Raises:
        CheckError: The memories could only be read as a whole.
    """
    with pool.connection() as connection:
        connection.execute("set local enable_seqscan = off")
        nodes = explain(probe, connection)
    role = connection.info.user
    whole = any(node["Node Type"] == "Seq Scan" and node.get("Relation Name") == "memories" for node in nodes)
    require(not whole, f"Mem0's search as {role} reads the whole table", "memharbor schema verify")
    found = {node["Index Name"] for node in nodes if "Index Name" in node}
    require(bool(found), f"Mem0's search as {role} uses no index", "memharbor schema verify")
    return found


def explain_for(probe: Probe, user_id: str) -> set[str]:
    """Name the indexes that Mem0's last statement would take for another user; nothing of theirs is read."""
    with probe.service_pool.connection() as connection:
        return {node.get("Index Name", "") for node in explain(probe, connection, user_id)}


def explain(probe: Probe, connection: Connection, user_id: str | None = None) -> list[dict[str, Any]]:
    """List the nodes of the plan of Mem0's last statement, for the probe's user or for another one."""
    if probe.noted is None:
        raise CheckError("Mem0 executed no statement that could be explained")
    statement, parameters = probe.noted
    if user_id is not None:
        parameters = tuple(user_id if value == probe.alice else value for value in parameters)
    row = connection.execute(b"explain (format json) " + statement.as_bytes(connection), parameters).fetchone()
    return list(_plan_nodes(row[0][0]["Plan"])) if row else []


def _plan_nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _plan_nodes(child)


def check_policies(probe: Probe) -> str:
    """Write as one user, then try everything as another and as nobody."""
    identifier = uuid.uuid4()
    with probe.act_as(probe.alice) as connection:
        connection.execute(
            "insert into memories (id, user_id, memory) values (%s, %s, 'private')", (identifier, probe.alice)
        )
    with probe.act_as(probe.bob) as connection:
        for table in ("memories", "mem0", "mem0_memories", "memory_history"):
            seen = connection.execute(sql.SQL("select count(*) from {}").format(sql.Identifier(table))).fetchone()
            require(seen == (0,), f"a new user sees {seen[0] if seen else '?'} rows of others in {table}", _RLS_HINT)
        for statement in ("update memories set memory = 'taken' where id = %s", "delete from memories where id = %s"):
            touched = connection.execute(statement.encode(), (identifier,)).rowcount
            require(touched == 0, f"another user's row was changed by `{statement}`", _RLS_HINT)
    refuse(probe.as_user(probe.bob), "insert into memories (user_id, memory) values (%s, 'planted')", (probe.alice,))
    refuse(probe.app_pool, "insert into memories (user_id, memory) values (%s, 'planted')", (probe.alice,))
    refuse(probe.as_user(probe.alice), "update memories set user_id = %s where id = %s", (probe.bob, identifier))
    with probe.app_pool.connection() as connection:
        seen = connection.execute("select count(*) from memories").fetchone()
        require(seen == (0,), "a client that does not say who it is sees memories", _RLS_HINT)
    with probe.act_as(probe.alice) as connection:
        own = connection.execute("select memory from memories where id = %s", (identifier,)).fetchone()
    require(own == ("private",), "the user does not see the memory as it was written", _RLS_HINT)
    return "foreign reads, updates, deletes and inserts are refused, and so is a client without a user"


_RLS_HINT = "memharbor schema apply --component policies"


def refuse(pool: ConnectionPool[Any] | UserPool, statement: str, parameters: Sequence[object]) -> None:
    """Try something that row level security must refuse; what is not refused is rolled back."""
    try:
        with pool.connection() as connection:
            connection.execute(statement.encode(), parameters)
            connection.rollback()
    except psycopg.errors.InsufficientPrivilege:
        return
    raise CheckError(f"row level security did not refuse `{statement}`", _RLS_HINT)


def check_pooling(probe: Probe) -> str:
    """Show that clients share server connections, and that one leaves nothing on them for the next."""
    if not probe.context.is_pooled:
        raise NotApplicableError("this database was not made by `pulumi up`: pooling is its provider's")
    dsn, shared = probe.context.app_dsn, 0
    leave = "select pg_backend_pid() from set_config('app.user_id', %s, false)"
    find = "select pg_backend_pid(), current_setting('app.user_id', true)"
    with closing(connect(dsn, autocommit=True)) as one, closing(connect(dsn, autocommit=True)) as other:
        try:
            for _ in range(POOL_TRIES):
                ((left_on,),) = one.execute(leave, (probe.alice,)).fetchall()
                ((found_on, identity),) = other.execute(find).fetchall()
                require(identity != probe.alice, "an identity reached the next client", _POOL_HINT)
                shared += left_on == found_on
        finally:
            one.execute("reset app.user_id")
    require(shared > 0, "two clients never shared a server connection: this is no transaction pool", _POOL_HINT)
    port = psycopg.conninfo.conninfo_to_dict(dsn).get("port")
    return f"clients of port {port} share server connections ({shared} of {POOL_TRIES} times), and no identity stays"


_POOL_HINT = "memharbor doctor"


def check_backup(probe: Probe) -> str:
    """Let the store take WAL, ask for the newest backup, and PostgreSQL whether WAL reaches the archive."""
    if probe.context.backup_status is None:
        raise NotApplicableError("this database was not made by `pulumi up`: physical backups are its provider's")
    status = probe.context.backup_status()
    require(not status.problem, status.problem, "memharbor doctor")
    with closing(connect(probe.context.admin_dsn)) as connection:
        row = connection.execute(
            "select coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false), last_failed_wal"
            " from pg_stat_archiver"
        ).fetchone()
    if row and row[0]:
        raise CheckError(f"WAL segment {row[1]} could not be archived", "memharbor doctor")
    if status.newest_at is None:
        return f"WAL is archived; {status.detail}"
    age_hours = (datetime.now(UTC) - status.newest_at).total_seconds() / 3600
    return f"{status.detail}, {age_hours:.1f} hours old; WAL is archived"


def check_crud(probe: Probe) -> str:
    """Let Mem0 add, get, list, update and delete a memory, and compare the canonical row."""
    memory, user_id = probe.mem0(probe.as_user(probe.alice)), probe.alice
    added = memory.add("The probe likes tea", user_id=user_id, infer=False, metadata={"topic": "drinks"})["results"]
    require(len(added) == 1, f"Mem0 stored {len(added)} memories instead of one")
    identifier = added[0]["id"]
    got = memory.get(identifier)
    require(bool(got) and got["memory"] == "The probe likes tea", f"Mem0 got back {got}")
    memory.update(identifier, text="The probe likes coffee")
    listed = memory.get_all(filters={"user_id": user_id, "topic": "drinks"})["results"]
    require([item["memory"] for item in listed] == ["The probe likes coffee"], f"Mem0 lists {listed}")
    with probe.act_as(user_id) as connection:
        row = connection.execute(
            "select memory, metadata ->> 'topic', embedding is not null from memories where id = %s", (identifier,)
        ).fetchone()
    require(row == ("The probe likes coffee", "drinks", True), f"the canonical row is {row}")
    memory.delete(identifier)
    require(memory.get(identifier) is None, "a deleted memory is still there")
    return "Mem0 added, got, updated, listed and deleted a memory"


def check_search(probe: Probe) -> str:
    """Let Mem0 search often enough for a prepared plan; every answer must be complete and its own."""
    texts = ["The probe sails to Madeira", "The probe repairs clocks", "The probe grows tomatoes"]
    as_app, as_service = probe.mem0(probe.as_user(probe.bob)), probe.mem0(probe.service_pool)
    for text in texts:
        as_app.add(text, user_id=probe.bob, infer=False)
    begun_at = time.monotonic()
    for memory, role in ((as_app, "app"), (as_service, "service")):
        for _ in range(SEARCH_COUNT):
            answer = memory.search("who repairs clocks", filters={"user_id": probe.bob}, threshold=0.0)["results"]
            found = [item["memory"] for item in answer]
            require(sorted(found) == sorted(texts), f"search {found} as {role}, not all three memories")
            require(found[0] == texts[1], f"search as {role} finds `{found[0]}` first")
    milliseconds = (time.monotonic() - begun_at) / (2 * SEARCH_COUNT) * 1000
    return f"{2 * SEARCH_COUNT} searches by Mem0 found all, the nearest first; {milliseconds:.0f} ms each"


def check_graph(probe: Probe) -> str:
    """Relate three memories in a row and walk one and two steps, as their user and as another."""
    first, second, third = (uuid.uuid4() for _ in range(3))
    with probe.act_as(probe.alice) as connection:
        if connection.execute("select to_regclass('public.memory_relationships')").fetchone() == (None,):
            raise NotApplicableError("the graph is not enabled")
        for identifier in (first, second, third):
            connection.execute(
                "insert into memories (id, user_id, memory) values (%s, %s, 'node')", (identifier, probe.alice)
            )
        for source, target in ((first, second), (second, third)):
            connection.execute(
                "insert into memory_relationships (source_memory_id, target_memory_id, relationship_type, strength)"
                " values (%s, %s, 'related_to', 0.5)",
                (source, target),
            )
        walk = "select id, distance, strength::float from memharbor.related_memories(%s, %s) order by distance"
        near = connection.execute(walk, (first, 1)).fetchall()
        far = connection.execute(walk, (first, 2)).fetchall()
    require(near == [(second, 1, 0.5)], f"one step away: {near}")
    require(far == [(second, 1, 0.5), (third, 2, 0.25)], f"two steps away: {far}")
    with probe.act_as(probe.bob) as connection:
        require(connection.execute(walk, (first, 2)).fetchall() == [], "another user walks this graph", _RLS_HINT)
    return "memories one and two relationships away are found, by their user only"


def check_count(probe: Probe) -> str:
    """Count the memories after a migration, those without an embedding, and their users."""
    expected = probe.context.expected_count
    with closing(connect(probe.context.service_dsn)) as connection:
        row = connection.execute(
            "select count(*), count(*) filter (where embedding is null), count(distinct user_id), min(left(memory, 50))"
            " from public.memories"
        ).fetchone() or (0, 0, 0, None)
    count, bare, users, sample = row
    require(count == expected, f"there are {count:,} memories, not {expected:,}", "memharbor migrate compare")
    require(bare == 0, f"{bare:,} of {count:,} memories have no embedding", "memharbor migrate embed --model NAME")
    return f"{count:,} memories of {users:,} users, all with embeddings; one of them: {sample!r}"


CHECKS: tuple[tuple[str, Callable[[Probe], str]], ...] = (
    ("pgvector", check_extension),
    ("tables", check_tables),
    ("indexes", check_indexes),
    ("row level security", check_policies),
    ("connection pooling", check_pooling),
    ("backup", check_backup),
    ("memory CRUD", check_crud),
    ("vector search", check_search),
    ("graph", check_graph),
)
