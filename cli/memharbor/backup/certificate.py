"""
A certificate that a user was erased: what was deleted and when, signed under the stack's CA.

It names the user by a digest only: who knows the id can tell that it is about them. The signature is detached PKCS #7
(RFC 2315), so that `openssl smime -verify` checks it with nothing but the CA's certificate. Pure, but for `write`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs7

from memharbor import __version__
from memharbor.backup.erasure import Erasure


@dataclass(frozen=True)
class Signer:
    """Who signs: a certificate under the stack's CA, and its private key, both as PEM text; the key is never shown."""

    certificate: str
    key: str = field(repr=False)


class Written(NamedTuple):
    """The files of a certificate; no signature where there was nobody to sign."""

    certificate: Path
    signature: Path | None


def describe(
    erasure: Erasure, *, database: str, stack: str | None, system_identifier: str, rewritten: bool, remains: str
) -> dict[str, Any]:
    """
    Describe an erasure for its certificate.

    Args:
        erasure: What was done.
        database: Name of the database.
        stack: Name of the stack; `None` for a database that no stack of ours made.
        system_identifier: PostgreSQL's own number of the cluster; empty where it does not say.
        rewritten: Whether the tables' files were written anew.
        remains: Where the rows live on, and how long, in words.
    """
    return {
        "format": 1,
        "kind": "memharbor erasure certificate",
        "id": erasure.id,
        "user_sha256": erasure.user_sha256,
        "reason": erasure.reason,
        "requested_by": erasure.requested_by,
        "requested_at": erasure.requested_at.isoformat(),
        "erased_at": erasure.erased_at.isoformat() if erasure.erased_at else None,
        "counts": dict(sorted(erasure.counts.items())),
        "total": sum(erasure.counts.values()),
        "database": database,
        "stack": stack,
        "system_identifier": system_identifier,
        "files_rewritten": rewritten,
        "remains": remains,
        "issued_at": datetime.now(UTC).isoformat(),
        "memharbor": __version__,
    }


def sign(text: bytes, signer: Signer) -> bytes:
    """
    Sign a text: detached PKCS #7 as PEM, with the signer's certificate inside.

    Raises:
        TypeError: The signer's key is not an elliptic curve key.
    """
    key = serialization.load_pem_private_key(signer.key.encode(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("the signer's key must be an elliptic curve key")
    options = [pkcs7.PKCS7Options.DetachedSignature, pkcs7.PKCS7Options.Binary]
    return (
        pkcs7.PKCS7SignatureBuilder()
        .set_data(text)
        .add_signer(x509.load_pem_x509_certificate(signer.certificate.encode()), key, hashes.SHA256())
        .sign(serialization.Encoding.PEM, options)
    )


def write(folder: Path, certificate: Mapping[str, Any], signer: Signer | None) -> Written:
    """
    Write a certificate and its signature into a folder, for its owner only.

    A certificate that is there already is kept, since it may have been handed out, unless the files were rewritten
    since.

    Args:
        folder: Made where it is missing.
        certificate: From `describe`.
        signer: Who signs; `None` for nobody.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{certificate['id']}.certificate.json"
    signature = path.with_suffix(".p7s") if signer is not None else None
    if _is_out_of_date(path, certificate) or (signature is not None and not signature.exists()):
        text = (json.dumps(certificate, indent=2, sort_keys=True) + "\n").encode()
        if signer is not None and signature is not None:
            _put(signature, sign(text, signer))
        # Last: where it is, its signature is.
        _put(path, text)
    return Written(path, signature)


def _is_out_of_date(path: Path, certificate: Mapping[str, Any]) -> bool:
    if not path.exists():
        return True
    return bool(certificate["files_rewritten"]) and not json.loads(path.read_text())["files_rewritten"]


def _put(path: Path, text: bytes) -> None:
    incoming = path.with_name(f".{path.name}.new")
    incoming.write_bytes(text)
    incoming.chmod(0o600)
    incoming.replace(path)
