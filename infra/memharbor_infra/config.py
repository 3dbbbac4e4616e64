"""
From the stack's config to valid settings and secrets, before any resource is created.

Pure: takes Pulumi's config as a mapping of full keys to texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from memharbor.errors import ConfigError
from memharbor.settings import Settings, load_settings
from memharbor.stack.config import OFFSITE_KEYS, SECRETS_KEY, check_stack_name, config_settings, offsite_key
from memharbor.stack.secrets import StackSecrets, check_public_names, parse_secrets


@dataclass(frozen=True)
class Configuration:
    """Everything that the program works from. `offsite_key` is access key and secret key of the off-site copy."""

    stack: str
    settings: Settings
    secrets: StackSecrets
    offsite_key: tuple[str, str] | None = field(default=None, repr=False)


def read_configuration(stack: str, config: Mapping[str, str], conflicts: Sequence[str] = ()) -> Configuration:
    """
    Validate the config of a stack.

    Args:
        stack: Name of the stack.
        config: All config of the stack; keys of other namespaces (`docker:host`) are left alone.
        conflicts: What of it does not go with what is already there, see `memharbor.stack.conflicts`.

    Raises:
        ConfigError: The name, a key or a value is wrong (the message lists all problems), or the secrets are
            missing or not for these settings.
    """
    check_stack_name(stack)
    settings, _ = load_settings((f"stack {stack}", config_settings(config)), conflicts=conflicts)
    if SECRETS_KEY not in config:
        raise ConfigError(f"stack `{stack}` has no secrets yet", hint=f"run `memharbor stack init --stack {stack}`")
    stack_secrets = parse_secrets(config[SECRETS_KEY])
    check_public_names(stack, stack_secrets, settings.public_name_list)
    if settings.offsite_endpoint:
        _check_offsite(stack, settings, config)
    return Configuration(stack, settings, stack_secrets, offsite_key(config))


def _check_offsite(stack: str, settings: Settings, config: Mapping[str, str]) -> None:
    if not settings.offsite_bucket:
        raise ConfigError(
            "offsite_endpoint is set, and offsite_bucket is not",
            hint=f"run `pulumi config set offsite_bucket BUCKET --stack {stack}`",
        )
    if offsite_key(config) is None:
        names = [name.partition(":")[2] for name in OFFSITE_KEYS]
        raise ConfigError(
            "offsite_endpoint is set, and the key of its bucket is not",
            hint=[f"run `pulumi config set --secret {name} --stack {stack}`" for name in names],
        )
