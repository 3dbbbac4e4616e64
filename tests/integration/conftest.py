"""
The server of the integration tests: MEMHARBOR_TEST_DSN, else containers of the project's own images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

import pytest

from memharbor.stack.secrets import complete_secrets
from tests.containers import Server, find_engine_problem, our_passwords, running_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """PostgreSQL with pgvector, and PgBouncer before it where the server is ours."""
    dsn = os.environ.get("MEMHARBOR_TEST_DSN")
    if dsn:
        yield external_server(dsn)
        return
    problem = find_engine_problem()
    if problem:
        reason = f"no Docker engine answers, and MEMHARBOR_TEST_DSN is not set: {problem}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with running_server(tmp_path_factory.mktemp("server")) as started:
        yield started


def external_server(dsn: str) -> Server:
    """
    Describe the server of MEMHARBOR_TEST_DSN, a URI of an administrator.

    Our roles get new passwords on it, so it must be one that nobody else uses.
    """
    parts = urlsplit(dsn)
    parameters = f"?{parts.query}" if parts.query else ""
    return Server(
        admin_uri=urlunsplit(parts._replace(path="/__database__"))
        .replace("{", "{{")
        .replace("}", "}}")
        .replace("/__database__", "/{database}"),
        address=parts.netloc.rpartition("@")[2],
        pool_address=None,
        passwords=our_passwords(complete_secrets("test", [])),
        parameters=parameters,
        containers={},
    )
