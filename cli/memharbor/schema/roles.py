"""
The roles of the server and the database itself: what must be there before the first step of the schema.

Roles belong to the whole server and have no ledger; what there is to do is found by comparing. A dry run does it all in a
transaction and takes it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

import psycopg
from psycopg import conninfo

from memharbor.database import Connection, run_statement, transaction, translated_errors
from memharbor.errors import ConfigError, StateRefusedError
from memharbor.names import ROLES
from memharbor.schema import ledger
from memharbor.schema.fingerprint import Difference, describe_catalog, differences, with_differences
from memharbor.schema.passwords import encrypt_password, matches
from memharbor.schema.sessions import session
from memharbor.schema.statements import split_statements
from memharbor.schema.verification import MAINTENANCE_DATABASE
from memharbor.settings import Settings
from memharbor.templates import render

Connect = Callable[[str], Connection]


@dataclass(frozen=True)
class RolesReport:
    """What changed on the server, in words, and what its administrator may not do."""

    changed: bool
    details: tuple[str, ...]
    notices: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    dry_run: bool = False


def apply_roles(
    connect: Connect, settings: Settings, passwords: Mapping[str, str], *, dry_run: bool = False
) -> RolesReport:
    """
    Create the roles with exactly their attributes, memberships and passwords. A second run does nothing.

    Args:
        connect: Opens a connection to a named database of the server, as its administrator.
        settings: The configuration; names the database whose ledger learns of the change.
        passwords: By short name (`app`) or role name. Roles that are not named keep what they have.
        dry_run: Report what would be done and change nothing.

    Raises:
        ConfigError: A password is for a role that is not ours, or is empty.
    """
    wanted = _by_role(passwords)
    with closing(connect(MAINTENANCE_DATABASE)) as connection, session(connection) as notices:
        with transaction(connection, rollback=dry_run):
            before = describe_catalog(connection)
            for name in ("roles/1_roles.sql", "roles/2_rewind.sql"):
                _run_template(connection, name, {})
            changes = differences(before, describe_catalog(connection))
            renewed = _renew_passwords(connection, wanted)
        if changes and not dry_run:
            _tell_ledger(connection, connect, settings, changes)
        details = [str(change) for change in changes] + [f"role {role} was given its password" for role in renewed]
        return RolesReport(bool(details), tuple(details), tuple(dict.fromkeys(notices)), changes, dry_run)


def _by_role(passwords: Mapping[str, str]) -> dict[str, str]:
    wanted: dict[str, str] = {}
    for name, password in passwords.items():
        role = ROLES.get(name, name)
        if role not in ROLES.values():
            raise ConfigError(f"`{name}` is no role of Memharbor: choose from {', '.join(ROLES)}")
        if not password:
            raise ConfigError(f"the password of `{role}` is empty, and PostgreSQL would lock the role out")
        wanted[role] = password
    return wanted


def _run_template(connection: Connection, name: str, variables: Mapping[str, object]) -> None:
    statements = split_statements(render(name, variables))
    for number, statement in enumerate(statements, start=1):
        with translated_errors(f"{name}, statement {number} of {len(statements)}"):
            run_statement(connection, statement)


def _renew_passwords(connection: Connection, wanted: Mapping[str, str]) -> list[str]:
    stored = _read_verifiers(connection)
    renewed = []
    for role, password in wanted.items():
        known = matches(stored.get(role), password) if stored is not None else _can_log_in(connection, role, password)
        if not known:
            verifier = encrypt_password(connection, role, password)
            _run_template(connection, "roles/password.sql", {"role": role, "verifier": verifier})
            renewed.append(role)
    return renewed


def _read_verifiers(connection: Connection) -> dict[str, str | None] | None:
    """Read the stored verifiers; None where only a superuser could."""
    row = connection.execute("select pg_catalog.has_table_privilege('pg_catalog.pg_authid', 'select')").fetchone()
    if row is None or not row[0]:
        return None
    return dict(connection.execute("select rolname, rolpassword from pg_catalog.pg_authid").fetchall())


def _can_log_in(connection: Connection, role: str, password: str) -> bool:
    target = conninfo.make_conninfo("", **{**connection.info.get_parameters(), "user": role, "password": password})
    try:
        psycopg.connect(target, connect_timeout=10).close()
    except psycopg.OperationalError:
        return False
    return True


def _tell_ledger(
    maintenance: Connection, connect: Connect, settings: Settings, changes: tuple[Difference, ...]
) -> None:
    """Let the database's record of its catalog know, or its next verification would call this drift."""
    shared = tuple(change for change in changes if change.key.startswith(("role ", "settings memharbor_")))
    query = "select from pg_catalog.pg_database where datname = %s"
    if maintenance.execute(query, (settings.database,)).fetchone() is None:
        return  # there is no database yet
    with closing(connect(settings.database)) as connection, session(connection):
        recorded = ledger.read_recorded_catalog(connection)
        if recorded is not None and shared:
            ledger.record_catalog(connection, with_differences(recorded, shared))


def ensure_database(connection: Connection, settings: Settings, *, dry_run: bool = False) -> bool:
    """
    Create the database that holds the memories, where it does not exist.

    Args:
        connection: To database `postgres`, as an administrator who may create databases.
        settings: The configuration; names the database.
        dry_run: Only say whether it would be created.

    Returns:
        Whether it was (or would be) created.

    Raises:
        StateRefusedError: It exists with another encoding than UTF-8, or its owner role does not.
    """
    with session(connection):
        row = connection.execute(
            "select pg_catalog.pg_encoding_to_char(encoding) from pg_catalog.pg_database where datname = %s",
            (settings.database,),
        ).fetchone()
        if row is not None:
            if row[0] != "UTF8":
                raise StateRefusedError(
                    f"database `{settings.database}` has encoding {row[0]}, and Mem0's payloads need UTF8",
                    hint="set `database` to a name that does not exist yet",
                )
            return False
        if dry_run:
            return True
        owner = connection.execute("select pg_catalog.to_regrole(%s)", (ledger.OWNER,)).fetchone()
        if owner is None or owner[0] is None:
            raise StateRefusedError(
                f"role {ledger.OWNER} does not exist on this server",
                hint="ansible-playbook ansible/playbooks/roles.yml",
            )
        template = connection.execute(
            "select pg_catalog.pg_encoding_to_char(encoding) from pg_catalog.pg_database where datname = 'template1'"
        ).fetchone()
        from_template0 = template is None or template[0] != "UTF8"
        _run_template(
            connection, "roles/database.sql", {"database": settings.database, "from_template0": from_template0}
        )
        return True
