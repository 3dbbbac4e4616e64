"""
The beginning and the end of a stack: what it needs before its first `pulumi up`, and how it is deleted with its data.

Repeating `init_stack` changes nothing, not a byte, until a certificate is about to expire: that one is renewed. Secrets
and the CA are kept in the stack's config, encrypted by Pulumi; a later version that needs more of them adds it here.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memharbor.errors import ConfigError, StateRefusedError
from memharbor.output import Output
from memharbor.settings import Settings, environment_name, load_settings
from memharbor.stack import provisioner
from memharbor.stack.config import (
    OFFSITE_KEYS,
    SECRETS_KEY,
    check_stack_name,
    config_settings,
    offsite_key,
    setting_key,
)
from memharbor.stack.escrow import Escrow, escrow_path, merge_settings, read_escrow, write_escrow
from memharbor.stack.outputs import ca_certificate_path, write_ca_certificate
from memharbor.stack.resources import StackResources
from memharbor.stack.secrets import StackSecrets, certificate_nodes, complete_secrets, parse_secrets


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
        escrow: File with the secrets, to be kept elsewhere.
        has_new_escrow: Whether no copy of it that is kept elsewhere serves.
        is_from_escrow: Whether the secrets came from such a copy.
        dry_run: Whether nothing was done.
    """

    stack: str
    is_new: bool
    has_new_secrets: bool
    changed_settings: tuple[str, ...]
    kept_settings: dict[str, str]
    ca_certificate: Path
    escrow: Path
    has_new_escrow: bool
    is_from_escrow: bool
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
            "escrow": str(self.escrow),
            "has_new_escrow": self.has_new_escrow,
            "changed": self.changed,
        }

    @property
    def notes(self) -> list[str]:
        """Say what is to be kept elsewhere, and where the environment and the config differ, with the next command."""
        keep = (
            f"keep a copy of {self.escrow} away from this machine: with it and the backup store alone everything can be"
            " restored, without it the backups cannot be read by anybody"
        )
        return ([keep] if self.has_new_escrow else []) + [
            f"{environment_name(name)} differs from the config of stack {self.stack}, which was kept; to change it:"
            f" {command}"
            for name, command in self.kept_settings.items()
        ]

    @property
    def text(self) -> str:
        """Describe it for people."""
        if not self.changed:
            return f"stack {self.stack}: {'escrow file written' if self.has_new_escrow else 'nothing to do'}"
        done = ["created"] if self.is_new else []
        origin = "secrets of the escrow file taken" if self.is_from_escrow else "secrets and certificates generated"
        done += [origin] if self.has_new_secrets else []
        done += [f"set {', '.join(self.changed_settings)}"] if self.changed_settings else []
        return f"stack {self.stack}: {'would be ' if self.dry_run else ''}{'; '.join(done)}"


def init_stack(
    stack: str, wanted: Mapping[str, str], *, escrow_file: Path | None = None, dry_run: bool = False
) -> InitReport:
    """
    Create a stack where it is missing, and complete its config.

    The settings of a stack that exists belong to `pulumi config`: where `wanted` differs from them, that is reported.

    Args:
        stack: Name of the stack.
        wanted: Settings to write into the config of a new stack.
        escrow_file: Whose secrets and settings a new stack gets, so that it can read that stack's backups.
        dry_run: Only look.

    Raises:
        ConfigError: The name, a setting or the escrow file is wrong; nothing was created then.
        StateRefusedError: The stack has other secrets than the escrow file.
        ExternalToolError: Pulumi failed.
    """
    check_stack_name(stack)
    kept_elsewhere = None if escrow_file is None else read_escrow(escrow_file)
    if kept_elsewhere is not None:
        wanted = merge_settings(kept_elsewhere, stack, wanted)
    is_new = stack not in provisioner.list_stacks()
    config = {} if is_new else provisioner.read_config(stack)
    settings, kept = _choose_settings(stack, wanted, config, is_new=is_new)
    if is_new and not dry_run:
        provisioner.create_stack(stack)
        # The config file of a stack whose state is gone still has its secrets: they are kept.
        config = provisioner.read_config(stack)
    changed = {name: value for name, value in wanted.items() if is_new and config.get(setting_key(name)) != value}
    existing = parse_secrets(config[SECRETS_KEY]) if SECRETS_KEY in config else None
    if kept_elsewhere is not None:
        _refuse_other_secrets(kept_elsewhere, existing)
    base = existing if kept_elsewhere is None or existing is not None else kept_elsewhere.secrets
    secrets = complete_secrets(stack, certificate_nodes(settings), base, public_names=settings.public_name_list)
    has_new_escrow = False
    if not dry_run:
        added = {} if secrets is existing else {SECRETS_KEY: secrets.model_dump_json()}
        if kept_elsewhere is not None and offsite_key(config) is None:
            added |= dict(zip(OFFSITE_KEYS, kept_elsewhere.offsite_key or (), strict=False))
        if changed:
            provisioner.set_plain(stack, {setting_key(name): value for name, value in changed.items()})
        for key, value in added.items():
            provisioner.set_secret(stack, key, value)
        offsite = offsite_key({**config, **added})
        write_ca_certificate(stack, secrets.authority.certificate)
        has_new_escrow = write_escrow(Escrow(stack, {**config_settings(config), **changed}, secrets, offsite))
    return InitReport(
        stack,
        is_new,
        has_new_secrets=secrets is not existing,
        changed_settings=tuple(changed),
        kept_settings=kept,
        ca_certificate=ca_certificate_path(stack),
        escrow=escrow_path(stack),
        # A copy that was just used needs no other one.
        has_new_escrow=has_new_escrow and kept_elsewhere is None,
        is_from_escrow=kept_elsewhere is not None,
        dry_run=dry_run,
    )


def _refuse_other_secrets(kept_elsewhere: Escrow, existing: StackSecrets | None) -> None:
    stack = kept_elsewhere.stack
    if existing is not None and not kept_elsewhere.opens(existing):
        raise StateRefusedError(
            f"stack `{stack}` has other secrets than the escrow file; its own would be lost",
            hint=f"where it was never brought up: `pulumi stack rm {stack}`, then the same command again",
        )


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
        `deleted`: what was, or would be, deleted, by name.

    Raises:
        ConfigError: There is no such stack, and nothing of it on the engine.
        ConnectError: No Docker engine answers.
        ExternalToolError: Pulumi or the engine failed; the same call goes on from there.
    """
    check_stack_name(stack)
    stacks = provisioner.list_stacks()
    exists = stack in stacks
    resources = StackResources(stack)
    deleted = resources.names() + ([f"stack {stack}"] if exists else [])
    if not deleted:
        raise _no_such_stack(stack, stacks)
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


def _no_such_stack(stack: str, stacks: Sequence[str]) -> ConfigError:
    there_are = f"there are {', '.join(f'`{name}`' for name in sorted(stacks))}" if stacks else "there is none"
    return ConfigError(
        f"there is no stack `{stack}`, and nothing of one on the engine; {there_are}",
        hint="name one of them: `memharbor stack destroy NAME`, or `make destroy STACK=NAME CONFIRM=NAME`"
        if stacks
        else "look at another state: PULUMI_BACKEND_URL says where stacks are kept",
    )
