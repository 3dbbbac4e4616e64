"""The stack's CA and leaves: what strict verifiers accept, and what they refuse."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from memharbor.stack import certificates
from memharbor.stack.certificates import KeyPair, create_authority, create_leaf, find_expiry
from memharbor.stack.secrets import certificate_names

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
NAMES = certificate_names("dev", "postgres-0")


@pytest.fixture(scope="module")
def authority() -> KeyPair:
    return create_authority("memharbor dev CA")


@pytest.fixture(scope="module")
def leaf(authority: KeyPair) -> KeyPair:
    return create_leaf(authority, NAMES)


def shake_hands(folder: Path, authority: KeyPair, server: KeyPair, host: str, client: KeyPair | None = None) -> None:
    """Run a TLS handshake in memory, as strict as Python >= 3.13 is by default."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(*_files(folder, "server", server))
    client_side = ssl.create_default_context(cadata=authority.certificate)
    client_side.verify_flags |= ssl.VERIFY_X509_STRICT
    if client is not None:
        server_side.verify_mode = ssl.CERT_REQUIRED
        server_side.verify_flags |= ssl.VERIFY_X509_STRICT
        server_side.load_verify_locations(cadata=authority.certificate)
        client_side.load_cert_chain(*_files(folder, "client", client))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client_side.wrap_bio(to_client, to_server, server_hostname=host),
        server_side.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(10):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert sides[0].version() == "TLSv1.3"
    sides[0].write(b"x")
    assert sides[1].read() == b"x"


def _files(folder: Path, name: str, pair: KeyPair) -> tuple[Path, Path]:
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    certificate.write_text(pair.certificate)
    key.write_text(pair.key)
    return certificate, key


@pytest.mark.parametrize("host", NAMES)
def test_a_strict_client_accepts_every_name(tmp_path: Path, authority: KeyPair, leaf: KeyPair, host: str) -> None:
    shake_hands(tmp_path, authority, leaf, host)


@pytest.mark.parametrize("host", ["postgres-1", "db.example", "127.0.0.2"])
def test_a_client_refuses_any_other_name(tmp_path: Path, authority: KeyPair, leaf: KeyPair, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch|not valid for"):
        shake_hands(tmp_path, authority, leaf, host)


def test_a_client_refuses_another_authority_of_the_same_name(tmp_path: Path, leaf: KeyPair) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, create_authority("memharbor dev CA"), leaf, "postgres")


def test_a_node_is_a_client_too(tmp_path: Path, authority: KeyPair, leaf: KeyPair) -> None:
    shake_hands(tmp_path, authority, leaf, "postgres", client=create_leaf(authority, ["postgres-1"]))


def test_an_expired_certificate_is_refused(tmp_path: Path, authority: KeyPair) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=certificates.LEAF_DAYS + 1)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shake_hands(tmp_path, authority, create_leaf(authority, NAMES, now=long_ago), "postgres")


def test_a_leaf_cannot_sign_others(tmp_path: Path, authority: KeyPair, leaf: KeyPair) -> None:
    with pytest.raises(ssl.SSLError):
        shake_hands(tmp_path, authority, create_leaf(leaf, ["postgres"]), "postgres")


def test_the_authority_may_sign_and_nothing_else(authority: KeyPair) -> None:
    certificate = x509.load_pem_x509_certificate(authority.certificate.encode())
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert usage.value.crl_sign
    assert not usage.value.digital_signature
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value.ca
    assert constraints.value.path_length == 0


def test_validity_is_ten_years_and_two(authority: KeyPair) -> None:
    authority = create_authority("x", now=NOW)
    assert find_expiry(authority.certificate) == NOW + timedelta(days=certificates.AUTHORITY_DAYS)
    assert find_expiry(create_leaf(authority, ["x"], now=NOW).certificate) == NOW + timedelta(days=730)
    begin = x509.load_pem_x509_certificate(authority.certificate.encode()).not_valid_before_utc
    assert begin < NOW, "a clock that runs a little late must accept it"


def test_keys_do_not_appear_where_a_pair_is_shown(authority: KeyPair) -> None:
    assert authority.key not in repr(authority)
    assert authority.key not in str(authority)


def test_the_common_name_fits_its_field(authority: KeyPair) -> None:
    name = "a" * 31 + "-backup-store-0" + ".example" * 4
    subject = x509.load_pem_x509_certificate(create_leaf(authority, [name]).certificate.encode()).subject
    assert len(str(subject.rfc4514_string())) <= len("CN=") + 64
    assert certificates.certificate_names(create_leaf(authority, [name]).certificate) == [name]


@hypothesis_settings(max_examples=20, deadline=None)
@given(
    names=st.lists(
        st.one_of(st.from_regex(r"[a-z][a-z0-9-]{0,30}[a-z0-9]", fullmatch=True), st.ip_addresses().map(str)),
        min_size=1,
        max_size=5,
        unique=True,
    )
)
def test_every_name_that_goes_in_comes_out(names: list[str]) -> None:
    assert certificates.certificate_names(create_leaf(create_authority("x"), names).certificate) == names
