"""
Make `source .venv/bin/activate` all that a shell needs: exports, programs, the stacks' state folder and passphrase.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.environment import EnvironmentStep
from toolchain.steps import Context, Finding

_BEGIN, _END = "# >>> memharbor >>>", "# <<< memharbor <<<"
_BLOCK = re.compile(rf"\n*^[ ]*{re.escape(_BEGIN)}$.*?^[ ]*{re.escape(_END)}$\n?", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Variable:
    """
    One variable of an activated shell.

    Args:
        unless: Left alone where the user has set any of these.
    """

    name: str
    value: str
    unless: tuple[str, ...] = ()


def describe_variables(checkout: Path, pulumi_home: Path | None) -> list[Variable]:
    """
    Return what activation exports; `pulumi_home` is None where the user's Pulumi is used with its plugins.
    """
    passphrase = ("PULUMI_CONFIG_PASSPHRASE", "PULUMI_CONFIG_PASSPHRASE_FILE")
    backend = f"file://{checkout}/.memharbor/state"
    variables = [
        Variable("PULUMI_BACKEND_URL", backend, ("PULUMI_BACKEND_URL",)),
        Variable("PULUMI_CONFIG_PASSPHRASE_FILE", f"{checkout}/.memharbor/passphrase", passphrase),
        Variable("PULUMI_SKIP_UPDATE_CHECK", "true"),
        Variable("PULUMI_AUTOMATION_API_SKIP_VERSION_CHECK", "true"),
        Variable("ANSIBLE_CONFIG", f"{checkout}/ansible/ansible.cfg"),
    ]
    return [*variables, Variable("PULUMI_HOME", str(pulumi_home))] if pulumi_home else variables


def extend_activate(text: str, variables: Sequence[Variable]) -> str:
    """
    Return venv's `activate` with our exports at its end and their undoing inside its `deactivate`.

    Applying it again changes nothing; other variables replace the former ones. It is plain POSIX shell, since `make`
    sources it with dash. What is kept is exported, so that a child shell which activates another checkout puts the user's
    values back first. A variable that was overridden comes back when the shell is deactivated, so that another
    Pulumi project in the same shell does not meet our state.
    """
    clean = _BLOCK.sub("\n", text).rstrip("\n") + "\n"
    undo = [f"    {_BEGIN}"]
    export = ["", _BEGIN]
    for variable in variables:
        kept, value = f"_MEMHARBOR_OLD_{variable.name}", shlex.quote(variable.value)
        is_unset = "".join("${" + name + ":-}" for name in variable.unless)
        begin = f'if [ -z "{is_unset}" ]; then' if variable.unless else "if true; then"
        export += [
            begin,
            f'    export {kept}="${{{variable.name}-}}"',
            f"    export {variable.name}={value}",
            "fi",
        ]
        undo += [
            f'    if [ -n "${{{kept}+set}}" ]; then',
            f'        if [ -n "${{{kept}}}" ]; then',
            f'            export {variable.name}="${{{kept}}}"',
            "        else",
            f"            unset {variable.name}",
            "        fi",
            f"        unset {kept}",
            "    fi",
        ]
    undo.append(f"    {_END}")
    export.append(_END)
    opened = re.sub(r"^deactivate ?\(\) ?\{\n", lambda match: match.group() + "\n".join(undo) + "\n", clean, flags=re.M)
    return opened + "\n".join(export) + "\n"


class ActivationStep:
    """
    What `source .venv/bin/activate` gives a shell: programs, variables, the stack's state folder and passphrase.

    Args:
        context: What every step works with.
        environment: The environment that is activated.
        programs: Tells, once the tools are there, what is linked into the environment.
        pulumi_home: Tells which PULUMI_HOME is exported, None for the user's own.
    """

    name = "activation"

    def __init__(
        self,
        context: Context,
        environment: EnvironmentStep,
        programs: Callable[[], Mapping[str, Path]],
        pulumi_home: Callable[[], Path | None],
    ) -> None:
        self._context = context
        self._bin = environment.folder / "bin"
        self._private = context.checkout / ".memharbor"
        self._programs = programs
        self._pulumi_home = pulumi_home

    def inspect(self) -> Finding:
        """Look, quickly, and change nothing."""
        passphrase = self._private / "passphrase"
        is_present = (
            (self._private / "state").is_dir()
            and passphrase.is_file()
            and self._read_activate() == self._describe_activate()
            and self._read_links() == self._programs()
        )
        reason = "exports and links are in place" if is_present else "exports, links, state or passphrase are not there"
        source = ".venv/bin/activate" if is_present else "missing"
        return Finding(self.name, is_present, "", source, reason, str(self._bin / "activate"))

    def _read_activate(self) -> str:
        path = self._bin / "activate"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def _describe_activate(self) -> str:
        return extend_activate(self._read_activate(), describe_variables(self._context.checkout, self._pulumi_home()))

    def _read_links(self) -> dict[str, Path]:
        """Return the links in the environment that lead into the cache."""
        if not self._bin.is_dir():
            return {}
        links = {path.name: path.readlink() for path in self._bin.iterdir() if path.is_symlink()}
        entries = self._context.cache.entries
        return {name: target for name, target in links.items() if target.is_relative_to(entries)}

    def plan(self) -> str:
        """Say what `provide` would do."""
        return "export variables in `.venv/bin/activate`, link the tools, generate a passphrase where there is none"

    def check_possible(self) -> None:
        """Refuse, before anything is changed, what is sure to fail."""
        return

    def provide(self) -> None:
        """Bring it about."""
        self._private.mkdir(mode=0o700, exist_ok=True)
        (self._private / "state").mkdir(mode=0o700, exist_ok=True)
        create_passphrase(self._private / "passphrase")
        for name in self._read_links():
            (self._bin / name).unlink()
        for name, target in self._programs().items():
            (self._bin / name).unlink(missing_ok=True)
            (self._bin / name).symlink_to(target)
        (self._bin / "activate").write_text(self._describe_activate(), encoding="utf-8")


def create_passphrase(path: Path) -> None:
    """
    Generate the passphrase that encrypts the stacks' secrets, once: a new one would lock everything away.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(secrets.token_urlsafe(32))
