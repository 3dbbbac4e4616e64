"""
What the Ansible module does, as one function: the roll-out of SQL, planned or applied.

The module is a thin edge over this; this is a thin edge over `memharbor.schema`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from memharbor import schema
from memharbor.database import Connection
from memharbor.errors import ConfigError, ConnectError, VerificationError
from memharbor.settings import load_settings
from memharbor.target import Target, find_target


def roll_out(
    *, action: str, component: str | None, stack: str, settings: Mapping[str, Any], dry_run: bool
) -> dict[str, Any]:
    """
    Roll one part out and describe what changed, in the shape that Ansible returns.

    Args:
        action: `roles`, `database`, `apply`, `tenant_indexes` or `verify`.
        component: The component of `apply`.
        stack: Name of the stack; not read where MEMHARBOR_DSN is set.
        settings: The settings of the inventory.
        dry_run: Whether to plan only.

    Raises:
        ConfigError: The inventory's settings are not those of the stack.
        VerificationError: `verify` found a difference.
    """
    target = find_target(stack, os.environ.get("MEMHARBOR_DSN"))
    _refuse_other_settings(target, settings)
    actions: dict[str, Callable[[], dict[str, Any]]] = {
        "roles": lambda: _roles(target, dry_run),
        "database": lambda: _database(target, dry_run),
        "apply": lambda: _apply(target, component, dry_run),
        "tenant_indexes": lambda: _tenant_indexes(target, dry_run),
        "verify": lambda: _verify(target, dry_run),
    }
    return actions[action]()


def _refuse_other_settings(target: Target, settings: Mapping[str, Any]) -> None:
    given, _ = load_settings(("inventory", settings))
    names = [name for name in type(given).model_fields if getattr(given, name) != getattr(target.settings, name)]
    if names:
        raise ConfigError(
            f"the inventory and {target.name} differ in {', '.join(names)}",
            hint="change the stack's config with `pulumi config set`, then run `pulumi up`"
            if target.outputs is not None
            else "set MEMHARBOR_* the same for the inventory and the roll-out",
        )


def _roles(target: Target, dry_run: bool) -> dict[str, Any]:
    def connect(dbname: str) -> Connection:
        return target.connect(dbname=dbname)

    report = schema.apply_roles(connect, target.settings, target.passwords, dry_run=dry_run)
    return {
        "changed": report.changed,
        "applied": list(report.details),
        "notices": list(report.notices),
        "diff": _diff("roles", report.details),
    }


def _database(target: Target, dry_run: bool) -> dict[str, Any]:
    if target.outputs is None:
        return {"changed": False, "applied": [], "notices": ["the database of MEMHARBOR_DSN is taken as it is"]}
    with closing(target.connect(dbname=schema.MAINTENANCE_DATABASE, autocommit=True)) as connection:
        changed = schema.ensure_database(connection, target.settings, dry_run=dry_run)
    applied = [f"database {target.settings.database}"] if changed else []
    return {"changed": changed, "applied": applied, "notices": [], "diff": _diff("database", applied)}


def _apply(target: Target, component: str | None, dry_run: bool) -> dict[str, Any]:
    if component is None:
        raise ConfigError("action `apply` needs a component")
    components = [component]
    connection = _open(target, dry_run)
    if connection is None:
        steps = schema.plan(None, target.settings, components=components)
        names = [step.name for step in steps]
        return {"changed": bool(names), "applied": names, "notices": [], "diff": _diff(component, map(_said, steps))}
    with closing(connection):
        todo = {step.name: step for step in schema.plan(connection, target.settings, components=components)}
        report = schema.apply(connection, target.settings, components=components, dry_run=dry_run)
    # What is said to the server, then what that changed (or would change) in its catalog.
    changes = [*(_said(todo[name]) for name in report.applied), *map(str, report.differences)]
    return {
        "changed": report.changed,
        "applied": list(report.applied),
        "notices": list(report.notices),
        "diff": _diff(component, changes),
    }


def _said(step: schema.PlannedStep) -> str:
    return f"-- step {step.name}\n{step.step.sql}"


def _tenant_indexes(target: Target, dry_run: bool) -> dict[str, Any]:
    connection = _open(target, dry_run)
    if connection is None:
        return {"changed": False, "applied": [], "notices": ["there is no memory yet"]}
    with closing(connection):
        if dry_run and schema.current(connection) is None:
            return {"changed": False, "applied": [], "notices": ["there is no memory yet"]}
        report = schema.tenant_indexes(connection, target.settings, dry_run=dry_run)
    # A user's id is the user's own data: the log says the index, not whom it is for.
    applied = [f"create {index.index_name} of {index.row_count} rows" for index in report.created]
    applied += [f"drop {index.index_name}" for index in report.dropped]
    applied += [f"repair {name}" for name in report.repaired]
    return {"changed": report.changed, "applied": applied, "notices": [], "diff": _diff("indexes", applied)}


def _verify(target: Target, dry_run: bool) -> dict[str, Any]:
    connection = _open(target, dry_run)
    if connection is None:
        return {"changed": False, "applied": [], "notices": ["there is nothing to verify yet"]}
    with closing(connection):
        if dry_run and schema.current(connection) is None:
            return {"changed": False, "applied": [], "notices": ["there is nothing to verify yet"]}
        findings = schema.verify(connection, target.settings, connect=lambda name: target.connect(dbname=name))
    if findings:
        raise VerificationError(
            f"{len(findings)} differences:\n" + "\n".join(f"{finding.message} ({finding.hint})" for finding in findings)
        )
    return {"changed": False, "applied": [], "notices": []}


def _open(target: Target, dry_run: bool) -> Connection | None:
    # The database of MEMHARBOR_DSN is taken as it is: nothing here would create it.
    return connect_if_exists(target) if dry_run and target.outputs is not None else target.connect()


def connect_if_exists(target: Target) -> Connection | None:
    """
    Connect to the target's database; None where the server answers and does not have it.

    Raises:
        ConnectError: The server does not answer or refuses the login.
    """
    try:
        return target.connect(dbname=target.settings.database)
    except ConnectError:
        if _lacks_database(target):
            return None
        raise


def _lacks_database(target: Target) -> bool:
    try:
        connection = target.connect(dbname=schema.MAINTENANCE_DATABASE, autocommit=True)
    except ConnectError:
        return False
    with closing(connection):
        query = "select from pg_catalog.pg_database where datname = %s"
        return connection.execute(query, (target.settings.database,)).fetchone() is None


def _diff(name: str, changes: Any) -> dict[str, str]:
    return {"before": "", "after": "".join(f"{change}\n" for change in changes), "after_header": name}
