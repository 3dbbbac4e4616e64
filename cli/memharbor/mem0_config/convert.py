"""
Convert a configuration of Mem0 0.1.x or 1.x into one of 2.x that finds the same memories, and say what was changed.

Nothing is left to a default that differs between the releases. The notes name every key that was dropped, renamed,
changed or added; they never quote a value that may be a secret. Pure, but for the question to the installed Mem0.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memharbor.errors import SourceDataError
from memharbor.mem0_config import rules, stores
from memharbor.mem0_config.checking import Checker
from memharbor.mem0_config.notes import Notes
from memharbor.mem0_config.rules import COMPONENTS, Component, Release
from memharbor.mem0_config.secrets import replace_secrets
from memharbor.mem0_config.values import Text, Unreadable

_ONLY_1 = {"minimax", "fastembed", "cassandra", "azure_mysql", "turbopuffer"}
_NAME_CHARACTERS = frozenset(string.ascii_lowercase + string.digits + "_")


@dataclass(frozen=True)
class Converted:
    """
    A configuration of the present release.

    Args:
        config: Plain values, with `Text` where variables of the environment stand.
        notes: What was changed, in order.
        release: What it was taken for.
        checked_by: The Mem0 that accepted it; None where it could not be asked.
    """

    config: dict[str, Any]
    notes: Notes
    release: Release
    checked_by: str | None


def convert(old: Mapping[str, Any], release: Release | None = None, *, name: str = "the configuration") -> Converted:
    """
    Convert a configuration.

    Args:
        old: As `reading.read_configuration` returns it.
        release: What it was written for; told from its keys where not given, and 0.1 where they do not tell.
        name: How messages call it.

    Raises:
        SourceDataError: It is of 2.x already, a component is neither a name nor a mapping, or the installed Mem0 refuses
            the result.
    """
    if "custom_instructions" in old and not (set(rules.DROPPED) | set(rules.RENAMED)) & set(old):
        raise SourceDataError(
            f"{name} is a configuration of Mem0 2.x already: it has `custom_instructions`",
            hint="compare it with `memharbor config mem0 --basic`",
        )
    work = _Conversion(name, release, Checker())
    config = work.top_level(work.readable(copy.deepcopy(dict(old)), ()))
    for component in COMPONENTS:
        if component != "reranker" or component in config:
            config[component] = work.component(component, config.get(component))
    keys = work.checker.keys("vector_store", _provider(config))
    stores.pin_dims(config, work.release, work.notes, keys, certain=work.given is not None)
    config, found = replace_secrets(config)
    for each in found:
        work.notes.add(
            "secret",
            each.path,
            f"it stood in the file; `{each.variable}` of the environment is there now, to be set to just that",
        )
    work.note_defaults(config, ())
    work.check(config)
    order = [*COMPONENTS, "history_db_path", "custom_instructions", "version"]
    ordered = {key: config[key] for key in order if key in config}
    return Converted(ordered, work.notes, work.release, work.checker.release)


def _provider(config: Mapping[str, Any]) -> str:
    return str(config["vector_store"]["provider"])


class _Conversion:
    def __init__(self, name: str, release: Release | None, checker: Checker) -> None:
        self.name = name
        self.checker = checker
        self.notes = Notes()
        self.given = release
        self.release: Release = release or "0.1"

    def readable(self, value: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        """Leave out what cannot be read as data."""
        kept = {}
        for key, each in value.items():
            line = _unreadable_line(each)
            if line is not None:
                self.notes.add(
                    "dropped",
                    ".".join((*path, key)),
                    f"only running line {line} could tell it: put it back by hand",
                )
            else:
                kept[key] = self.readable(each, (*path, key)) if isinstance(each, dict) else each
        return kept

    def top_level(self, old: dict[str, Any]) -> dict[str, Any]:
        """Keep, rename or drop the keys of the first level, and tell the release from them."""
        if self.given is None and ("reranker" in old or _ONLY_1 & {_provider_of(old.get(name)) for name in COMPONENTS}):
            self.release = "1.0"
        config: dict[str, Any] = {}
        for key, value in old.items():
            if key in rules.DROPPED:
                self.notes.add("dropped", key, rules.DROPPED[key])
            elif key in rules.RENAMED:
                self._rename_prompt(old, config, key, value)
            elif key in rules.TOP_KEYS:
                config[key] = value
            else:
                self.notes.add("dropped", key, "Mem0 2.x does not know it, and would ignore it without a word")
        for key in [key for key, value in config.items() if value is None]:
            del config[key]
        if config.get("version", "v1.1") != "v1.1":
            self.notes.add("changed", "version", "to `v1.1`: the form of 1.0, bare lists, is gone")
            config["version"] = "v1.1"
        return config

    def _rename_prompt(self, old: Mapping[str, Any], config: dict[str, Any], key: str, value: Any) -> None:
        new = rules.RENAMED[key]
        if old.get(new) is not None or config.get(new) is not None:
            self.notes.add("dropped", key, f"`{new}` is there too, and is the one that 2.x reads")
        elif value is not None:
            self.notes.add("renamed", key, f"to `{new}`; {rules.PROMPT_CHANGED}")
            config[new] = value

    def component(self, component: Component, value: Any) -> dict[str, Any]:
        """Bring a component into the form `{provider, config}` with keys that 2.x takes and the model that it had."""
        provider, config = self._taken_apart(component, value)
        if component == "vector_store":
            provider, config = stores.convert_store(provider, config, self.notes)
        known = self.checker.keys(component, provider)
        for key in [] if known is None else sorted(set(config) - known):
            del config[key]
            self.notes.add("dropped", f"{component}.config.{key}", f"`{provider}` of Mem0 2.x does not take it")
        self._pin_model(component, provider, config)
        return {"provider": provider, "config": config}

    def _taken_apart(self, component: Component, value: Any) -> tuple[str, dict[str, Any]]:
        default = rules.DEFAULT_PROVIDERS[component]
        if value is None:
            self.notes.add("pinned", f"{component}.provider", f"`{default}`, which was the default")
            return default, {}
        if isinstance(value, str):
            self.notes.add(
                "changed", component, "from a bare name to `{provider, config}`, the only form that is taken"
            )
            value = {"provider": value}
        if not isinstance(value, dict):
            raise SourceDataError(f"{self.name}: `{component}` is neither a name nor a mapping")
        for key in sorted(set(value) - {"provider", "config"}):
            self.notes.add("dropped", f"{component}.{key}", "a component has `provider` and `config` only")
        provider, config = value.get("provider", default), value.get("config")
        if not isinstance(provider, str) or not provider or not set(provider) <= _NAME_CHARACTERS:
            raise SourceDataError(f"{self.name}: `{component}.provider` is no name of a provider")
        if config is not None and not isinstance(config, dict):
            raise SourceDataError(f"{self.name}: `{component}.config` is no mapping")
        return provider, dict(config or {})

    def _pin_model(self, component: Component, provider: str, config: dict[str, Any]) -> None:
        if config.get("model") is not None or "huggingface_base_url" in config:
            return
        model = rules.old_model(component, provider, self.release)
        if model is None:
            return
        config["model"] = model
        other = rules.old_model(component, provider, "1.0" if self.release == "0.1" else "0.1")
        text = f"`{model}`, which {self.release} took where nothing was said"
        if other != model and self.given is None:
            text += f"; pass `--from {'1.0' if self.release == '0.1' else '0.1'}` if it ran there, which took `{other}`"
        self.notes.add("pinned", f"{component}.config.model", text)

    def note_defaults(self, value: Any, path: tuple[str, ...]) -> None:
        """Name what a file took where a variable is not set: a reference in JSON cannot say it."""
        if isinstance(value, dict):
            for key, each in value.items():
                self.note_defaults(each, (*path, key))
        for variable in value.variables if isinstance(value, Text) else ():
            if variable.default is not None:
                self.notes.add(
                    "check", ".".join(path), f"`{variable.name}` was `{variable.default}` where it is not set"
                )

    def check(self, config: dict[str, Any]) -> None:
        """Ask the installed Mem0; what it refuses is an error, what it cannot tell a note."""
        if self.checker.release is None:
            self.notes.add("check", "", f"not checked against Mem0: {self.checker.why_not}")
            return
        try:
            problems = self.checker.problems(config)
        except ImportError as exc:
            self.notes.add("check", "vector_store", f"not checked against Mem0, which needs {exc.name or exc} for it")
            return
        if problems:
            raise SourceDataError(
                f"mem0ai {self.checker.release} refuses what {self.name} converts to: {'; '.join(problems)}",
                hint="mend that in the file, and convert it again",
            )


def _provider_of(value: Any) -> str:
    provider = value.get("provider") if isinstance(value, dict) else value
    return provider if isinstance(provider, str) else ""


def _unreadable_line(value: Any) -> int | None:
    """Find the line of a value that cannot be read; a list is one value."""
    if isinstance(value, list):
        lines = [_unreadable_line(each) for each in value]
        return next((line for line in lines if line is not None), None)
    return value.line if isinstance(value, Unreadable) else None
