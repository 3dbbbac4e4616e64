"""
What a stack that is up tells about itself: outputs, connection URIs, environment, inventory.

`StackOutputs` is the contract between `infra/` and everything that operates a stack; it is a list of nodes from the
start, so that a topology with more of them changes no name. Must not change anything of the stack; the one file that it
writes is the CA certificate (public), which every URI made here names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from memharbor.errors import ConfigError, ExternalToolError, StateRefusedError
from memharbor.names import DEFAULT_STACK, DSN_ROLES, ROLE_NAMES, STACK_VARIABLE
from memharbor.settings import Settings, environment_name
from memharbor.stack import provisioner

_SHARED_ROLES = ("app", "service", "readonly")
_CONNECT_TIMEOUT_SECONDS = 10


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StackNotUpError(ConfigError):
    """The stack does not exist or was never brought up."""


class NodeOutput(_Frozen):
    """
    One database node.

    Args:
        index: Its number in the stack.
        name: Its name on the stack's network, for instance `postgres-0`.
        host: Host name inside the container.
        container: The container's name.
        volume: Its data volume.
        files_volume: Its configuration volume, for jobs that run beside it.
        address: `host:port` under which other containers reach this very node.
        roles: What it may be: `primary`, `replica`.
    """

    index: int
    name: str
    host: str
    container: str
    volume: str
    files_volume: str
    address: str
    roles: tuple[str, ...]


class Endpoint(_Frozen):
    """Where clients outside of Docker connect to."""

    host: str
    port: int
    dbname: str


class Endpoints(_Frozen):
    """
    The ways in: `rw` and `ro` lead straight to PostgreSQL; the others through PgBouncer.

    `pool` and `pool_ro` hold a server for a transaction, `pool_session` as long as the client stays.
    """

    rw: Endpoint
    ro: Endpoint
    pool: Endpoint
    pool_ro: Endpoint
    pool_session: Endpoint


class StoreOutput(_Frozen):
    """The backup repository: where pgBackRest writes, as seen on the stack's network, and its data volume."""

    bucket: str
    repository_path: str
    endpoint: str
    region: str
    volume: str


class StackOutputs(_Frozen):
    """Everything that `pulumi up` says about a stack. Passwords by the short name of the role."""

    stack: str
    topology: str
    stanza: str
    database: str
    settings: dict[str, Any]
    nodes: tuple[NodeOutput, ...]
    endpoints: Endpoints
    containers: dict[str, tuple[str, ...]]
    store: StoreOutput
    images: dict[str, str]
    network: str
    ca_certificate: str
    passwords: dict[str, SecretStr]


def stack_name(environ: Mapping[str, str] | None = None) -> str:
    """
    Name the stack that is meant where no option says so.

    >>> stack_name({"MEMHARBOR_STACK": "prod"}), stack_name({})
    ('prod', 'dev')
    """
    return (os.environ if environ is None else environ).get(STACK_VARIABLE) or DEFAULT_STACK


@cache
def read_outputs(stack: str) -> StackOutputs:
    """
    Read the outputs of a stack, once per process, and put its CA certificate where clients of this machine find it.

    Raises:
        StackNotUpError: The stack does not exist or was never brought up.
        ConfigError: It was made by another version.
    """
    try:
        raw = provisioner.read_stack_outputs(stack)
    except ExternalToolError as exc:
        if "no stack named" not in exc.message:
            raise
        raw = {}
    if not raw:
        raise StackNotUpError(
            f"stack `{stack}` is not up",
            hint=(f"run `memharbor stack init --stack {stack}`, then `pulumi up --stack {stack}`", "or run `make up`"),
        )
    try:
        outputs = StackOutputs.model_validate(raw)
    except ValidationError as exc:
        fields = sorted({".".join(str(part) for part in error["loc"]) for error in exc.errors()})
        # Not `from exc`: pydantic's message quotes what it refused, passwords among it.
        raise ConfigError(
            f"stack `{stack}` was made by another version of Memharbor: {', '.join(fields)}",
            hint=f"run `pulumi up --stack {stack}`",
        ) from None
    write_ca_certificate(stack, outputs.ca_certificate)
    return outputs


def ca_certificate_path(stack: str) -> Path:
    """Name the file with the stack's CA certificate, which clients verify the servers by."""
    return provisioner.private_folder() / stack / "ca.crt"


def write_ca_certificate(stack: str, certificate: str) -> Path:
    """Put the CA certificate (public) where clients of this machine find it; nothing happens where it is there."""
    path = ca_certificate_path(stack)
    if not path.is_file() or path.read_text(encoding="utf-8") != certificate:
        path.parent.mkdir(parents=True, exist_ok=True)
        incoming = path.with_name(f".{path.name}.{os.getpid()}")
        incoming.write_text(certificate, encoding="utf-8")
        incoming.chmod(0o644)
        incoming.replace(path)
    return path


def find_leader(outputs: StackOutputs) -> NodeOutput:
    """
    Find the node that leads: the one that backs up, restores and accepts writes.

    Raises:
        StateRefusedError: No node may lead.
    """
    for node in outputs.nodes:
        if "primary" in node.roles:
            return node
    raise StateRefusedError(f"stack `{outputs.stack}` has no node that may lead")


def find_endpoint(
    outputs: StackOutputs, *, direct: bool = False, read_only: bool = False, session: bool = False
) -> Endpoint:
    """Choose the way in: straight to PostgreSQL or through a pool, for reading only, or with a session of its own."""
    endpoints = outputs.endpoints
    if direct:
        return endpoints.ro if read_only else endpoints.rw
    if session:
        return endpoints.pool_session
    return endpoints.pool_ro if read_only else endpoints.pool


def dsn(
    outputs: StackOutputs, role: str, *, direct: bool = False, read_only: bool = False, session: bool = False
) -> str:
    """
    Spell the libpq URI of a role, with its password and verified TLS.

    Args:
        outputs: The stack.
        role: Short name of a role, see `ROLE_NAMES`; `admin` is the superuser, who is always direct.
        direct: Straight to PostgreSQL instead of through the pool.
        read_only: To where reading suffices.
        session: Through the session pool, for what needs a session: advisory locks, LISTEN, temporary tables.

    Raises:
        ConfigError: The stack has no such role.
    """
    if role not in outputs.passwords:
        raise ConfigError(f"stack `{outputs.stack}` has no role `{role}`", hint=f"one of {', '.join(DSN_ROLES)}")
    # The pool's lookup answers for the roles of this product only.
    direct = direct or role == "admin"
    endpoint = find_endpoint(outputs, direct=direct, read_only=read_only, session=session)
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    parameters = {
        "sslmode": "verify-full",
        "sslrootcert": str(ca_certificate_path(outputs.stack)),
        "connect_timeout": _CONNECT_TIMEOUT_SECONDS,
    }
    password = quote(outputs.passwords[role].get_secret_value(), safe="")
    return (
        f"postgresql://{ROLE_NAMES[role]}:{password}@{host}:{endpoint.port}/{quote(endpoint.dbname, safe='')}"
        f"?{urlencode(parameters, quote_via=quote, safe='/')}"
    )


def environment(outputs: StackOutputs, role: str = "app") -> dict[str, str]:
    """
    List the variables with which scripts, examples and `psql` connect: PG* as one role, a DSN per shared role, the dims.

    Not MEMHARBOR_DSN: that means a database which Pulumi did not make. Unlike a URI in an argument, variables cannot be
    read by other users of the machine.

    Args:
        outputs: The stack.
        role: Whom PG* is for, one of `DSN_ROLES`; `admin` connects straight to PostgreSQL.
    """
    endpoint = find_endpoint(outputs, direct=role == "admin")
    variables = {
        "PGHOST": endpoint.host,
        "PGPORT": str(endpoint.port),
        "PGDATABASE": endpoint.dbname,
        "PGUSER": ROLE_NAMES[role],
        "PGPASSWORD": outputs.passwords[role].get_secret_value(),
        "PGSSLMODE": "verify-full",
        "PGSSLROOTCERT": str(ca_certificate_path(outputs.stack)),
        STACK_VARIABLE: outputs.stack,
        environment_name("embedding_dims"): str(outputs.settings["embedding_dims"]),
    }
    return variables | {f"MEMHARBOR_{shared.upper()}_DSN": dsn(outputs, shared) for shared in _SHARED_ROLES}


def build_inventory(settings: Settings, *, stack: str) -> dict[str, Any]:
    """
    Build Ansible's inventory: one host, `memharbor`, which is this machine; settings as `memharbor_<setting>`.

    It holds no secret: the modules connect through `memharbor.target`. Pure. `stack` is empty for a database that
    Pulumi did not make.

    >>> build_inventory(Settings(), stack="dev")["_meta"]["hostvars"]["memharbor"]["memharbor_stack"]
    {'__ansible_unsafe': 'dev'}
    """
    variables: dict[str, Any] = {f"memharbor_{name}": value for name, value in settings.model_dump().items()}
    variables |= {
        "memharbor_stack": stack,
        "ansible_connection": "local",
        # The modules import memharbor and psycopg: they need this very interpreter.
        "ansible_python_interpreter": sys.executable,
    }
    return {
        "all": {"hosts": ["memharbor"]},
        "_meta": {"hostvars": {"memharbor": {name: _unsafe(value) for name, value in variables.items()}}},
    }


def _unsafe(value: Any) -> Any:
    """Mark a text so that Ansible never evaluates it as a template."""
    return {"__ansible_unsafe": value} if isinstance(value, str) else value
