"""
The schedule of a stack's backups, read and changed: the stack's config, its running container, `pulumi up` between them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from memharbor.backup.engine import BackupEngine
from memharbor.backup.schedule import Wanted, describe, parse_crontab, read_runs
from memharbor.errors import ConfigError
from memharbor.operations import open_stack
from memharbor.output import Output
from memharbor.server_files.postgres import CRONTAB
from memharbor.settings import Settings, load_settings
from memharbor.stack import StackNotUpError, provisioner, read_outputs
from memharbor.stack.config import config_settings, setting_key


def read_schedule(stack: str) -> dict[str, Any]:
    """
    Describe a stack's schedule: its config, what the container has, what comes next, how the last ones ended.

    Raises:
        ConfigError: The stack was never brought up, or its config is wrong.
        ExternalToolError: Pulumi or the engine failed.
    """
    opened = open_stack(stack)
    described = describe(_configured(stack), _in_force(opened.engine), read_runs(opened.engine), datetime.now(UTC))
    deployed = load_settings((f"stack {stack}", opened.outputs.settings))[0]
    same_retention = all(
        described[name] == getattr(deployed, f"backup_{name}") for name in ("retention_full", "retention_days")
    )
    return {"stack": stack, **described, "is_in_force": described["is_in_force"] and same_retention}


def set_schedule(stack: str, wanted: Wanted, output: Output, *, apply: bool, dry_run: bool) -> dict[str, Any]:
    """
    Write a schedule into the stack's config and bring it into force.

    PostgreSQL's container is made anew by that; clients of the pool wait, which takes some seconds.

    Args:
        stack: Name of the stack.
        wanted: What is to change.
        output: Where the steps are told.
        apply: Whether to bring it into force; a stack that is not up is never brought up by this.
        dry_run: Only look.

    Returns:
        `settings`: those asked for; `changed`: which of them differed; `next`: the command that is left to do, or None.

    Raises:
        ConfigError: The stack does not exist, or an expression is wrong; nothing was written then.
        ExternalToolError: Pulumi failed; the config is written, and the same command goes on from there.
    """
    settings = wanted.settings()
    before = _configured(stack)
    config = config_settings(provisioner.read_config(stack))
    after, _ = load_settings(("option", settings), (f"stack {stack}", config))
    changed = [name for name in settings if getattr(after, name) != getattr(before, name)]
    report: dict[str, Any] = {"stack": stack, "settings": settings, "changed": changed, "dry_run": dry_run}
    next_command = f"pulumi up --stack {stack}"
    if dry_run:
        return report | {"next": None}
    if changed:
        provisioner.set_plain(stack, {setting_key(name): str(getattr(after, name)) for name in changed})
    try:
        is_in_force = bool(read_schedule(stack)["is_in_force"])
    except StackNotUpError:
        return report | {"next": next_command}
    if not is_in_force and apply:
        _bring_into_force(stack, output)
        is_in_force = True
    return report | {"next": None if is_in_force else next_command}


def _bring_into_force(stack: str, output: Output) -> None:
    opened = open_stack(stack)
    with output.step("Pause the pool"):
        opened.pooler.pause(opened.pool_databases)
    try:
        with output.step(f"Bring the schedule into force with `pulumi up --stack {stack}`"):
            provisioner.up(stack)
    finally:
        opened.pooler.resume(opened.pool_databases)
        read_outputs.cache_clear()


def _configured(stack: str) -> Settings:
    if stack not in provisioner.list_stacks():
        raise ConfigError(f"there is no stack `{stack}`", hint=f"run `memharbor stack init --stack {stack}`")
    return load_settings((f"stack {stack}", config_settings(provisioner.read_config(stack))))[0]


def _in_force(engine: BackupEngine) -> dict[str, str]:
    return parse_crontab(engine.run_beside(["sh", "-c", f"cat {CRONTAB} 2>/dev/null"]).stdout)
