"""
What an erased user leaves in a database besides rows: an index that names them, statistics, bytes in the files.

Deleting a row marks it; VACUUM makes its place free and leaves its bytes until something else is written there. Only
rewriting a table removes them. Sources: PostgreSQL manual, Routine Vacuuming and VACUUM; measured in
docs/adr/0015-checkpoints-and-erasure.md.
"""

from __future__ import annotations

from memharbor.backup.access import all_rows, may_set, present_tables, run_script
from memharbor.backup.tables import USER_TABLES
from memharbor.database import Connection, run_statement, transaction, translated_errors
from memharbor.errors import VerificationError
from memharbor.output import Output
from memharbor.schema.sessions import concurrent_session
from memharbor.schema.tenants import index_name
from memharbor.templates import ident, render

LOCK_TIMEOUT_MS = 30_000
# Where the catalog keeps a user's id or text: conditions and comments of indexes, most common values.
_CATALOGS = ("pg_index", "pg_description", "pg_statistic")
_STATISTICS_FUNCTION = "pg_catalog.pg_clear_attribute_stats(text, text, text, boolean)"


def remove_traces(connection: Connection, user_id: str, output: Output, *, rewrite: bool) -> None:
    """
    Remove what names a user in the catalog, and free or rewrite the files that held their rows.

    Repeating it does no harm.

    Args:
        connection: Straight to the database, as its administrator; commits by statement.
        user_id: The user, whose rows are gone.
        output: Where the steps are told.
        rewrite: Write the tables anew, so that the bytes are gone from the files: everybody waits for each table.

    Raises:
        DatabaseError: A statement was refused.
        VerificationError: The catalog still names the user.
    """
    name = index_name(user_id)
    row = connection.execute("select to_regclass(%s) is not null", (f"memharbor.{ident(name)}",)).fetchone()
    if row and row[0]:
        doing = f"drop the vector index `{name}`"
        with output.step("Drop the user's vector index"), concurrent_session(connection), translated_errors(doing):
            run_script(connection, render("tenant/drop_index.sql", {"index_name": name}))
    tables = _tables_with_users(connection)
    with output.step("Forget the statistics"):
        _renew_statistics(connection, tables)
    doing = "Write the tables anew" if rewrite else "Free what was deleted"
    with output.step(doing):
        _vacuum(connection, [*tables, *(f"pg_catalog.{name}" for name in _CATALOGS)], rewrite=rewrite)
    _refuse_traces(connection, user_id)


def _tables_with_users(connection: Connection) -> list[str]:
    """List the tables that hold rows of users, the copies of checkpoints among them, quoted."""
    pattern = f"^(c[0-9]+_)?({'|'.join(table.name for table in USER_TABLES)})$"
    rows = connection.execute(
        """
        select n.nspname, c.relname from pg_catalog.pg_class c
        join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where c.relkind = 'r' and c.relname ~ %s
          and (n.nspname = 'memharbor' and c.relname !~ '^c[0-9]+_' or n.nspname = 'memharbor_checkpoint')
        order by 1, 2
        """,
        (pattern,),
    ).fetchall()
    return [f"{ident(schema)}.{ident(table)}" for schema, table in rows]


def _renew_statistics(connection: Connection, tables: list[str]) -> None:
    for table in tables:
        with translated_errors(f"analyze {table}"):
            run_statement(connection, f"analyze {table}")
    # ANALYZE leaves the statistics of a table without rows as they were, and those of its indexes.
    names = present_tables(connection, [table.name for table in USER_TABLES])
    with translated_errors("forget statistics"), transaction(connection), all_rows(connection, names):
        empty = [table for table in tables if not connection.execute(f"select from {table} limit 1".encode()).rowcount]
        if not empty:
            return
        own = """
            select s.schemaname, s.tablename, s.attname, s.inherited from pg_catalog.pg_stats s
            where s.schemaname in ('memharbor', 'memharbor_checkpoint') and to_regclass(
                format('%%I.%%I', s.schemaname, s.tablename)) in (
              select t::regclass from unnest(%(tables)s::text[]) t
              union all
              select indexrelid from pg_catalog.pg_index where indrelid in (
                select t::regclass from unnest(%(tables)s::text[]) t))
        """
        function = connection.execute("select to_regprocedure(%s) is not null", (_STATISTICS_FUNCTION,)).fetchone()
        if function and function[0]:
            connection.execute(
                f"select pg_catalog.pg_clear_attribute_stats(schemaname, tablename, attname, inherited) from ({own}) s".encode(),  # noqa: S608
                {"tables": empty},
            )
        elif may_set(connection, "allow_system_table_mods"):
            # Before PostgreSQL 18 only a superuser can.
            connection.execute(
                """
                delete from pg_catalog.pg_statistic where starelid in (
                  select t::regclass from unnest(%(tables)s::text[]) t
                  union all
                  select indexrelid from pg_catalog.pg_index where indrelid in (
                    select t::regclass from unnest(%(tables)s::text[]) t))
                """,
                {"tables": empty},
            )


def _vacuum(connection: Connection, tables: list[str], *, rewrite: bool) -> None:
    connection.execute("select pg_catalog.set_config('lock_timeout', %s, false)", (f"{LOCK_TIMEOUT_MS}ms",))
    connection.execute("set statement_timeout = 0")
    try:
        for table in tables:
            with translated_errors(f"vacuum {table}"):
                run_statement(connection, f"vacuum {'(full)' if rewrite else ''} {table}")
        if rewrite:
            with translated_errors("write the files out"):
                # The old files are removed by the next checkpoint of the server.
                if may_checkpoint(connection):
                    run_statement(connection, "checkpoint")
    finally:
        if not connection.closed:
            connection.execute("reset lock_timeout")
            connection.execute("reset statement_timeout")


def may_checkpoint(connection: Connection) -> bool:
    """Tell whether the login may ask the server to write its buffers out."""
    row = connection.execute("select pg_catalog.pg_has_role(current_user, 'pg_checkpoint', 'usage')").fetchone()
    return bool(row and row[0])


def find_traces(connection: Connection, user_id: str) -> list[str]:
    """Name where the catalog still says a user's id; nothing where it does not."""
    with translated_errors("look for traces in the catalog"):
        rows = connection.execute(
            """
            select 'statistics of ' || tablename || '.' || attname from pg_catalog.pg_stats
            where schemaname in ('memharbor', 'memharbor_checkpoint') and attname in ('user_id', 'expr')
              and (%(user)s = any (most_common_vals::text::text[]) or %(user)s = any (histogram_bounds::text::text[]))
            union all
            select 'comment of ' || objoid::regclass::text from pg_catalog.pg_description
            where classoid = 'pg_catalog.pg_class'::regclass and description = %(user)s
            union all
            select 'condition of ' || indexrelid::regclass::text from pg_catalog.pg_index i
            where indrelid = to_regclass('memharbor.memories')
              and pg_get_expr(indpred, indrelid) = format('((payload ->> ''user_id''::text) = %%L::text)', %(user)s::text)
            """,
            {"user": user_id},
        ).fetchall()
    return [str(row[0]) for row in rows]


def _refuse_traces(connection: Connection, user_id: str) -> None:
    found = find_traces(connection, user_id)
    if found:
        raise VerificationError(
            f"the user's rows are gone, but the catalog still names them: {', '.join(found[:5])}",
            hint="run the command again",
        )
