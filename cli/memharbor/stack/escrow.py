"""
The key escrow file of a stack: its secrets and settings in one file, to be kept away from the machine.

With it and the backup store alone the stack comes up again elsewhere, with the same logins, and its backups can be read;
without it the backups are noise. It holds every secret in clear: only its owner may read it. What it holds is refreshed
by `memharbor stack init`; a copy made before stays good for restoring as long as no secret was made anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from memharbor.errors import ConfigError
from memharbor.stack import provisioner
from memharbor.stack.secrets import StackSecrets, parse_secrets

FORMAT = 1
_NOTE = "Every secret of this stack, in clear. Keep it away from the machine; how to use it: docs/how-to/schedule-backups.md"
# What the backups were made of; a stack that brings them back cannot have another one.
_FIXED_SETTINGS = ("database", "embedding_dims")


@dataclass(frozen=True)
class Escrow:
    """
    What an escrow file holds.

    Args:
        stack: The stack's name, under which the store keeps its backups.
        settings: The settings of its config, as texts.
        secrets: All of its secrets.
        offsite_key: Access key and secret key of the off-site copy; `None` where the stack has none.
    """

    stack: str
    settings: Mapping[str, str]
    secrets: StackSecrets = field(repr=False)
    offsite_key: tuple[str, str] | None = field(default=None, repr=False)

    def render(self) -> str:
        """Spell the file; the same stack gives the same bytes."""
        held = {"format": FORMAT, "note": _NOTE, "stack": self.stack, "settings": dict(sorted(self.settings.items()))}
        if self.offsite_key is not None:
            held["offsite_key"] = list(self.offsite_key)
        return json.dumps(held | {"secrets": self.secrets.model_dump(mode="json")}, indent=2, sort_keys=True) + "\n"

    def serves(self, other: Escrow) -> bool:
        """Tell whether it restores what the other one does: what it lacks, and leaf certificates, can be made anew."""
        return self.stack == other.stack and self.opens(other.secrets) and other.offsite_key in (None, self.offsite_key)

    def opens(self, secrets: StackSecrets) -> bool:
        """Tell whether it restores a stack of such secrets."""
        mine = self.secrets
        return (
            mine.repository_passphrase == secrets.repository_passphrase
            and mine.authority == secrets.authority
            and mine.passwords.items() <= secrets.passwords.items()
            and mine.store_secrets.items() <= secrets.store_secrets.items()
        )


def escrow_path(stack: str) -> Path:
    """Name the file where `memharbor stack init` puts a stack's escrow."""
    return provisioner.private_folder() / stack / "key-escrow.json"


def read_escrow(path: Path) -> Escrow:
    """
    Read an escrow file.

    Raises:
        ConfigError: There is none, or it is damaged; the message never quotes it.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"the escrow file cannot be read: {exc}", hint="name the copy that you kept") from exc
    except ValueError:
        held = None
    if not isinstance(held, dict) or not isinstance(held.get("stack"), str) or "secrets" not in held:
        raise ConfigError(f"`{path}` is no escrow file of a stack", hint="name the copy that you kept") from None
    if held.get("format") != FORMAT:
        raise ConfigError(f"`{path}` was written by another version of Memharbor", hint="use that version")
    settings = {str(name): str(value) for name, value in dict(held.get("settings") or {}).items()}
    key = held.get("offsite_key")
    offsite_key = (str(key[0]), str(key[1])) if isinstance(key, list) and len(key) == 2 else None
    return Escrow(held["stack"], settings, parse_secrets(json.dumps(held["secrets"])), offsite_key)


def write_escrow(escrow: Escrow) -> bool:
    """
    Write a stack's escrow file where it differs, for its owner's eyes only.

    Returns:
        Whether copies kept elsewhere do not serve any more, or there was none yet.
    """
    path = escrow_path(escrow.stack)
    text = escrow.render()
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    try:
        serves = read_escrow(path).serves(escrow)
    except ConfigError:
        serves = False
    path.parent.mkdir(parents=True, exist_ok=True)
    incoming = path.with_name(f".{path.name}.{os.getpid()}")
    incoming.unlink(missing_ok=True)
    with os.fdopen(os.open(incoming, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    incoming.replace(path)
    return not serves


def merge_settings(escrow: Escrow, stack: str, wanted: Mapping[str, str]) -> dict[str, str]:
    """
    Put the settings of a new stack together from an escrow file and the environment, which wins.

    Raises:
        ConfigError: The file is another stack's, or the environment asks for what the backups cannot fill.
    """
    if escrow.stack != stack:
        raise ConfigError(
            f"the escrow file is of stack `{escrow.stack}`, under whose name the store keeps the backups, not `{stack}`",
            hint=f"pass `--stack {escrow.stack}`",
        )
    other = [name for name in _FIXED_SETTINGS if name in wanted and wanted[name] != escrow.settings.get(name)]
    if other:
        raise ConfigError(
            f"{', '.join(other)}: the environment differs from the stack whose backups are to be restored",
            hint=f"unset {' and '.join(f'MEMHARBOR_{name.upper()}' for name in other)}",
        )
    return {**escrow.settings, **wanted}
