"""
What the Ansible module does, as one function: the roll-out of SQL, planned or applied.

The module is a thin edge over this; this is a thin edge over `memharbor.schema`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from memharbor import schema
from memharbor.errors import ConfigError, VerificationError
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
    given, _ = load_settings(("inventory", settings))
    if target.outputs is not None and given != target.settings:
        names = [name for name in type(given).model_fields if getattr(given, name) != getattr(target.settings, name)]
        raise ConfigError(
            f"the inventory and {target.name} differ in {', '.join(names)}",
            hint="change the stack's config with `pulumi config set`, then run `pulumi up`",
        )
    if action == "roles":
        return _roll_out_roles(target, dry_run)
    if action == "database":
        return _create_database(target, dry_run)
    if action == "tenant_indexes":
        return _roll_out_tenant_indexes(target, dry_run)
    if action == "verify":
        return _verify(target)
    if component is None:
        raise ConfigError("action `apply` needs a component")
    return _apply(target, component, dry_run)
