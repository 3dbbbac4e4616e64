"""
Read the settings that a project of the Mem0 Platform should have, from a file of them or from a configuration of Mem0.

Texts are taken as they stand: a `${NAME}` in them stays one, so that no secret of this machine goes to a service.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memharbor.errors import ConfigError, SourceDataError
from memharbor.mem0_config.notes import Note, Notes
from memharbor.mem0_config.reading import read_configuration
from memharbor.mem0_config.rules import PROMPT_CHANGED, RENAMED


def read_project_settings(path: Path) -> tuple[dict[str, Any], list[Note]]:
    """
    Read settings by the names that the service has for them; what it has none for keeps its own.

    Args:
        path: A mapping in JSON, TOML or YAML, or a configuration of Mem0 of any release, also in Python.

    Returns:
        The settings, and what a person should look at.

    Raises:
        UsageError: It is of another form.
        SourceDataError: It cannot be understood, or says one setting twice.
        ConfigError: It is YAML, and PyYAML is not installed.
    """
    readers: dict[str, Callable[[str], Any]] = {".json": json.loads, ".toml": tomllib.loads}
    suffix = path.suffix.lower()
    readers |= dict.fromkeys((".yaml", ".yml"), _read_yaml)
    # Python is looked through for a configuration; and what is none of these is refused there.
    found = _read(path, readers[suffix]) if suffix in readers else read_configuration(path)
    notes = Notes()
    settings: dict[str, Any] = {}
    for key, value in found.items():
        name = RENAMED.get(str(key), str(key))
        if name in settings:
            raise SourceDataError(f"{path.name} says `{name}` twice, also as `{key}`", hint="leave one of them")
        settings[name] = value
        if name != key:
            notes.add("renamed", key, f"it is `{name}` there; {PROMPT_CHANGED}")
    return settings, notes


def _read(path: Path, reader: Callable[[str], Any]) -> dict[str, Any]:
    try:
        found = reader(path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise SourceDataError(f"{path.name} cannot be read: {exc.strerror}") from None
    except (ValueError, RecursionError) as exc:
        line = f", line {exc.lineno}" if isinstance(exc, json.JSONDecodeError) else ""
        raise SourceDataError(f"{path.name}{line}: this is no {path.suffix[1:].upper()}") from None
    if not isinstance(found, dict):
        raise SourceDataError(f"{path.name} is no mapping", hint='it is one like {"custom_instructions": "…"}')
    return found


def _read_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as exc:
        raise ConfigError("PyYAML is not installed", hint="run `pip install pyyaml`, or save the file as JSON") from exc
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError("no YAML") from None
