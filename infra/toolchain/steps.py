"""
What a step of the set-up is: it looks without touching, and it provides what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from toolchain.cache import Cache
from toolchain.machine import Machine
from toolchain.pins import Pins
from toolchain.report import Reporter


@dataclass(frozen=True)
class Context:
    """
    What every step works with.
    """

    checkout: Path
    pins: Pins
    machine: Machine
    cache: Cache
    reporter: Reporter
    host_architecture: str


@dataclass(frozen=True)
class Finding:
    """
    The state of one thing that is wanted; `python3 infra/toolchain status --json` prints these fields.

    Args:
        present: Whether nothing is left to do for it.
        source: Where it came from, or "missing".
        reason: Why that source; where it is missing, what is wrong.
        path: The program, folder or address, empty where there is none yet.
    """

    name: str
    present: bool
    version: str
    source: str
    reason: str
    path: str = ""


class Step(Protocol):
    """
    One part of the set-up.
    """

    name: str

    def inspect(self) -> Finding:
        """Look, quickly, and change nothing."""

    def plan(self) -> str:
        """Say what `provide` would do; may ask the network, changes nothing."""

    def check_possible(self) -> None:
        """Raise ToolchainError, before anything is changed, where `provide` is sure to fail."""

    def provide(self) -> None:
        """Bring it about; called only where `inspect` said that it is not present."""
