"""
What a stack keeps secret: one password per role, the keys of the backup store, the CA and its leaf certificates.

Pure but for the operating system's random source. Generated once by `memharbor.stack.init`, kept encrypted in the
stack's config under `memharbor:secrets`, read by the stack's program. A later version that needs more completes what
is there and never replaces it: a new password or CA would lock out what runs. A leaf certificate that soon expires is
renewed under the same CA.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memharbor.errors import ConfigError
from memharbor.names import ROLE_NAMES as ROLE_NAMES
from memharbor.settings import Settings
from memharbor.stack.certificates import RENEWAL_DAYS, KeyPair, create_authority, create_leaf, find_expiry
from memharbor.stack.certificates import certificate_names as read_names

# Access keys of the backup store: `root` stays inside the store, `custodian` owns the bucket, `pgbackrest` may write
# and delete but not delete versions.
STORE_KEYS = ("root", "custodian", "pgbackrest")
# Services that have a certificate.
SERVICES = ("postgres", "pgbouncer", "backup-store")
# Those whose ports are published on the host.
PUBLISHED_SERVICES = ("postgres", "pgbouncer")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
# URL-safe base64 needs no quoting in a libpq URI, pgbackrest.conf, userlist.txt or a curl config.
_PASSWORD_BYTES = 32
_PASSPHRASE_BYTES = 48


class StackSecrets(BaseModel):
    """
    Hold every secret of one stack. Frozen; no value appears in its representation.

    Args:
        passwords: By the short name of the role, see `ROLE_NAMES`.
        repository_passphrase: Encrypts the backups; without it they cannot be read.
        store_secrets: By the access key of the backup store, see `STORE_KEYS`.
        authority: The stack's CA.
        certificates: Leaf certificates by `<service>-<index>`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passwords: dict[str, str] = Field(repr=False)
    repository_passphrase: str = Field(repr=False)
    store_secrets: dict[str, str] = Field(repr=False)
    authority: KeyPair
    certificates: dict[str, KeyPair] = Field(repr=False)


def node_names(service: str, count: int = 1) -> list[str]:
    """
    Name the containers of a service, without the stack's prefix.

    >>> node_names("postgres", 2)
    ['postgres-0', 'postgres-1']
    """
    return [f"{service}-{index}" for index in range(count)]


def certificate_nodes(settings: Settings) -> list[str]:
    """
    List the containers that need a certificate.

    >>> certificate_nodes(Settings())
    ['postgres-0', 'pgbouncer-0', 'backup-store-0']
    """
    counts = {"single": 1}
    return [name for service in SERVICES for name in node_names(service, counts[settings.topology])]


def certificate_names(stack: str, node: str, public_names: Sequence[str] = ()) -> list[str]:
    """
    List the names for which a container's certificate is valid.

    The service's own name is among them: clients connect to it, whichever node answers. So are the public names, where
    the service is published.

    >>> certificate_names("dev", "postgres-0")
    ['dev-postgres-0', 'postgres-0', 'postgres', 'localhost', '127.0.0.1', '::1']
    """
    service = node.rpartition("-")[0]
    own = [f"{stack}-{node}", node, service, *_LOOPBACK_NAMES]
    return own + [name for name in public_names if service in PUBLISHED_SERVICES and name not in own]


def complete_secrets(
    stack: str,
    nodes: Sequence[str],
    existing: StackSecrets | None = None,
    *,
    public_names: Sequence[str] = (),
    now: datetime | None = None,
) -> StackSecrets:
    """
    Generate what is missing, renew leaf certificates that end within `RENEWAL_DAYS` or have other names, keep the rest.

    Args:
        stack: Name of the stack, part of the certificates' names.
        nodes: Containers that need a certificate, as `<service>-<index>`.
        existing: The secrets of the stack so far; `None` for a new stack.
        public_names: What clients elsewhere call the published services.
        now: Instant from which new certificates are valid, aware UTC.

    Returns:
        `existing` itself where nothing is missing or ends soon.
    """
    if existing is None:
        existing = StackSecrets(
            passwords={},
            repository_passphrase=secrets.token_urlsafe(_PASSPHRASE_BYTES),
            store_secrets={},
            authority=create_authority(f"memharbor {stack} CA", now=now),
            certificates={},
        )
    completed = existing.model_copy(
        update={
            "passwords": existing.passwords | _passwords(role for role in ROLE_NAMES if role not in existing.passwords),
            "store_secrets": existing.store_secrets
            | _passwords(key for key in STORE_KEYS if key not in existing.store_secrets),
            "certificates": existing.certificates
            | {
                node: create_leaf(existing.authority, certificate_names(stack, node, public_names), now=now)
                for node in nodes
                if node not in existing.certificates
                or _ends_soon(existing.certificates[node], now)
                or _has_other_names(stack, node, existing.certificates[node], public_names)
            },
        }
    )
    return existing if completed == existing else completed


def _ends_soon(pair: KeyPair, now: datetime | None) -> bool:
    return find_expiry(pair.certificate) - (now or datetime.now(UTC)) < timedelta(days=RENEWAL_DAYS)


def _has_other_names(stack: str, node: str, pair: KeyPair, public_names: Sequence[str]) -> bool:
    return set(read_names(pair.certificate)) != set(certificate_names(stack, node, public_names))


def check_public_names(stack: str, stack_secrets: StackSecrets, public_names: Sequence[str]) -> None:
    """
    Refuse certificates that are not valid for all names under which they are needed.

    Raises:
        ConfigError: One lacks a name; `memharbor stack init` makes them anew.
    """
    for node, pair in stack_secrets.certificates.items():
        missing = set(certificate_names(stack, node, public_names)) - set(read_names(pair.certificate))
        if missing:
            raise ConfigError(
                f"the certificate of `{node}` is not valid for {', '.join(f'`{name}`' for name in sorted(missing))}",
                hint=f"run `memharbor stack init --stack {stack}`, which makes it anew",
            )


def parse_secrets(text: str) -> StackSecrets:
    """
    Parse the value of `memharbor:secrets`.

    Raises:
        ConfigError: It is not what `memharbor stack init` wrote; the message names the fields, never a value.
    """
    try:
        return StackSecrets.model_validate_json(text)
    except ValidationError as exc:
        fields = sorted({".".join(str(part) for part in error["loc"]) or "(all)" for error in exc.errors()})
        # Not `from exc`: pydantic's message quotes the value that it refused.
        raise ConfigError(
            f"memharbor:secrets: wrong or missing: {', '.join(fields)}",
            hint="restore the stack's config from its backup, or create a stack under a new name",
        ) from None


def _passwords(names: Iterable[str]) -> dict[str, str]:
    return {name: secrets.token_urlsafe(_PASSWORD_BYTES) for name in names}
