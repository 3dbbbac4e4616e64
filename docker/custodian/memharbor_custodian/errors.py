"""
What the custodian refuses or fails at. Exit codes are those of the `memharbor` command line, which passes them on.
"""

from __future__ import annotations


class CustodianError(Exception):
    """
    Fail for a reason that a person can act on.

    Args:
        message: One lower-case sentence without a final stop.
        hint: The command that comes next.
    """

    exit_code = 6

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class NotConfiguredError(CustodianError):
    """The stack has no off-site copy."""

    exit_code = 3


class UnreachableError(CustodianError):
    """A store does not answer; a retry may help."""

    exit_code = 4


class RefusedError(CustodianError):
    """Doing it could destroy something; nothing was changed."""

    exit_code = 9
