"""
Read tables of somebody else's PostgreSQL: every row once, in the order of its key, of one snapshot, a few at a time.

A source runs in one read-only transaction of isolation level REPEATABLE READ, so that what is written meanwhile changes
nothing, and through a server-side cursor, so that a large table takes no more memory than a small one. Row security is
switched off, which makes PostgreSQL refuse a query whose rows a policy would hide, instead of hiding them.

The identity of a source counts its rows and adds up a hash of each row's key and `xmin`: any insert, update and delete
changes it, one that touches nothing but an embedding too, and the embeddings need not be read for it. What its user is
called is hashed too, where that is looked up in another table. A view has no
`xmin`: there the hash is of the key and the data, and a change of an embedding alone is not noticed. Nor is, anywhere, a
change of the table's definition that leaves the rows alone.
Sources: PostgreSQL manual, Client Connection Defaults (row_security), DECLARE, System Columns; pgvector, vector_send.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, LiteralString

import psycopg
from psycopg import conninfo, pq, sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader

from memharbor.database import Connection, redact_dsn, server_text, translated_errors
from memharbor.errors import ConfigError, ConnectError, SourceDataError, StateRefusedError
from memharbor.migrate.record import Kind, RawItem, Refusal, SourceInfo
from memharbor.migrate.sources.catalog import JSON_TYPES, VECTOR_TYPES, Column, Relation, decode_vector
from memharbor.migrate.sources.json_values import Problem, parse_value, read_vector
from memharbor.migrate.sources.user_names import nameless_user

# Older than what Memharbor itself runs on: one moves away from these.
SERVER_MINIMUM_MAJOR = 12
_FETCH_ROWS = 200
_TABLES = "rpm"  # relations that have `xmin`: tables, partitioned ones, materialized views
_SETTINGS = {
    "search_path": "",
    "row_security": "off",
    "client_encoding": "UTF8",
    "timezone": "UTC",
    "extra_float_digits": "1",
    # A run may pause between two rows for as long as an embedding endpoint does.
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}


@dataclass(frozen=True)
class Part:
    """
    One relation of a source, read in the order of its key.

    Args:
        kind: What its rows are.
        key: Begins its positions; unlike that of every other part.
        relation: Where the rows are.
        id_column: Its key.
        vector_column: Where the embeddings are; `None` where there are none.
        data: Expression over the row `t` that gives its fields as JSON text, or NULL.
        owner: Expression over the row `t` that says as text what its user is called, in place of its `user_id`; `None`
            where that stays.
    """

    kind: Kind
    key: str
    relation: Relation
    id_column: str
    vector_column: str | None
    data: sql.Composable
    owner: sql.Composable | None = None


class PostgresSource:
    """
    A source that is tables of a PostgreSQL database; a subclass says which ones.

    Args:
        dsn: A libpq URI or key/value string of a role that sees all rows. It is a secret and is in no message.
    """

    name = "postgres"

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.notes: tuple[str, ...] = ()

    def find_parts(self, connection: Connection) -> Sequence[Part]:
        """
        Find the tables, memories first. It may set `notes`, which a person should read.

        Raises:
            SourceDataError: They are not there, or not what they should be.
        """
        raise NotImplementedError

    def make_item(self, item: RawItem) -> RawItem:
        """Change an item as it was read; a subclass may."""
        return item

    def describe(self) -> SourceInfo:
        """
        Say what there is; the rows are counted, their embeddings not read. See `Source`.

        Raises:
            SourceDataError: The tables are not there, or not what they should be.
            StateRefusedError: The role may not read all rows.
            ConnectError: The server does not answer or refuses the login.
        """
        with snapshot(self._dsn) as connection:
            parts = self._checked_parts(connection)
            counts: dict[str, int] = {}
            identity = [_identify_database(connection)]
            for part in parts:
                count, digest = _fingerprint(connection, part)
                counts[part.kind] = counts.get(part.kind, 0) + count
                identity.append(f"{part.relation.spelled}#{part.relation.oid}={count}/{digest}")
            size_bytes = sum(
                int(_row(connection, "select pg_total_relation_size(%s)", (part.relation.oid,))[0]) for part in parts
            )
            return SourceInfo(self.name, " ".join(identity), counts, _find_dims(connection, parts[0]), size_bytes)

    def read(self, after: str | None = None) -> Iterator[RawItem | Refusal]:
        """
        Read every row, part by part in the order of the keys. See `Source`.

        Raises:
            SourceDataError: The tables are not there, or `after` is no position of this source.
            StateRefusedError: The role may not read all rows.
            ConnectError: The server does not answer, or the connection was lost; what was read so far is good.
        """
        with snapshot(self._dsn) as connection:
            parts = self._checked_parts(connection)
            key, _, last = (after or "").partition(":")
            keys = [part.key for part in parts]
            if after is not None and key not in keys:
                raise SourceDataError(f"position `{after}` is none of this source, which has {', '.join(keys)}")
            begin = keys.index(key) if after is not None else 0
            for part in parts[begin:]:
                is_begun = after is not None and part.key == key
                for item in _read_part(connection, part, last if is_begun else None):
                    yield self.make_item(item) if isinstance(item, RawItem) else item

    def _checked_parts(self, connection: Connection) -> Sequence[Part]:
        parts = self.find_parts(connection)
        for part in parts:
            check_row_security(connection, part.relation)
        for part in parts:
            check_key(connection, part.relation, part.id_column)
        return parts


class _RawLoader(Loader):
    """Hands bytes on as they came: they are decoded one row at a time, where one bad row can be refused."""

    format = pq.Format.BINARY

    def load(self, data: Buffer) -> bytes:
        return bytes(data)


@contextmanager
def snapshot(dsn: str) -> Iterator[Connection]:
    """Lend a connection in one read-only snapshot."""
    with (
        translated_errors("reading the source"),
        closing(_connect(dsn)) as connection,
        _refused_rows(connection),
        connection.transaction(force_rollback=True),
    ):
        for name, value in _SETTINGS.items():
            connection.execute("select pg_catalog.set_config(%s, %s, true)", (name, value))
        yield connection


@contextmanager
def _refused_rows(connection: Connection) -> Iterator[None]:
    """Tell rows that a role may not see from other errors: a migration of some of them would look complete."""
    try:
        yield
    except psycopg.errors.InsufficientPrivilege as exc:
        raise StateRefusedError(
            f"role `{connection.info.user}` may not read all rows: {server_text(exc)}",
            hint="connect as the owner of the tables, or as a role with BYPASSRLS; on Supabase that is `postgres`",
        ) from exc


def _connect(dsn: str) -> Connection:
    try:
        target = conninfo.make_conninfo(dsn, application_name="memharbor migrate")
    except psycopg.Error:
        # The parser quotes what it chokes on, which may be a piece of the password.
        raise ConfigError(
            "the source's DSN cannot be read as a libpq connection string",
            hint="percent-encode special characters of the password, for instance `@` as `%40`",
        ) from None
    try:
        # A pooler in transaction mode may not know statements that are prepared.
        connection = psycopg.connect(target, autocommit=True, prepare_threshold=None)
    except psycopg.OperationalError as exc:
        raise ConnectError(f"cannot connect to {redact_dsn(target)}: {str(exc).strip()}") from exc
    major = connection.info.server_version // 10_000
    if major < SERVER_MINIMUM_MAJOR:
        connection.close()
        raise StateRefusedError(f"{redact_dsn(target)} is PostgreSQL {major}, older than {SERVER_MINIMUM_MAJOR}")
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    connection.adapters.register_loader("text", _RawLoader)
    return connection


def _row(
    connection: Connection, query: LiteralString | sql.Composed, parameters: Sequence[Any] = ()
) -> tuple[Any, ...]:
    found = connection.execute(query, parameters).fetchone()
    if found is None:
        raise SourceDataError("PostgreSQL answered with no row")
    return found


def check_row_security(connection: Connection, relation: Relation) -> None:
    """
    Refuse where a policy would hide rows from this role.

    Raises:
        StateRefusedError: One would.
    """
    is_active, role = _row(connection, "select row_security_active(%s::oid), current_user", (relation.oid,))
    if not is_active:
        return
    rows = connection.execute(
        "select r.rolname from pg_roles r join pg_class c on c.oid = %s where r.rolcanlogin"
        " and has_table_privilege(r.oid, c.oid, 'select') and (r.rolsuper or r.rolbypassrls"
        " or (not c.relforcerowsecurity and pg_has_role(r.oid, c.relowner, 'usage')))"
        " order by r.rolsuper, r.rolname limit 3",
        (relation.oid,),
    )
    names = " or ".join(f"`{row[0]}`" for row in rows)
    raise StateRefusedError(
        f"row security of `{relation.spelled}` would hide rows from role `{role}`",
        hint=f"connect as {names}, which sees all of them" if names else "connect as a role that has BYPASSRLS",
    )


def check_key(connection: Connection, relation: Relation, column: str) -> None:
    """
    Refuse a key that two rows share, or that a row lacks: going on behind it could not be exact.

    Raises:
        SourceDataError: It is one.
    """
    is_key = _row(
        connection,
        "select exists (select from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]"
        " where i.indrelid = %s and i.indisunique and i.indisvalid and i.indpred is null and i.indnkeyatts = 1"
        " and a.attname = %s and a.attnotnull)",
        (relation.oid, column),
    )[0]
    if is_key:
        return
    query = sql.SQL("select exists (select from {} t group by t.{} having count(*) > 1 or t.{} is null)").format(
        relation.quoted, sql.Identifier(column), sql.Identifier(column)
    )
    if _row(connection, query)[0]:
        raise SourceDataError(
            f"`{relation.spelled}` has rows without `{column}`, or two rows with the same one",
            hint=f"give every row one of its own, then `alter table {relation.spelled} add primary key ({column})`",
        )


def _identify_database(connection: Connection) -> str:
    database, may_ask = _row(
        connection,
        "select current_database(), has_function_privilege('pg_catalog.pg_control_system()'::regprocedure, 'execute')",
    )
    system = _row(connection, "select system_identifier from pg_control_system()")[0] if may_ask else "unknown"
    return f"{database}@{system}"


def _fingerprint(connection: Connection, part: Part) -> tuple[int, str]:
    """Count the rows of a part, and digest what tells any change of them; see the module."""
    key = sql.SQL("t.{}::text").format(sql.Identifier(part.id_column))
    version = (
        sql.SQL("t.xmin::text") if part.relation.kind in _TABLES else sql.SQL("coalesce({}, '')").format(part.data)
    )
    if part.owner is not None:
        version = sql.SQL("{} || '/' || coalesce({}, '')").format(version, part.owner)
    query = sql.SQL(
        "select count(*), coalesce(sum(hashtextextended({} || '/' || {}, 0)::numeric), 0)::text from {} t"
    ).format(key, version, part.relation.quoted)
    count, total = _row(connection, query)
    return int(count), f"{int(total) % (1 << 64):016x}"


def _find_dims(connection: Connection, part: Part) -> int | None:
    column = part.relation.find(part.vector_column)
    if column is None:
        return None
    if column.type_name in VECTOR_TYPES and column.modifier > 0:
        return column.modifier
    # A column without a length: the first row speaks for all, and `transform` looks at each.
    query = sql.SQL("select {} from {} t where t.{} is not null limit 1").format(
        _vector_expression(column), part.relation.quoted, sql.Identifier(column.name)
    )
    with connection.cursor(binary=True) as cursor:
        found = cursor.execute(query).fetchone()
    vector = _vector(found[0], column) if found is not None else None
    return None if vector is None or isinstance(vector, Problem) else len(vector)


def _vector_expression(column: Column | None) -> sql.Composable:
    if column is None:
        return sql.SQL("null::bytea")
    spelled = sql.SQL("t.{}").format(sql.Identifier(column.name))
    return sql.SQL("{}::text").format(spelled) if column.type_name in JSON_TYPES else spelled


def _read_part(connection: Connection, part: Part, last: str | None) -> Iterator[RawItem | Refusal]:
    key, relation = sql.Identifier(part.id_column), part.relation
    id_column, vector_column = relation.find(part.id_column), relation.find(part.vector_column)
    if id_column is None:
        raise SourceDataError(f"`{relation.spelled}` has no column `{part.id_column}`")
    vector, owner = _vector_expression(vector_column), part.owner or sql.SQL("null::text")
    condition: sql.Composable = sql.SQL("true")
    if last is not None:
        condition = sql.SQL("t.{} > %s::{}").format(key, sql.SQL(id_column.type))
    query = sql.SQL("select t.{}::text, {}, {}, {} from {} t where {} order by t.{}").format(
        key, vector, part.data, owner, relation.quoted, condition, key
    )
    with connection.cursor("memharbor_migrate") as cursor:
        cursor.itersize = _FETCH_ROWS
        cursor.execute(query, None if last is None else [last], binary=True)
        for raw_id, raw_vector, raw_data, raw_owner in cursor:
            source_id = raw_id.decode("utf-8", "replace")
            found = None if raw_vector is None or vector_column is None else _vector(raw_vector, vector_column)
            item = _make_item(part, source_id, raw_data, None if isinstance(found, Problem) else found)
            if isinstance(item, RawItem):
                item = _named(part, item, raw_owner)
            if isinstance(item, RawItem) and isinstance(found, Problem):
                item = _refused(item, found)
            yield item


def _vector(value: Any, column: Column) -> Sequence[float] | Problem | None:
    if column.type_name in JSON_TYPES:
        parsed = parse_value(bytes(value))
        return parsed if isinstance(parsed, Problem) else read_vector(parsed)
    return decode_vector(bytes(value), column.type_name) if column.type_name in VECTOR_TYPES else list(value)


def _named(part: Part, item: RawItem, owner: bytes | None) -> RawItem | Refusal:
    """Put what a user is called in place of its number."""
    number = item.data.get("user_id")
    if part.owner is None or number is None:
        return item
    if not owner:
        name, problem = nameless_user(number)
        return _refused(replace(item, data={**item.data, "user_id": name}), problem)
    return replace(item, data={**item.data, "user_id": owner.decode("utf-8", "replace")})


def _refused(item: RawItem, problem: Problem) -> Refusal:
    return Refusal(problem.reason, problem.detail, item)


def _make_item(part: Part, source_id: str, raw: bytes | None, vector: Sequence[float] | None) -> RawItem | Refusal:
    def refuse(reason: str, detail: str) -> Refusal:
        text = None if raw is None else raw.decode("utf-8", "replace")
        return Refusal(reason, detail, RawItem(part.kind, source_id, {"payload": text}, position, vector))

    position = f"{part.key}:{source_id}"
    if raw is None:
        return refuse("bad-json", "its fields are NULL")
    try:
        data = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return refuse("bad-text", "it is no UTF-8")
    except RecursionError:
        return refuse("bad-json", "it is nested too deep")
    except ValueError as exc:  # an integer of more digits than Python reads
        return refuse("bad-number", str(exc))
    if not isinstance(data, Mapping):
        return refuse("bad-json", f"it is no JSON object but a {type(data).__name__}")
    return RawItem(part.kind, source_id, data, position, vector)
