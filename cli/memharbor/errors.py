"""
Every error that Memharbor raises on purpose, with its exit code and its hints.

One class per decision a caller can make. The command line converts them once (`memharbor.commands`); nothing else prints
or exits. Exit codes are never reused; `docs/reference/exit-codes.md` is generated from this module.
"""

from __future__ import annotations

from collections.abc import Sequence


class MemharborError(Exception):
    """
    Fail for a reason that the user can act on.

    Args:
        message: One lower-case sentence without a final stop; values in backticks, server text verbatim.
        hint: At most two commands or steps that come next.
    """

    exit_code = 1
    meaning = "a bug in Memharbor, or a prompt that was aborted"

    def __init__(self, message: str, *, hint: str | Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hints: tuple[str, ...] = (hint,) if isinstance(hint, str) else tuple(hint)
        if len(self.hints) > 2:
            raise ValueError("an error carries at most two hints")


class UsageError(MemharborError):
    """The command line itself is wrong."""

    exit_code = 2
    meaning = "the command line is wrong"


class ConfigError(MemharborError):
    """A setting is missing or wrong, or a stack does not exist."""

    exit_code = 3
    meaning = "a setting is missing or wrong, or the stack does not exist"


class ConnectError(MemharborError):
    """A server could not be reached or refused the login; a retry may help."""

    exit_code = 4
    meaning = "a server could not be reached (a retry may help)"


class DatabaseError(MemharborError):
    """PostgreSQL refused a statement."""

    exit_code = 5
    meaning = "PostgreSQL refused a statement"


class ExternalToolError(MemharborError):
    """A tool that Memharbor calls (pgBackRest, Pulumi, Docker) failed."""

    exit_code = 6
    meaning = "a tool that Memharbor calls failed"


class SourceDataError(MemharborError):
    """Data that is to be read is damaged or has an unknown shape."""

    exit_code = 7
    meaning = "data to be read is damaged or of an unknown shape"


class EmbeddingError(MemharborError):
    """An embedding endpoint failed or answered with the wrong shape; a retry may help."""

    exit_code = 8
    meaning = "an embedding endpoint failed (a retry may help)"


class StateRefusedError(MemharborError):
    """What was asked is not allowed in the present state; nothing was changed."""

    exit_code = 9
    meaning = "refused in the present state, nothing was changed"


class VerificationError(MemharborError):
    """Something was checked and differs from what it should be."""

    exit_code = 10
    meaning = "a verification found a difference"


class ChangesPendingError(MemharborError):
    """A dry run with `--exit-code` found changes to make."""

    exit_code = 11
    meaning = "changes are pending (`--exit-code`)"


INTERRUPTED_EXIT_CODE = 130


def exit_codes() -> dict[int, str]:
    """
    List every documented exit code with its meaning, in ascending order.

    >>> exit_codes()[3]
    'a setting is missing or wrong, or the stack does not exist'
    """
    codes = {0: "success", INTERRUPTED_EXIT_CODE: "interrupted (Ctrl-C)"}
    kinds: list[type[MemharborError]] = [MemharborError, *MemharborError.__subclasses__()]
    for kind in kinds:
        codes[kind.exit_code] = kind.meaning
    return dict(sorted(codes.items()))
