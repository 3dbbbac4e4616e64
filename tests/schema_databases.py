"""Databases for the tests of the schema: one that is rolled out once per session, and copies of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from typing import Any

import psycopg
from psycopg import sql

from memharbor import schema
from memharbor.database import Connection, connect
from memharbor.settings import Settings
from tests.memory_database import Server

DIMS = 8
_number = itertools.count()


def settings_for(database: str, **overrides: Any) -> Settings:
    return Settings(**{"database": database, "embedding_dims": DIMS, **overrides})


def admin_connection(server: Server, database: str = "postgres") -> Connection:
    return connect(server.admin_dsn(database), autocommit=True)


def role_connection(server: Server, database: str, role: str) -> Connection:
    return connect(server.direct_dsn(database, role), autocommit=True)


@cache
def apply_roles(server: Server) -> schema.RolesReport:
    """Create the roles once per session; the report is that of the first run."""
    return schema.apply_roles(
        lambda database: admin_connection(server, database), settings_for("schema_template"), server.passwords
    )


@cache
def template_database(server: Server) -> str:
    """Roll the schema out once per session; nothing may connect to this database afterwards but to read."""
    name = "schema_template"
    drop_database(server, name)
    apply_roles(server)
    with closing(admin_connection(server)) as connection:
        schema.ensure_database(connection, settings_for(name))
    with closing(admin_connection(server, name)) as connection:
        schema.apply(connection, settings_for(name))
    return name


@contextmanager
def scratch_database(server: Server, *, rolled_out: bool = True) -> Iterator[str]:
    """Make a database for one test: a copy of the one that is rolled out, or an empty one."""
    template = template_database(server) if rolled_out else "template1"
    apply_roles(server)
    name = f"schema_scratch_{os.getpid()}_{next(_number)}"
    statement = sql.SQL("create database {} owner memharbor_owner template {}")
    with closing(admin_connection(server)) as connection:
        connection.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))
    try:
        yield name
    finally:
        drop_database(server, name)


def drop_database(server: Server, name: str) -> None:
    with closing(admin_connection(server)) as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


@contextmanager
def acting(connection: psycopg.Connection[Any], role: str, user_id: str | None = None) -> Iterator[None]:
    """Act as a role, and for a user, until the end of the block; what the block did stays undone."""
    with connection.transaction(force_rollback=True):
        connection.execute("select set_config('role', %s, true)", (f"memharbor_{role}",))
        if user_id is not None:
            connection.execute("select set_config('app.user_id', %s, true)", (user_id,))
        yield
