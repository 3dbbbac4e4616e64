"""Recognizing a password in its SCRAM verifier."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg import pq

from memharbor.schema.passwords import matches

# libpq makes these without a connection only from version 17 on; made by PostgreSQL 18.6 for the password `pencil`.
PENCIL = "SCRAM-SHA-256$4096:aGFyYm9yLXNhbHQtMTYhIQ==$"


def verifier_of(password: str) -> str:
    import base64
    import hashlib
    import hmac

    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), b"harbor-salt-16!!", 4096)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    return PENCIL + base64.b64encode(stored).decode() + ":" + base64.b64encode(server).decode()


def test_libpq_is_recent_enough_to_make_verifiers() -> None:
    assert pq.version() >= 100_000


@settings(max_examples=15)
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12))
def test_the_right_password_matches_and_another_does_not(password: str) -> None:
    assert matches(verifier_of(password), password)
    assert not matches(verifier_of(password), password + "x")


def test_a_password_is_prepared_as_postgresql_does() -> None:
    # SASLprep: a no-break space is a space, a soft hyphen is nothing, a ligature is its letters.
    assert matches(verifier_of("a b"), "a\u00a0b")
    assert matches(verifier_of("ab"), "a\u00adb")
    assert matches(verifier_of("fi"), "\ufb01")


def test_a_password_that_cannot_be_prepared_is_taken_as_it_is() -> None:
    for password in ("a\u0627b", "\ue000", "\u0221"):
        assert matches(verifier_of(password), password)


@pytest.mark.parametrize("stored", [None, "", "md5abc", "SCRAM-SHA-256$4096:?$a:b", "SCRAM-SHA-256$4096:YQ$YQ==:YQ=="])
def test_what_is_no_verifier_matches_nothing(stored: str | None) -> None:
    assert not matches(stored, "secret")
