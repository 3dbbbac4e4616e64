"""
The stack's certificate authority and the leaf certificates under it.

Pure: keys and certificates come back as PEM text, nothing is read or written. Where they are kept is decided by
`memharbor.stack.init`. The extensions are those that Python >= 3.13, OpenSSL, PostgreSQL, PgBouncer, pgBackRest, etcd
and Patroni all accept; a CA without `keyUsage` is refused by some of them.

Source: RFC 5280, sections 4.2.1.1 to 4.2.1.12.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import BaseModel, ConfigDict, Field

AUTHORITY_DAYS = 3652
LEAF_DAYS = 730
# How long before its end a leaf certificate is renewed.
RENEWAL_DAYS = 60
# Clocks of hosts differ; a certificate that is valid only from now on is refused by one that runs a little late.
CLOCK_SKEW = timedelta(minutes=10)
COMMON_NAME_LENGTH_MAX = 64


class KeyPair(BaseModel):
    """A certificate and its private key (PKCS #8), both as PEM text; the key never appears in a representation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    certificate: str
    key: str = Field(repr=False)


def create_authority(name: str, *, now: datetime | None = None) -> KeyPair:
    """
    Create a self-signed certificate authority that may sign leaves but no other authority.

    Args:
        name: Common name, for instance `memharbor dev CA`.
        now: Instant from which it is valid, aware UTC; the present by default.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(name)
    builder = (
        _builder(subject, subject, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        # Python >= 3.13 (Patroni) verifies strictly: `CA cert does not include key usage extension`.
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
    )
    return _pair(builder.sign(key, hashes.SHA256()), key)


def create_leaf(authority: KeyPair, names: Sequence[str], *, now: datetime | None = None) -> KeyPair:
    """
    Create a leaf certificate that serves as server and as client.

    Args:
        authority: Who signs it.
        names: DNS names and IP addresses it is valid for; the first one is also its common name.
        now: Instant from which it is valid, aware UTC; the present by default.
    """
    signer = x509.load_pem_x509_certificate(authority.certificate.encode())
    signer_key = serialization.load_pem_private_key(authority.key.encode(), password=None)
    if not isinstance(signer_key, ec.EllipticCurvePrivateKey):
        raise TypeError("the authority's key must be an elliptic curve key")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(_subject(names[0]), signer.subject, key.public_key(), now, LEAF_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True, key_encipherment=True), critical=True)
        # A database node is client as well: of etcd, of Patroni's REST interface, of another node's pgBackRest.
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                signer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
    )
    return _pair(builder.sign(signer_key, hashes.SHA256()), key)


def find_expiry(certificate: str) -> datetime:
    """Read until when a PEM certificate is valid, aware UTC."""
    return x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc


def certificate_names(certificate: str) -> list[str]:
    """List the DNS names and IP addresses that a PEM certificate is valid for, in its own order."""
    alternatives = x509.load_pem_x509_certificate(certificate.encode()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    return [str(name.value) for name in alternatives.value]


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:COMMON_NAME_LENGTH_MAX])])


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, now: datetime | None, days: int
) -> x509.CertificateBuilder:
    begin = now or datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - CLOCK_SKEW)
        .not_valid_after(begin + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(
    *,
    digital_signature: bool = False,
    key_encipherment: bool = False,
    key_cert_sign: bool = False,
    crl_sign: bool = False,
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=key_encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> KeyPair:
    return KeyPair(
        certificate=certificate.public_bytes(serialization.Encoding.PEM).decode(),
        key=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
    )
