"""Roles, passwords and the database itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from memharbor import schema
from memharbor.database import Connection, connect
from memharbor.errors import ConfigError, StateRefusedError
from tests.memory_database import Server
from tests.schema_databases import admin_connection, apply_roles, drop_database, scratch_database, settings_for

ADMIN = "schema_test_admin"


@pytest.fixture
def admin(server: Server) -> Iterator[Connection]:
    apply_roles(server)
    with closing(admin_connection(server)) as opened:
        yield opened


def again(server: Server, passwords: dict[str, str], *, dry_run: bool = False) -> schema.RolesReport:
    return schema.apply_roles(
        lambda database: admin_connection(server, database), settings_for("nowhere"), passwords, dry_run=dry_run
    )


def test_a_second_run_with_the_same_passwords_changes_nothing(server: Server, admin: Connection) -> None:
    report = again(server, server.passwords)
    assert (report.changed, report.details, report.notices) == (False, (), ())


def test_every_role_can_log_in_with_its_password(server: Server) -> None:
    with scratch_database(server) as name:
        for role in schema.ROLES:
            with closing(connect(server.direct_dsn(name, role))) as connection:
                assert connection.execute("select current_user").fetchone() == (f"memharbor_{role}",)


def test_another_password_is_given_and_the_old_one_ends(server: Server, admin: Connection) -> None:
    try:
        foretold = again(server, {"readonly": "näw p@ss'\\"}, dry_run=True)
        assert foretold.details == ("role memharbor_readonly was given its password",)
        connect(server.direct_dsn("postgres", "readonly")).close()
        done = again(server, {"memharbor_readonly": "näw p@ss'\\"})
        assert done.details == foretold.details
        assert again(server, {"readonly": "näw p@ss'\\"}).changed is False
        connect(make_conninfo(server.direct_dsn("postgres", "readonly"), password="näw p@ss'\\")).close()
    finally:
        again(server, server.passwords)


def test_no_password_stands_in_what_the_server_sees(server: Server, admin: Connection) -> None:
    sent: list[str] = []

    class Recording(psycopg.Connection[tuple[object, ...]]):
        def execute(self, query, *args, **options):  # type: ignore[no-untyped-def]
            sent.append(str(query))
            return super().execute(query, *args, **options)

    try:
        schema.apply_roles(
            lambda database: Recording.connect(server.admin_dsn(database)),
            settings_for("nowhere"),
            {"app": "visible-Secret"},
        )
    finally:
        again(server, server.passwords)
    assert any("SCRAM-SHA-256" in text for text in sent)
    assert not any("visible-Secret" in text for text in sent)


def test_a_role_that_was_given_too_much_loses_it(server: Server, admin: Connection) -> None:
    admin.execute("alter role memharbor_app createdb createrole bypassrls")
    foretold = again(server, {}, dry_run=True)
    assert foretold.details == ("role memharbor_app was changed",)
    assert again(server, {}).changed
    row = admin.execute(
        "select rolcreatedb, rolcreaterole, rolbypassrls, rolsuper from pg_roles where rolname = 'memharbor_app'"
    ).fetchone()
    assert row == (False, False, False, False)


def test_only_backup_bypasses_row_security_and_only_replicator_replicates(admin: Connection) -> None:
    rows = admin.execute(
        "select rolname, rolbypassrls, rolreplication from pg_roles where rolname like 'memharbor\\_%' order by 1"
    ).fetchall()
    assert {name for name, bypass, _ in rows if bypass} == {"memharbor_backup"}
    assert {name for name, _, replication in rows if replication} == {"memharbor_replicator"}
    assert len(rows) == 8


def test_rewind_may_read_files_in_database_postgres(server: Server, admin: Connection) -> None:
    with closing(connect(server.direct_dsn("postgres", "rewind"))) as connection:
        for query in ("select pg_ls_dir('.', true, false)", "select pg_read_binary_file('PG_VERSION')"):
            assert connection.execute(query).fetchone() is not None
    with (
        closing(connect(server.direct_dsn("postgres", "app"))) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute("select pg_read_binary_file('PG_VERSION')")


def test_the_ledger_of_a_database_learns_of_a_repaired_role(server: Server, admin: Connection) -> None:
    with scratch_database(server) as name:
        settings = settings_for(name)
        with closing(admin_connection(server, name)) as connection:
            schema.apply(connection, settings, components=["settings"])
            admin.execute("comment on role memharbor_app is 'changed by hand'")
            schema.apply(connection, settings, adopt_drift=True)
        schema.apply_roles(lambda database: admin_connection(server, database), settings, {})
        with closing(admin_connection(server, name)) as connection:
            assert schema.verify(connection, settings) == []


@pytest.mark.parametrize(("passwords", "problem"), [({"ap": "x"}, "`ap` is no role"), ({"app": ""}, "is empty")])
def test_a_password_for_nobody_or_of_nothing_is_refused(
    server: Server, passwords: dict[str, str], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        again(server, passwords)


def test_the_pooler_looks_up_applications_and_nobody_who_could_go_around_it(server: Server) -> None:
    with scratch_database(server) as name, closing(connect(server.direct_dsn(name, "pooler"))) as connection:
        found = {
            role: connection.execute("select secret from memharbor_pooler.lookup(%s)", (role,)).fetchone()
            for role in ("memharbor_app", "memharbor_service", "memharbor_replicator", "postgres", "nobody")
        }
        assert {role for role, row in found.items() if row} == {"memharbor_app", "memharbor_service"}
        assert all(str(row[0]).startswith("SCRAM-SHA-256$") for row in found.values() if row)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("select rolpassword from pg_authid")
        connection.rollback()
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("select * from memharbor.memories")


def test_dropping_the_schema_leaves_the_pooler_its_lookup(server: Server) -> None:
    with scratch_database(server) as name, closing(admin_connection(server, name)) as connection:
        connection.execute("drop schema memharbor cascade")
        with closing(connect(server.direct_dsn(name, "pooler"))) as pooler:
            assert pooler.execute("select count(*) from memharbor_pooler.lookup('memharbor_app')").fetchone() == (1,)


def test_the_database_is_created_once(server: Server, admin: Connection) -> None:
    settings = settings_for("schema_created")
    try:
        assert schema.ensure_database(admin, settings, dry_run=True) is True
        assert schema.ensure_database(admin, settings) is True
        assert schema.ensure_database(admin, settings) is False
        row = admin.execute(
            "select pg_get_userbyid(datdba), pg_encoding_to_char(encoding) from pg_database where datname = %s",
            (settings.database,),
        ).fetchone()
        assert row == ("memharbor_owner", "UTF8")
    finally:
        drop_database(server, settings.database)


def test_a_database_that_cannot_hold_every_text_is_refused(server: Server, admin: Connection) -> None:
    admin.execute("create database schema_ascii template template0 encoding 'SQL_ASCII' locale 'C'")
    try:
        with pytest.raises(StateRefusedError, match="encoding SQL_ASCII"):
            schema.ensure_database(admin, settings_for("schema_ascii"))
    finally:
        drop_database(server, "schema_ascii")


@pytest.fixture
def managed(server: Server, admin: Connection) -> Iterator[str]:
    """The DSN of an administrator who is no superuser, as managed services have it."""
    admin.execute(f"drop role if exists {ADMIN}")
    admin.execute(f"create role {ADMIN} login createrole createdb password 'managed'")
    # Whoever creates a role is its administrator; here the roles exist already.
    admin.execute(f"grant {', '.join(schema.ROLES.values())} to {ADMIN} with admin option, inherit false, set false")
    try:
        yield make_conninfo(server.admin_dsn(), user=ADMIN, password="managed")  # pragma: allowlist secret
    finally:
        drop_database(server, "schema_managed")
        admin.execute(f"drop owned by {ADMIN} cascade")
        admin.execute(f"drop role {ADMIN}")
        again(server, server.passwords)


def test_an_administrator_who_is_no_superuser_gets_everything_but_what_only_one_can_give(
    server: Server, admin: Connection, managed: str
) -> None:
    settings = settings_for("schema_managed")
    report = schema.apply_roles(lambda name: connect(managed, dbname=name), settings, server.passwords)
    assert {notice.split(" ")[0] for notice in report.notices} == {
        "memharbor_backup", "memharbor_replicator", "memharbor_rewind",
    }  # fmt: skip
    again_report = schema.apply_roles(lambda name: connect(managed, dbname=name), settings, server.passwords)
    assert again_report.changed is False
    with closing(connect(managed, autocommit=True)) as connection:
        assert schema.ensure_database(connection, settings) is True
    with closing(admin_connection(server, settings.database)) as connection:
        # The provider's part: pgvector is not a trusted extension.
        connection.execute("create extension vector")
    with closing(connect(managed, dbname=settings.database, autocommit=True)) as connection:
        first = schema.apply(connection, settings)
        assert {notice.split(" ")[0] for notice in first.notices} == {"LEAKPROOF", "memharbor_pooler.lookup"}
        assert schema.apply(connection, settings).changed is False
        assert schema.verify(connection, settings) == []
        assert schema.tenant_indexes(connection, settings).changed is False
        connection.execute("set role memharbor_service")
        connection.execute('insert into public.mem0 values (gen_random_uuid(), null, \'{"user_id": "a"}\')')
        connection.execute("reset role")
        with pytest.raises(StateRefusedError, match=r"memharbor\.memories \(1 rows\)"):
            schema.downgrade(connection, settings, to="base")
        schema.downgrade(connection, settings, to="base", allow_data_loss=True)
        schema.apply(connection, settings)
        assert schema.verify(connection, settings) == []
