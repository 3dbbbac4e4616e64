"""
Passwords of roles as SCRAM verifiers, so that no password ever stands in an SQL text or a server log.

Source: RFC 5802 (SCRAM), RFC 7677 (SHA-256), RFC 4013 (SASLprep); PostgreSQL manual, pg_authid.rolpassword.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import stringprep
import unicodedata

from memharbor.database import Connection

_VERIFIER = re.compile(r"SCRAM-SHA-256\$(\d+):([A-Za-z0-9+/=]+)\$([A-Za-z0-9+/=]+):([A-Za-z0-9+/=]+)")


def encrypt_password(connection: Connection, role: str, password: str) -> str:
    """Compute a fresh verifier on this side of the connection; each call has another salt."""
    return connection.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()


def matches(verifier: str | None, password: str) -> bool:
    """
    Tell whether a stored verifier is that of a password; also False where it is none (MD5, null).

    >>> matches("md5abc", "secret")
    False
    """
    match = _VERIFIER.fullmatch(verifier or "")
    if match is None:
        return False
    try:
        salt, stored_key = base64.b64decode(match[2], validate=True), base64.b64decode(match[3], validate=True)
    except binascii.Error:
        return False
    salted = hashlib.pbkdf2_hmac("sha256", _prepare(password).encode(), salt, int(match[1]))
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    return hmac.compare_digest(hashlib.sha256(client_key).digest(), stored_key)


def _prepare(password: str) -> str:
    """Apply SASLprep as PostgreSQL does: a password that it forbids is taken as it is."""
    if password.isascii():
        return password
    mapped = "".join(
        " " if stringprep.in_table_c12(char) else char for char in password if not stringprep.in_table_b1(char)
    )
    normal = unicodedata.ucd_3_2_0.normalize("NFKC", mapped)
    forbidden = (
        stringprep.in_table_a1, stringprep.in_table_c12, stringprep.in_table_c21_c22, stringprep.in_table_c3,
        stringprep.in_table_c4, stringprep.in_table_c5, stringprep.in_table_c6, stringprep.in_table_c7,
        stringprep.in_table_c8, stringprep.in_table_c9,
    )  # fmt: skip
    if not normal or any(test(char) for char in normal for test in forbidden) or not _is_one_direction(normal):
        return password
    return normal


def _is_one_direction(text: str) -> bool:
    if not any(stringprep.in_table_d1(char) for char in text):
        return True
    ends_right_to_left = stringprep.in_table_d1(text[0]) and stringprep.in_table_d1(text[-1])
    return ends_right_to_left and not any(stringprep.in_table_d2(char) for char in text)
