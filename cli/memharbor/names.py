"""
Names that more than one layer spells, each written once. Imports nothing, so that help texts may read it too.
"""

from __future__ import annotations

from collections.abc import Mapping

DEFAULT_STACK = "dev"
STACK_VARIABLE = "MEMHARBOR_STACK"

# Login role by the short name that settings, secrets and commands use; `sql_templates/roles/` makes exactly these.
ROLES: Mapping[str, str] = {
    name: f"memharbor_{name}"
    for name in ("owner", "app", "service", "readonly", "backup", "pooler", "replicator", "rewind")
}
# Every login of a stack: PostgreSQL's superuser, who is not made by a template, is `admin`.
ROLE_NAMES: Mapping[str, str] = {"admin": "postgres", **ROLES}
# The logins of persons and programs; the others belong to the machinery.
DSN_ROLES = ("app", "service", "readonly", "owner", "backup", "admin")
