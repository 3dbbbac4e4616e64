"""
Make `.venv`: the locked packages, and the project itself as the checkout has it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

from toolchain.report import EXIT_CONFIG, ToolchainError
from toolchain.steps import Context, Finding


def find_base_python() -> Path:
    """
    Return the interpreter that the environment is made from, also when this runs inside that environment.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (Path(sys.base_prefix) / "bin" / version, Path(sys.base_prefix) / "bin" / "python3"):
        if candidate.exists():
            return candidate
    return Path(sys.executable)


def hash_file(path: Path, *ingredients: str) -> str:
    """
    Return a hash over a file's content and more text; a file that is not there counts as empty.
    """
    digest = hashlib.sha256(path.read_bytes() if path.exists() else b"")
    digest.update("\0".join(ingredients).encode())
    return digest.hexdigest()


class EnvironmentStep:
    """
    The virtual environment with the locked packages.
    """

    name = "python packages"

    def __init__(self, context: Context) -> None:
        self._context = context
        self.folder = context.checkout / ".venv"
        self.python = self.folder / "bin" / "python"
        self.stamp = Stamp(self.folder / "memharbor-stamp.json")
        self._lock = context.checkout / "requirements.lock"

    def _wanted(self) -> dict[str, str]:
        # An environment holds absolute paths: a checkout that was moved or copied needs a new one.
        base = f"{_python_version()} {find_base_python()} {self.folder}"
        return {"base": base, "requirements": hash_file(self._lock, base)}

    def _has_python(self) -> bool:
        # A link whose interpreter was removed, or lies where this user may not look, is as good as none.
        return os.access(self.python, os.X_OK)

    def inspect(self) -> Finding:
        """Look, quickly, and change nothing."""
        stamp, wanted = self.stamp.read() if self._has_python() else {}, self._wanted()
        if wanted.items() <= stamp.items():
            reason = f"requirements.lock, sha256 {hash_file(self._lock)[:12]}"
            return Finding(self.name, True, _python_version(), "package index", reason, str(self.folder))
        is_ours = stamp.get("base") == wanted["base"]
        reason = "`requirements.lock` was changed" if is_ours else "no environment for this folder and interpreter"
        return Finding(self.name, False, _python_version(), "missing", reason, str(self.folder))

    def plan(self) -> str:
        """Say what `provide` would do."""
        return "make `.venv` where it is missing and install the packages of `requirements.lock`"

    def check_possible(self) -> None:
        """Refuse, before anything is changed, what is sure to fail."""
        if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise ToolchainError(
                f"cannot make a virtual environment: `{sys.executable}` has no `venv` module; nothing was changed",
                hints=[f"as root: `apt-get install python3-venv` (or `python{version}-venv`)"],
                exit_code=EXIT_CONFIG,
            )

    def provide(self) -> None:
        """Bring it about."""
        wanted, log, run = self._wanted(), self._context.cache.log("python-packages"), self._context.machine.run
        if self.stamp.read().get("base") != wanted["base"] or not self._has_python():
            shutil.rmtree(self.folder, ignore_errors=True)
            command = [str(find_base_python()), "-m", "venv", str(self.folder)]
            run(command, purpose="make the virtual environment `.venv`", log=log)
        # From here on an interrupted set-up must not look like a finished one.
        self.stamp.write({"base": wanted["base"]})
        self._context.reporter.working("installing the locked Python packages")
        run(
            [*describe_pip(self.python), "--require-hashes", "--requirement", str(self._lock)],
            purpose="install the packages of `requirements.lock` from the package index",
            log=log,
            hints=["see `pip config list`: the index has to be reachable"],
        )
        self.stamp.write(wanted)


class ProjectStep:
    """
    The project itself, installed so that the checkout is what runs.
    """

    name = "memharbor"

    def __init__(self, context: Context, environment: EnvironmentStep) -> None:
        self._context = context
        self._environment = environment
        self._project = context.checkout / "pyproject.toml"
        self._program = environment.folder / "bin" / "memharbor"

    def _wanted(self) -> str:
        return hash_file(self._project)

    def inspect(self) -> Finding:
        """Look, quickly, and change nothing."""
        wanted = self._wanted()
        if self._environment.stamp.read().get("project") == wanted and self._program.exists():
            reason = f"pyproject.toml, sha256 {wanted[:12]}"
            return Finding(self.name, True, "", "this checkout", reason, str(self._program))
        return Finding(self.name, False, "", "missing", "not installed in `.venv`", str(self._program))

    def plan(self) -> str:
        """Say what `provide` would do."""
        return "install this checkout into `.venv`, editable"

    def check_possible(self) -> None:
        """Refuse, before anything is changed, what is sure to fail."""
        return

    def provide(self) -> None:
        """Bring it about."""
        command = describe_pip(self._environment.python)
        checkout = str(self._context.checkout)
        self._context.machine.run(
            [*command, "--no-deps", "--no-build-isolation", "--no-index", "--editable", checkout],
            purpose="install `memharbor` itself into `.venv`",
            log=self._context.cache.log("python-packages"),
        )
        self._environment.stamp.write({**self._environment.stamp.read(), "project": self._wanted()})


class Stamp:
    """
    What an environment was made from, kept inside it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, str]:
        """Return the recorded hashes, empty where there are none."""
        try:
            stamp: dict[str, str] = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stamp

    def write(self, stamp: dict[str, str]) -> None:
        """Record what is installed now."""
        self._path.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def describe_pip(python: Path) -> list[str]:
    """
    Return the beginning of every `pip install`: no questions, no look for a newer pip.
    """
    return [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]


def _python_version() -> str:
    return ".".join(str(part) for part in sys.version_info[:3])
