"""
From the stack's config to valid settings and secrets, before any resource is created.

Pure: takes Pulumi's config as a mapping of full keys to texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memharbor.errors import ConfigError
from memharbor.settings import Settings, load_settings
from memharbor.stack.config import SECRETS_KEY, check_stack_name, config_settings
from memharbor.stack.secrets import StackSecrets, parse_secrets


@dataclass(frozen=True)
class Configuration:
    """Everything that the program works from."""

    stack: str
    settings: Settings
    secrets: StackSecrets


def read_configuration(stack: str, config: Mapping[str, str]) -> Configuration:
    """
    Validate the config of a stack.

    Args:
        stack: Name of the stack.
        config: All config of the stack; keys of other namespaces (`docker:host`) are left alone.

    Raises:
        ConfigError: The name, a key or a value is wrong (the message lists all problems), or the secrets are missing.
    """
    check_stack_name(stack)
    settings, _ = load_settings((f"stack {stack}", config_settings(config)))
    if SECRETS_KEY not in config:
        raise ConfigError(f"stack `{stack}` has no secrets yet", hint=f"run `memharbor stack init --stack {stack}`")
    return Configuration(stack, settings, parse_secrets(config[SECRETS_KEY]))
