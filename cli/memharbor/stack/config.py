"""
How a stack's config is laid out: which keys there are, and what a stack may be called.

Pure. Written by `memharbor.stack.init`, read by the stack's program (`memharbor_infra.config`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from memharbor.errors import ConfigError

NAMESPACE = "memharbor"
SECRETS_KEY = f"{NAMESPACE}:secrets"
# The key of the off-site copy's bucket is somebody else's: given by `pulumi config set --secret`, and rotated so.
OFFSITE_KEYS = (f"{NAMESPACE}:offsite_access_key", f"{NAMESPACE}:offsite_secret_key")
# The name is part of container names, host names and certificates.
_STACK_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")


def setting_key(setting: str) -> str:
    """
    Name the config key of a setting.

    >>> setting_key("pool_port")
    'memharbor:pool_port'
    """
    return f"{NAMESPACE}:{setting}"


def config_settings(config: Mapping[str, str]) -> dict[str, str]:
    """
    Pick the settings out of a stack's whole config; keys of other namespaces are left alone.

    >>> config_settings({"memharbor:pool_port": "6433", "memharbor:secrets": "…", "docker:host": "ssh://db"})
    {'pool_port': '6433'}
    """
    prefix = f"{NAMESPACE}:"
    return {
        key.removeprefix(prefix): value
        for key, value in config.items()
        if key.startswith(prefix) and key not in (SECRETS_KEY, *OFFSITE_KEYS)
    }


def offsite_key(config: Mapping[str, str]) -> tuple[str, str] | None:
    """
    Pick the off-site copy's access key and secret key out of a stack's whole config; `None` where one is missing.

    >>> offsite_key({"memharbor:offsite_access_key": "a", "memharbor:offsite_secret_key": "b"})
    ('a', 'b')
    """
    access_key, secret_key = (config.get(key, "").strip() for key in OFFSITE_KEYS)
    return (access_key, secret_key) if access_key and secret_key else None


def check_stack_name(stack: str) -> str:
    """
    Refuse a name that containers, host names or certificates could not carry.

    Raises:
        ConfigError: It is such a name.

    >>> check_stack_name("dev")
    'dev'
    """
    if not _STACK_NAME.fullmatch(stack):
        raise ConfigError(
            f"`{stack}` cannot be a stack's name: 1 to 31 of a-z, 0-9 and `-`, beginning with a letter",
            hint="run `memharbor stack init --stack NAME` with another name",
        )
    return stack
