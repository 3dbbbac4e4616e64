"""
The server of the integration tests: MEMHARBOR_TEST_DSN, else containers of the project's own images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import docker
import pytest

from memharbor.errors import ConfigError
from memharbor.settings import Settings
from memharbor.stack.secrets import complete_secrets
from tests.containers import Server, find_engine_problem, our_passwords, running_server, throw_away
from tests.corruption import Laboratory
from tests.schema_databases import DIMS, scratch_database


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


@pytest.fixture
def dsn(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty database, and for commands that are called in this process a working folder and a cache of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MEMHARBOR_EMBEDDING_DIMS", str(DIMS))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with scratch_database(server) as name:
        yield server.admin_dsn(name)


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


@pytest.fixture(scope="session")
def laboratory(server: Server) -> Iterator[Laboratory]:
    """A backup repository to be damaged, with its server and its store; every test leaves it good."""
    server.container("postgres")  # skips where there is no engine
    # Nothing is archived behind the back of a test that looks at a copy of the repository.
    settings = Settings(archive_timeout_seconds=3600)
    with closing(docker.from_env(timeout=120)) as engine, throw_away(engine, settings) as run:
        try:
            built = Laboratory(engine, run)
        except ConfigError as exc:
            problem = f"{exc.message}: {exc.hints[0]}"
            if os.environ.get("CI") == "true":
                pytest.fail(problem)
            pytest.skip(problem)
        try:
            built.build()
            yield built
        finally:
            built.close()
