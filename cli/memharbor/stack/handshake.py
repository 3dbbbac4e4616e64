"""
What certificate a server of the stack shows: asked over the wire, as a client would meet it.

Trusts nothing and sends no secret; who wants a verified connection uses the stack's URIs.
Source: PostgreSQL manual, SSL Session Encryption.
"""

from __future__ import annotations

import socket
import ssl
import struct

from memharbor.errors import ConnectError

_SSL_REQUEST = struct.pack("!ii", 8, 80877103)


def read_served_certificate(host: str, port: int, *, timeout_seconds: float = 10) -> str:
    """
    Read the certificate that PostgreSQL or PgBouncer shows, as PEM text, whether it is still valid or not.

    Raises:
        ConnectError: Nothing answers there, or it does not speak TLS.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # An expired certificate is what is looked for: it must not end the handshake.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), timeout=timeout_seconds) as plain:
            plain.sendall(_SSL_REQUEST)
            if plain.recv(1) != b"S":
                raise ConnectError(f"{host}:{port} does not speak TLS", hint="pulumi up")
            with context.wrap_socket(plain) as wrapped:
                shown = wrapped.getpeercert(binary_form=True)
    except OSError as exc:
        raise ConnectError(f"no TLS handshake with {host}:{port}: {exc}", hint="memharbor status") from exc
    if shown is None:
        raise ConnectError(f"{host}:{port} showed no certificate", hint="pulumi up")
    return ssl.DER_cert_to_PEM_cert(shown)
