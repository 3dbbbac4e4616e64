"""
The Pulumi command line, with the environment that the project's `activate` sets.

Must not decide anything about a stack; `memharbor.stack` and `memharbor.stack.init` do. Secrets go to Pulumi by stdin
and come back on stdout, never as arguments.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memharbor.errors import ConfigError, ExternalToolError
from memharbor.process import run


def find_checkout() -> Path:
    """
    Find the folder with Pulumi.yaml: above the working directory, or above this package.

    Raises:
        ConfigError: There is none; a stack can only be handled from a checkout.
    """
    places = [Path.cwd(), *Path.cwd().parents, *Path(__file__).resolve().parents]
    for folder in places:
        if (folder / "Pulumi.yaml").is_file() and (folder / "infra").is_dir():
            return folder
    raise ConfigError(
        "a stack is handled from Memharbor's checkout, and this is none",
        hint="run it there, or set MEMHARBOR_DSN to work with a database that Pulumi did not make",
    )


def private_folder() -> Path:
    """Name the folder of what a checkout keeps to itself: Pulumi's state, the passphrase, the CA certificates."""
    return find_checkout() / ".memharbor"


def activated(environ: Mapping[str, str], checkout: Path, binaries: Path) -> dict[str, str]:
    """
    Complete an environment as `source .venv/bin/activate` does; what is set already wins.

    Args:
        environ: The environment so far.
        checkout: Where Pulumi.yaml lies.
        binaries: Folder of this Python, where the project's tools lie beside it.

    >>> activated({"PATH": "/bin"}, Path("/co"), Path("/co/.venv/bin"))["PULUMI_BACKEND_URL"]
    'file:///co/.memharbor/state'
    """
    path = environ.get("PATH", os.defpath)
    completed = {**environ, "PULUMI_SKIP_UPDATE_CHECK": "true"}
    if str(binaries) not in path.split(os.pathsep):
        completed["PATH"] = f"{binaries}{os.pathsep}{path}"
    completed.setdefault("PULUMI_BACKEND_URL", f"file://{checkout}/.memharbor/state")
    if "PULUMI_CONFIG_PASSPHRASE" not in environ:
        completed.setdefault("PULUMI_CONFIG_PASSPHRASE_FILE", f"{checkout}/.memharbor/passphrase")
    return completed


def pulumi(arguments: Sequence[str], *, input_text: str | None = None) -> str:
    """
    Run Pulumi in the checkout and return what it prints.

    Args:
        arguments: What stands after `pulumi`, without secrets.
        input_text: What it reads from standard input.

    Raises:
        ExternalToolError: It is missing or failed; its own words are in the message.
    """
    checkout = find_checkout()
    environ = activated(os.environ, checkout, Path(sys.executable).parent)
    tool = shutil.which("pulumi", path=environ["PATH"]) or "pulumi"
    try:
        return run([tool, "--non-interactive", *arguments], cwd=checkout, environ=environ, input_text=input_text)
    except ExternalToolError as exc:
        raise ExternalToolError(exc.message, hint=exc.hints or _next_steps(exc.message, environ)) from exc


def _next_steps(message: str, environ: Mapping[str, str]) -> Sequence[str]:
    """Say what to do about the refusals that have nothing to do with the stack itself."""
    if "passphrase" in message.lower():
        return (
            "unset PULUMI_CONFIG_PASSPHRASE and PULUMI_CONFIG_PASSPHRASE_FILE, then `source .venv/bin/activate`",
            "restore the file with the passphrase from its backup: nothing else decrypts the stack's secrets",
        )
    if "unable to open state directory" in message:
        return (
            f"run `make setup`, which creates the state folder; PULUMI_BACKEND_URL is {environ['PULUMI_BACKEND_URL']}",
            "unset PULUMI_BACKEND_URL, then `source .venv/bin/activate`",
        )
    return ()


def set_secret(stack: str, key: str, value: str) -> None:
    """
    Write a secret into a stack's config; Pulumi reads it from stdin and encrypts it.

    Raises:
        ExternalToolError: Pulumi refused; its own words are in the message.
    """
    pulumi(["config", "set", "--secret", "--stack", stack, key], input_text=value)


def list_stacks() -> list[str]:
    """List the stacks of this project in the present backend."""
    return [str(entry["name"]).rsplit("/", 1)[-1] for entry in json.loads(pulumi(["stack", "ls", "--json"]))]


def create_stack(stack: str) -> None:
    """
    Create an empty stack in the present backend, and select it, so that `pulumi up` as typed means it.

    Where PULUMI_STACK says which one is meant, the checkout's selection is left alone.
    """
    pulumi(["stack", "init", "--stack", stack, *(["--no-select"] if os.environ.get("PULUMI_STACK") else [])])


def read_config(stack: str) -> dict[str, str]:
    """Read a stack's config, secrets decrypted, by full key."""
    entries = json.loads(pulumi(["config", "--json", "--show-secrets", "--stack", stack]))
    return {key: str(entry.get("value", "")) for key, entry in entries.items()}


def set_plain(stack: str, values: Mapping[str, str]) -> None:
    """Write plain values into a stack's config, by full key; never secrets, since these are arguments."""
    pairs = [part for key, value in values.items() for part in ("--plaintext", f"{key}={value}")]
    pulumi(["config", "set-all", "--stack", stack, *pairs])


def read_stack_outputs(stack: str) -> dict[str, Any]:
    """Read a stack's outputs, secrets in clear; empty before the first `pulumi up`."""
    outputs: dict[str, Any] = json.loads(pulumi(["stack", "output", "--json", "--show-secrets", "--stack", stack]))
    return outputs


def up(stack: str) -> None:
    """Bring a stack's config into force, without asking."""
    pulumi(["up", "--yes", "--skip-preview", "--stack", stack])


def unprotect(stack: str) -> None:
    """Allow all resources of a stack to be deleted; data volumes are still only forgotten, not deleted."""
    pulumi(["state", "unprotect", "--all", "--yes", "--stack", stack])


def destroy(stack: str) -> None:
    """Delete the resources of a stack that are not protected."""
    pulumi(["destroy", "--yes", "--skip-preview", "--stack", stack])


def remove_stack(stack: str) -> None:
    """Delete a stack's state and its config, secrets included."""
    pulumi(["stack", "rm", "--yes", stack])
