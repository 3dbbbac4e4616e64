"""What a validation is given and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from memharbor.settings import Settings

State = Literal["ok", "failed", "not applicable", "not run"]


@dataclass(frozen=True)
class BackupStatus:
    """
    How well a stack is backed up.

    Args:
        newest_at: When the newest usable backup ended, aware; `None` where there is no backup yet.
        detail: What there is, for people.
        problem: What is wrong, empty where nothing is.
    """

    newest_at: datetime | None
    detail: str
    problem: str = ""


@dataclass(frozen=True)
class ValidationContext:
    """
    What is validated and how to reach it.

    Args:
        settings: What was rolled out.
        admin_dsn: Straight to the server, as its administrator.
        app_dsn: As applications connect: through the pooler where there is one.
        service_dsn: As Mem0's server connects.
        is_pooled: Whether these lead through a pooler of ours.
        backup_status: Tries the stack's backup store; absent for a database that Pulumi did not make.
        expected_count: How many memories there must be, after a migration; `None` where nobody says.
    """

    settings: Settings
    admin_dsn: str = field(repr=False)
    app_dsn: str = field(repr=False)
    service_dsn: str = field(repr=False)
    is_pooled: bool
    backup_status: Callable[[], BackupStatus] | None = None
    expected_count: int | None = None


@dataclass(frozen=True)
class CheckResult:
    """One check: what was found, and what to do where it failed."""

    name: str
    state: State
    detail: str
    hint: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the check was made and found everything right."""
        return self.state == "ok"


class CheckError(Exception):
    """A check found something wrong: the text says what, the hint what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class NotApplicableError(Exception):
    """A check cannot be made here: the text says why."""


def require(holds: bool, message: str, hint: str = "") -> None:
    """Fail the check where something does not hold."""
    if not holds:
        raise CheckError(message, hint)
