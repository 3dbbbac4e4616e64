"""Databases with Memharbor's schema for the integration tests, made once per session and shape."""

from __future__ import annotations

from contextlib import closing
from functools import cache

from memharbor import schema
from memharbor.database import connect
from memharbor.settings import Settings
from tests.containers import Server


@cache
def memory_database(server: Server, name: str, dims: int) -> str:
    """Make a database once per session; returns its name."""
    settings = Settings(database=name, embedding_dims=dims)
    schema.apply_roles(lambda database: connect(server.admin_dsn(database)), settings, server.passwords)
    with closing(connect(server.admin_dsn(), autocommit=True)) as connection:
        schema.ensure_database(connection, settings)
    with closing(connect(server.admin_dsn(name), autocommit=True)) as connection:
        schema.apply(connection, settings)
    return name
