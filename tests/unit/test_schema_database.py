"""Connecting: what is said about a server, and what never is."""

from __future__ import annotations

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.conninfo import make_conninfo

from memharbor.database import connect, is_connection_lost, redact_dsn, translated_errors
from memharbor.errors import ConfigError, ConnectError, DatabaseError

PASSWORD = "s3cret-pässword"  # pragma: allowlist secret


def test_a_redacted_dsn_says_where_it_leads() -> None:
    assert redact_dsn(f"host=db user=app password={PASSWORD} dbname=m") == "postgresql://app@db/m"


@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=4))
def test_a_redacted_dsn_never_holds_the_password(password: str) -> None:
    redacted = redact_dsn(make_conninfo(host="db", user="app", dbname="m", password=password))
    assert redacted == "postgresql://app@db/m"


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://app:{PASSWORD}%zz@db/m",  # pragma: allowlist secret
        f"host=db password='{PASSWORD}",
        f"nonsense={PASSWORD}",
    ],
)
def test_a_dsn_that_cannot_be_read_is_not_quoted(dsn: str) -> None:
    with pytest.raises(ConfigError) as caught:
        connect(dsn)
    told = f"{caught.value} {caught.value.__cause__} {redact_dsn(dsn)}"
    assert PASSWORD not in told


def test_a_server_that_does_not_answer_is_a_connect_error_without_the_password() -> None:
    with pytest.raises(ConnectError) as caught:
        connect(f"postgresql://app:{PASSWORD}@127.0.0.1:1/m?connect_timeout=2")
    assert "postgresql://app@127.0.0.1:1/m" in caught.value.message
    assert PASSWORD not in f"{caught.value.message} {caught.value.__cause__}"


def test_a_refused_statement_is_a_database_error_that_says_what_was_done() -> None:
    said = r"step `x`, statement 2 of 3: .*SQLSTATE 42P01"
    with pytest.raises(DatabaseError, match=said), translated_errors("step `x`, statement 2 of 3"):
        raise psycopg.errors.UndefinedTable("relation does not exist")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (psycopg.OperationalError("server closed the connection"), True),
        (psycopg.errors.AdminShutdown("terminating connection"), True),
        (psycopg.errors.LockNotAvailable("canceling statement due to lock timeout"), False),
        (psycopg.errors.SyntaxError("syntax error"), False),
        (psycopg.InterfaceError("misuse"), False),
    ],
)
def test_a_lost_connection_is_told_from_a_refused_statement(error: psycopg.Error, lost: bool) -> None:
    assert is_connection_lost(error) is lost
