"""
Read an old configuration of Mem0 from a file, as data: Python, JSON, YAML or TOML.

Messages name file and line and never quote the text, which may hold secrets.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from memharbor.errors import ConfigError, SourceDataError, UsageError
from memharbor.mem0_config.python_source import read_python
from memharbor.mem0_config.rules import is_configuration
from memharbor.mem0_config.values import with_references


def read_configuration(path: Path) -> dict[str, Any]:
    """
    Read a configuration.

    Args:
        path: A file that ends in `.py`, `.json`, `.yaml`, `.yml` or `.toml`.

    Raises:
        UsageError: It ends in something else.
        SourceDataError: It cannot be understood; the message names the line where there is one.
        ConfigError: It is YAML, and PyYAML is not installed.
    """
    readers = {".py": read_python, ".json": _read_json, ".toml": _read_toml, ".yaml": _read_yaml, ".yml": _read_yaml}
    if path.suffix.lower() not in readers:
        raise UsageError(
            f"`{path.name}` is none of {', '.join(sorted(readers))}",
            hint="rename it to what it holds, or save it as JSON",
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SourceDataError(f"{path.name} is no UTF-8 text") from None
    except OSError as exc:
        raise SourceDataError(f"{path.name} cannot be read: {exc.strerror}") from None
    found = readers[path.suffix.lower()](text, path.name)
    if path.suffix.lower() == ".py":
        return dict(found)
    return {key: with_references(each) for key, each in _configuration_in(found, path.name).items()}


def _read_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as exc:
        raise SourceDataError(f"{name}, line {exc.lineno}: this is no JSON: {exc.msg}") from None
    except RecursionError:
        raise SourceDataError(f"{name} is nested too deeply") from None


def _read_toml(text: str, name: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        line = re.search(r"\(at line (\d+), column \d+\)$", str(exc))
        raise SourceDataError(f"{name}{f', line {line[1]}' if line else ''}: this is no TOML") from None


def _read_yaml(text: str, name: str) -> Any:
    try:
        import yaml
    except ImportError as exc:
        raise ConfigError(
            f"{name} is YAML, and PyYAML is not installed", hint="run `pip install pyyaml`, or save the file as JSON"
        ) from exc
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        raise SourceDataError(f"{name}{f', line {mark.line + 1}' if mark else ''}: this is no YAML") from None
    except (RecursionError, ValueError):
        raise SourceDataError(f"{name} is no YAML that can be read") from None


def _configuration_in(found: Any, name: str) -> dict[str, Any]:
    """Find the configuration: the whole file, or the one mapping of its first level that looks like one."""
    if isinstance(found, dict):
        inner = [each for each in found.values() if isinstance(each, dict) and is_configuration(each)]
        if is_configuration(found):
            return dict(found)
        if len(inner) == 1:
            return dict(inner[0])
        if len(inner) > 1:
            raise SourceDataError(
                f"{name} holds {len(inner)} configurations", hint="put the one that is meant into a file of its own"
            )
    raise SourceDataError(
        f"{name} holds no configuration of Mem0", hint="it is a mapping with `vector_store`, `llm` or `embedder`"
    )
