"""
What the doctor says, and how a check that breaks becomes a finding itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import psycopg
from docker.errors import DockerException

from memharbor.database import server_text
from memharbor.errors import MemharborError

Level = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `next_command` is empty where it is good."""

    area: str
    level: Level
    cause: str
    next_command: str = ""


Findings = Iterator[Finding]


def collect(area: str, check: Callable[[], Findings], otherwise: str) -> list[Finding]:
    """
    Make one check; what it raises is its last finding.

    Args:
        area: What is looked at.
        check: Answers with findings.
        otherwise: The next command where the error itself names none.
    """
    found: list[Finding] = []
    try:
        for finding in check():
            found.append(finding)
    except MemharborError as exc:
        found.append(failure(area, exc, otherwise))
    except psycopg.Error as exc:
        found.append(Finding(area, "failed", server_text(exc), otherwise))
    except (DockerException, OSError) as exc:  # docker passes on what its HTTP client raises, which is an OSError
        found.append(Finding(area, "failed", f"{type(exc).__name__}: {exc}", otherwise))
    return found


def failure(area: str, exc: MemharborError, otherwise: str) -> Finding:
    """Say an error of ours as a finding."""
    return Finding(area, "failed", exc.message, exc.hints[0] if exc.hints else otherwise)
