"""
Which database a command means: a stack of ours, or one that `MEMHARBOR_DSN` names.

One place decides, so that every command and the Ansible module answer alike. Must not connect: it only says how.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from memharbor.errors import ConfigError
from memharbor.names import ROLES
from memharbor.settings import Settings, load_settings, settings_from_environment

if TYPE_CHECKING:
    import psycopg

    from memharbor.stack import StackOutputs


@dataclass(frozen=True)
class Target:
    """
    A database and how to reach it.

    `outputs` is None for a database that Pulumi did not make: what needs the host (physical backup, pooler) is not
    to be had there. `name` is for messages; `identity` tells databases apart, and has no secret.
    """

    name: str
    settings: Settings
    origins: Mapping[str, str]
    outputs: StackOutputs | None
    admin_dsn: str = field(repr=False)
    passwords: Mapping[str, str] = field(repr=False)
    identity: str

    def dsn(self, role: str, *, direct: bool = False, read_only: bool = False, session: bool = False) -> str:
        """
        Spell the libpq URI of a role, through the pool unless `direct`.

        Raises:
            ConfigError: The database is not ours, and the role's password is not given or MEMHARBOR_DSN cannot be read.
        """
        if self.outputs is not None:
            from memharbor.stack import dsn

            return dsn(self.outputs, role, direct=direct, read_only=read_only, session=session)
        parts = _parse_dsn(self.admin_dsn)
        if role == "admin":
            return spell_uri(parts)
        if role not in self.passwords:
            raise ConfigError(
                f"the password of `{ROLES.get(role, role)}` is not known for {self.name}",
                hint=f"set MEMHARBOR_{role.upper()}_PASSWORD",
            )
        return spell_uri({**parts, "user": ROLES[role], "password": self.passwords[role]})

    def connect(
        self, role: str = "admin", *, dbname: str | None = None, autocommit: bool = False
    ) -> psycopg.Connection[Any]:
        """Connect straight to the server, not through the pool."""
        from memharbor.database import connect

        return connect(self.dsn(role, direct=True), dbname=dbname, autocommit=autocommit)

    def stack_outputs(self, what: str) -> StackOutputs:
        """
        Get the stack's outputs for something that needs the host.

        Raises:
            ConfigError: The database is not a stack of ours; the hint names the way.
        """
        if self.outputs is None:
            raise ConfigError(
                f"{what} needs the database's host, and {self.name} was not made by `pulumi up`",
                hint="use the provider's own backups, or move the memories into a stack of yours",
            )
        return self.outputs


def find_target(stack: str, dsn: str | None = None, *, environ: Mapping[str, str] | None = None) -> Target:
    """
    Find the database that is meant: `dsn` where given, else the stack.

    Args:
        stack: Name of the stack.
        dsn: libpq URI of a database that Pulumi did not make, for an administrator.
        environ: Variables to read MEMHARBOR_* from; the process's own by default.

    Raises:
        ConfigError: The stack does not exist or was never brought up, or a setting or the DSN is wrong.
    """
    environ = os.environ if environ is None else environ
    layers: list[tuple[str, Mapping[str, Any]]] = [("environment", settings_from_environment(environ))]
    if dsn:
        settings, origins = load_settings(*layers, ("MEMHARBOR_DSN", _settings_of_dsn(dsn)))
        passwords = {
            role: environ[f"MEMHARBOR_{role.upper()}_PASSWORD"]
            for role in ROLES
            if environ.get(f"MEMHARBOR_{role.upper()}_PASSWORD")
        }
        identity = identify_database(dsn, environ=environ)
        return Target("the database of MEMHARBOR_DSN", settings, origins, None, dsn, passwords, identity)
    from memharbor.stack import dsn as stack_dsn
    from memharbor.stack import read_outputs

    outputs = read_outputs(stack)
    settings, origins = load_settings(*layers, (f"stack {stack}", outputs.settings))
    passwords = {role: outputs.passwords[role].get_secret_value() for role in ROLES if role in outputs.passwords}
    name, admin_dsn = f"stack {stack}", stack_dsn(outputs, "admin", direct=True)
    return Target(name, settings, origins, outputs, admin_dsn, passwords, name)


def identify_database(dsn: str, *, environ: Mapping[str, str] | None = None) -> str:
    """
    Tell a database from others by its address, without secrets; one that has two addresses counts as two.

    Args:
        dsn: libpq URI or key/value string.
        environ: Variables with libpq's defaults; the process's own by default.

    Raises:
        ConfigError: The DSN cannot be read.

    >>> identify_database("postgresql://me@DB.example/memories?sslmode=require", environ={})
    'database memories at db.example:5432'
    >>> identify_database("postgresql://postgres.abcd@pooler.example:6543/postgres", environ={})
    'database postgres of abcd at pooler.example:6543'
    """
    environ = os.environ if environ is None else environ
    parts = _parse_dsn(dsn)

    def find(*names: str, default: str) -> str:
        given = [parts.get(name) for name in names] + [environ.get(f"PG{name.upper()}") for name in names]
        return next((str(each) for each in given if each), default)

    user = find("user", default="")
    # A pooler that serves several servers is told by the user which of them is meant. Source: Supabase, Supavisor.
    tenant = user.partition(".")[2]
    place = f"{find('host', 'hostaddr', default='localhost').lower()}:{find('port', default='5432')}"
    service = find("service", default="")
    where = f"{place} by service {service}" if service else place
    owner = f" of {tenant}" if tenant else ""
    return f"database {find('dbname', 'database', default=user or 'default')}{owner} at {where}"


def folder_name(identity: str) -> str:
    """
    Name a folder after a database, no two alike.

    >>> folder_name("database memories at db.example:5432")
    'memories-at-db.example-5432-002cb4bd'
    """
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", identity.removeprefix("database "))[:80].strip("-.")
    return f"{readable or 'database'}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def explain_origins(target: Target) -> dict[str, str]:
    """
    Say of each setting of a target what decided it; for a stack that is up, its config is asked.

    Raises:
        ExternalToolError: Pulumi failed.
    """
    if target.outputs is None:
        return dict(target.origins)
    from memharbor.stack import provisioner
    from memharbor.stack.config import config_settings

    stack = target.outputs.stack
    return name_origins(stack, target.settings, target.origins, config_settings(provisioner.read_config(stack)))


def name_origins(
    stack: str, deployed: Settings, origins: Mapping[str, str], config: Mapping[str, str]
) -> dict[str, str]:
    """
    Tell config and defaults apart where the outputs of a stack, which have every setting, decided.

    Args:
        stack: Name of the stack.
        deployed: The settings in force.
        origins: What decided each of them, as far as the outputs can tell.
        config: The settings in the stack's config.

    >>> named = name_origins("dev", Settings(pool_size=30), {"pool_size": "stack dev", "hnsw_m": "stack dev"}, {})
    >>> named["pool_size"], named["hnsw_m"]
    ('stack dev as deployed, the next `pulumi up` sets 20', 'default')
    """
    try:
        configured, _ = load_settings((f"stack {stack}", config))
    except ConfigError:  # `pulumi up` will say what is wrong with it
        return dict(origins)
    named = dict(origins)
    for name, origin in origins.items():
        if origin != f"stack {stack}":
            continue
        coming = getattr(configured, name)
        if coming != getattr(deployed, name):
            named[name] = f"stack {stack} as deployed, the next `pulumi up` sets {coming}"
        else:
            named[name] = f"config of stack {stack}" if name in config else "default"
    return named


def spell_uri(parts: Mapping[str, Any]) -> str:
    """
    Spell connection parameters as a libpq URI. Source: PostgreSQL manual, libpq, Connection URIs.

    >>> spell_uri({"user": "a@b", "host": "::1", "port": "5433", "dbname": "m", "sslmode": "require"})
    'postgresql://a%40b@[::1]:5433/m?sslmode=require'
    >>> spell_uri({"host": "/run/postgresql", "dbname": "m"})
    'postgresql:///m?host=/run/postgresql'
    """
    rest = {name: str(value) for name, value in parts.items() if value is not None}
    login = quote(rest.pop("user", ""), safe="")
    if login and "password" in rest:
        login += ":" + quote(rest.pop("password"), safe="")
    place = ""
    # A socket's folder, a zone and a list of hosts are clearer as parameters.
    if not set("/,%@") & set(rest.get("host", "") + rest.get("port", "")):
        host, port = rest.pop("host", ""), rest.pop("port", "")
        place = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
    dbname = quote(rest.pop("dbname", ""), safe="")
    query = urlencode(rest, quote_via=quote, safe="/")
    return f"postgresql://{login}{'@' if login else ''}{place}/{dbname}" + (f"?{query}" if query else "")


def _parse_dsn(dsn: str) -> dict[str, Any]:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    try:
        return dict(conninfo_to_dict(dsn))
    except psycopg.Error:
        # The parser quotes what it chokes on, which may be a piece of the password: neither text nor cause leaves.
        raise ConfigError(
            "the DSN cannot be read as a libpq connection string",
            hint="percent-encode special characters of the password, for instance `@` as `%40`",
        ) from None


def _settings_of_dsn(dsn: str) -> dict[str, str]:
    """Take the database's name from a DSN; nothing where it names none."""
    dbname = _parse_dsn(dsn).get("dbname")
    return {"database": str(dbname)} if dbname else {}
