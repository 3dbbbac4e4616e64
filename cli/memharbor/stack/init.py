"""
The beginning and the end of a stack: what it needs before its first `pulumi up`, and how it is deleted with its data.

Repeating `init_stack` changes nothing, not a byte, until a certificate is about to expire: that one is renewed. Secrets
and the CA are kept in the stack's config, encrypted by Pulumi; a later version that needs more of them adds it here.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memharbor.output import Output
from memharbor.settings import Settings, environment_name, load_settings
from memharbor.stack import provisioner
from memharbor.stack.config import SECRETS_KEY, check_stack_name, config_settings, setting_key
from memharbor.stack.outputs import ca_certificate_path, write_ca_certificate
from memharbor.stack.resources import StackResources
from memharbor.stack.secrets import certificate_nodes, complete_secrets, parse_secrets


@dataclass(frozen=True)
class InitReport:
    """
    What `init_stack` found and did, or would do.

    Args:
        stack: The stack's name.
        is_new: Whether the stack was created.
        has_new_secrets: Whether secrets were generated.
        changed_settings: Settings that were written into its config.
        kept_settings: For a stack that is not new: how its config is made to hold what the environment says otherwise.
        ca_certificate: File with the CA certificate.
        dry_run: Whether nothing was done.
    """

    stack: str
    is_new: bool
    has_new_secrets: bool
    changed_settings: tuple[str, ...]
    kept_settings: dict[str, str]
    ca_certificate: Path
    dry_run: bool

    @property
    def changed(self) -> bool:
        """Whether anything was written into the stack's config."""
        return self.is_new or self.has_new_secrets or bool(self.changed_settings)

    def as_data(self) -> dict[str, Any]:
        """Describe it for `--output json`."""
        return {
            "stack": self.stack,
            "is_new": self.is_new,
            "has_new_secrets": self.has_new_secrets,
            "changed_settings": list(self.changed_settings),
            "kept_settings": self.kept_settings,
            "ca_certificate": str(self.ca_certificate),
            "changed": self.changed,
        }

    @property
    def notes(self) -> list[str]:
        """Say where the environment and the stack's config differ, each with the command that changes the config."""
        return [
            f"{environment_name(name)} differs from the config of stack {self.stack}, which was kept; to change it:"
            f" {command}"
            for name, command in self.kept_settings.items()
        ]

    @property
    def text(self) -> str:
        """Describe it for people."""
        if not self.changed:
            return f"stack {self.stack}: nothing to do"
        done = ["created"] if self.is_new else []
        done += ["secrets and certificates generated"] if self.has_new_secrets else []
        done += [f"set {', '.join(self.changed_settings)}"] if self.changed_settings else []
        return f"stack {self.stack}: {'would be ' if self.dry_run else ''}{'; '.join(done)}"


def init_stack(stack: str, wanted: Mapping[str, str], *, dry_run: bool = False) -> InitReport:
    """
    Create a stack where it is missing, and complete its config.

    The settings of a stack that exists belong to `pulumi config`: where `wanted` differs from them, that is reported.

    Args:
        stack: Name of the stack.
        wanted: Settings to write into the config of a new stack.
        dry_run: Only look.

    Raises:
        ConfigError: The name or a setting is wrong; nothing was created then.
        ExternalToolError: Pulumi failed.
    """
    check_stack_name(stack)
    is_new = stack not in provisioner.list_stacks()
    config = {} if is_new else provisioner.read_config(stack)
    settings, kept = _choose_settings(stack, wanted, config, is_new=is_new)
    if is_new and not dry_run:
        provisioner.create_stack(stack)
        # The config file of a stack whose state is gone still has its secrets: they are kept.
        config = provisioner.read_config(stack)
    written = wanted if is_new else {}
    changed = {name: value for name, value in written.items() if config.get(setting_key(name)) != value}
    existing = parse_secrets(config[SECRETS_KEY]) if SECRETS_KEY in config else None
    secrets = complete_secrets(stack, certificate_nodes(settings), existing)
    if not dry_run:
        if changed:
            provisioner.set_plain(stack, {setting_key(name): value for name, value in changed.items()})
        if secrets is not existing:
            provisioner.set_secret(stack, SECRETS_KEY, secrets.model_dump_json())
        write_ca_certificate(stack, secrets.authority.certificate)
    has_new_secrets = secrets is not existing
    return InitReport(stack, is_new, has_new_secrets, tuple(changed), kept, ca_certificate_path(stack), dry_run)


def _choose_settings(
    stack: str, wanted: Mapping[str, str], config: Mapping[str, str], *, is_new: bool
) -> tuple[Settings, dict[str, str]]:
    present = (f"stack {stack}", config_settings(config))
    asked, _ = load_settings(("environment", wanted), present)
    if is_new:
        return asked, {}
    settings, _ = load_settings(present)
    differing = [name for name in wanted if getattr(asked, name) != getattr(settings, name)]
    return settings, {
        name: f"pulumi config set {name} {shlex.quote(wanted[name])} --stack {stack}" for name in differing
    }


def destroy_stack(stack: str, output: Output, *, dry_run: bool = False) -> dict[str, Any]:
    """
    Delete a stack with all its memories, backups and secrets.

    Args:
        stack: Name of the stack; what another stack made is not touched.
        output: Where the steps are told.
        dry_run: Only look.

    Returns:
        `deleted`: what was, or would be, deleted, by name; empty where there is no such stack.

    Raises:
        ConnectError: No Docker engine answers.
        ExternalToolError: Pulumi or the engine failed; the same call goes on from there.
    """
    check_stack_name(stack)
    exists = stack in provisioner.list_stacks()
    resources = StackResources(stack)
    deleted = resources.names() + ([f"stack {stack}"] if exists else [])
    if dry_run:
        return {"stack": stack, "deleted": deleted}
    if exists:
        with output.step("destroy the stack's resources"):
            provisioner.unprotect(stack)
            provisioner.destroy(stack)
    with output.step("delete the data volumes"):
        resources.remove()
    if exists:
        with output.step("delete the stack's state and config"):
            provisioner.remove_stack(stack)
    shutil.rmtree(ca_certificate_path(stack).parent, ignore_errors=True)
    return {"stack": stack, "deleted": deleted}
