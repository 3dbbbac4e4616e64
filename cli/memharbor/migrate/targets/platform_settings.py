"""
Give a project of the Mem0 Platform the settings that it should have, as far as it has any of the kind.

What is asked for is compared first, and only what differs is set; then it is read back, since the service may say that it
set what it did not. Models, stores and rerankers are the service's own choice. Which project is meant the key says.
Sources: docs.mem0.ai, Get Project, Update Project, Custom Categories; mem0ai 2.2 `mem0/client/project.py`. Nobody has run
this against the live service; `tests/platform_server.py` says what is assumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import unified_diff
from typing import Any
from urllib.parse import quote

from memharbor.errors import ConfigError, SourceDataError
from memharbor.migrate.http import HttpClient
from memharbor.migrate.sources.platform import find_project


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_categories(value: Any) -> bool:
    """The guides show objects of a name and what belongs there; Mem0's own client types a list of names."""

    def one(each: Any) -> bool:
        return _is_text(each) or (isinstance(each, Mapping) and all(map(_is_text, [*each, *each.values()])))

    return isinstance(value, list) and all(map(one, value))


# What `client.project.update` sends, and what each has to be.
_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "custom_instructions": (_is_text, "a text"),
    "custom_categories": (_is_categories, "a list of objects, each a name and a description"),
    "agent_custom_instructions": (_is_text, "a text"),
    "multilingual": (_is_flag, "true or false"),
    "decay": (_is_flag, "true or false"),
}
SETTINGS = tuple(_KINDS)


@dataclass(frozen=True)
class Change:
    """
    A setting that differs.

    Args:
        name: Its name.
        present: As the project has it; `None` where it has none.
        wanted: As it should have it.
    """

    name: str
    present: Any
    wanted: Any

    def diff(self) -> str:
        r"""
        Show what differs, line by line.

        >>> print(Change("decay", None, True).diff())
        --- decay, as it is
        +++ decay, as asked for
        @@ -0,0 +1 @@
        +true
        """
        names = f"{self.name}, as it is", f"{self.name}, as asked for"
        return "\n".join(unified_diff(_lines(self.present), _lines(self.wanted), *names, lineterm=""))


@dataclass(frozen=True)
class SettingsSync:
    """
    What became of settings.

    Args:
        changes: Those that were set, or would be.
        same: Names that have the value already.
        unsupported: Names that the service has no setting for.
        untaken: Names that it said to have set, and has not.
    """

    changes: tuple[Change, ...] = ()
    same: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    untaken: tuple[str, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """Spell it as JSON data."""
        return {
            "changed": {change.name: {"from": change.present, "to": change.wanted} for change in self.changes},
            "same": list(self.same),
            "unsupported": list(self.unsupported),
            "untaken": list(self.untaken),
        }

    def text(self, *, dry_run: bool = False) -> str:
        """Spell it for people."""
        names = ", ".join(change.name for change in self.changes) or "nothing"
        same = f"; {', '.join(self.same)} is as asked for" if self.same else ""
        return "\n".join(
            [*(change.diff() for change in self.changes), f"{'would set' if dry_run else 'set'} {names}{same}"]
        )


def sync_settings(http: HttpClient, wanted: Mapping[str, Any], *, apply: bool = True) -> SettingsSync:
    """
    Give the project of a key its settings; what is `None` stays as it is there.

    Args:
        http: The service, with the key.
        wanted: Settings by name.
        apply: Whether they are set; else only compared.

    Raises:
        ConfigError: The key is refused, or belongs to no project.
        SourceDataError: One of them has the wrong type, or an answer is not what the API describes.
        ConnectError: The service cannot be reached; the same call goes on.
    """
    unsupported = tuple(name for name in wanted if name not in SETTINGS)
    asked = {name: value for name, value in wanted.items() if name in SETTINGS and value is not None}
    check_settings(asked)
    if not asked:
        return SettingsSync(unsupported=unsupported)
    project = find_project(http)
    if project is None:
        raise ConfigError(f"`{http.base_url}` names no project for the key", hint="make a key of a project")
    path = f"/api/v1/orgs/organizations/{quote(project[0], safe='')}/projects/{quote(project[1], safe='')}/"
    present = _read(http, path, asked)
    changes = tuple(
        Change(name, present.get(name), value)
        for name, value in asked.items()
        if not _is_same(present.get(name), value)
    )
    same = tuple(name for name in asked if name not in {change.name for change in changes})
    untaken: tuple[str, ...] = ()
    if changes and apply:
        body = {change.name: change.wanted for change in changes}
        # With both ids, as Mem0's own client sends it.
        http.request("PATCH", path, body={**body, "org_id": project[0], "project_id": project[1]})
        after = _read(http, path, body)
        untaken = tuple(name for name, value in body.items() if not _is_same(after.get(name), value))
    return SettingsSync(changes, same, unsupported, untaken)


def check_settings(wanted: Mapping[str, Any]) -> None:
    """
    Refuse values that the service has no use for, before anything is asked.

    Raises:
        SourceDataError: One has the wrong type.
    """
    for name, value in wanted.items():
        fits, what = _KINDS[name]
        if not fits(value):
            raise SourceDataError(
                f"`{name}` is not {what} that stands in the file itself", hint=f"make it {what}, or null"
            )


def _read(http: HttpClient, path: str, names: Collection[str]) -> Mapping[str, Any]:
    found = http.request("GET", path, params={"fields": list(names)}).data
    if not isinstance(found, Mapping):
        raise SourceDataError(f"`{http.base_url}{path}` answers no project")
    return found


def _is_same(present: Any, wanted: Any) -> bool:
    """Whether a setting has its value; what was never set is the same as what is empty, or false."""
    return bool(present == wanted or (present is None and not wanted))


def _lines(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return value.split("\n")
    return [json.dumps(each, ensure_ascii=False) for each in (value if isinstance(value, list) else [value])]
