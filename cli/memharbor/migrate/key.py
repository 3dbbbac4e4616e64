"""
Find the key of a service: in a file, or in the environment; never in an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import SecretStr

from memharbor.errors import ConfigError


def find_key(variable: str, environment: Mapping[str, str], file: Path | None = None) -> SecretStr | None:
    """
    Find a key; `None` where there is none, as endpoints of one's own often ask for none.

    Args:
        variable: Environment variable with the key; the same with `_FILE` behind it may name a file instead.
        environment: The environment.
        file: With the key as its only text; it goes before the environment.

    Raises:
        ConfigError: The file cannot be read, or is empty.

    >>> find_key("OPENAI_API_KEY", {}) is None
    True
    """
    named = file or (Path(environment[f"{variable}_FILE"]) if environment.get(f"{variable}_FILE") else None)
    if named is None:
        return SecretStr(environment[variable]) if environment.get(variable) else None
    try:
        text = named.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the key cannot be read from `{named}`: {type(exc).__name__}") from exc
    if not text:
        raise ConfigError(f"`{named}` is empty; it should have the key", hint=f"or set {variable}")
    return SecretStr(text)
