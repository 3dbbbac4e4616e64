"""Run the checks one after another; what breaks is a result, and the clean-up comes last whatever happened."""

from __future__ import annotations

import time
from collections.abc import Callable

import psycopg

from memharbor.database import is_connection_lost
from memharbor.errors import ConnectError, MemharborError
from memharbor.validation.checks import CHECKS, check_count
from memharbor.validation.probe import Probe, remove_probes
from memharbor.validation.results import CheckError, CheckResult, NotApplicableError, State, ValidationContext

_CONNECT_HINT = "memharbor doctor"


def run_checks(
    context: ValidationContext, *, on_result: Callable[[CheckResult], None] | None = None
) -> list[CheckResult]:
    """
    Run every check, then remove what they wrote.

    A server that does not answer is told once: the checks after that are not run.

    Args:
        context: What is validated.
        on_result: Told of each result as it comes.

    Returns:
        One result per check in the order of `CHECKS`, and one for the clean-up.
    """
    results: list[CheckResult] = []
    lost_in = ""

    def run(name: str, check: Callable[[Probe], str]) -> None:
        nonlocal lost_in
        result, is_lost = _try_check(name, check, probe)
        if is_lost and lost_in:
            result = not_run(name, lost_in)
        elif is_lost:
            lost_in = name
        add(result)

    def add(result: CheckResult) -> None:
        results.append(result)
        if on_result is not None:
            on_result(result)

    with Probe(context) as probe:
        try:
            # First: the others write memories of their own.
            counted = (("memory count", check_count),) if context.expected_count is not None else ()
            for name, check in (*counted, *CHECKS):
                if lost_in:
                    add(not_run(name, lost_in))
                else:
                    run(name, check)
        finally:
            # Also where a server was lost: it may be back, and this run may have written something.
            run("clean-up", remove_probes)
    return results


def not_run(name: str, lost_in: str) -> CheckResult:
    """Say that a check was not tried because an earlier one could not connect."""
    return CheckResult(name, "not run", f"`{lost_in}` could not connect", "", 0.0)


def run_check(name: str, check: Callable[[Probe], str], probe: Probe) -> CheckResult:
    """Make one check; whatever it raises is its result."""
    return _try_check(name, check, probe)[0]


def _try_check(name: str, check: Callable[[Probe], str], probe: Probe) -> tuple[CheckResult, bool]:
    """Make one check; returns its result, and whether a server did not answer."""
    begun_at = time.monotonic()
    state: State = "failed"
    hint, is_lost = "", False
    try:
        detail = check(probe)
        state = "ok"
    except NotApplicableError as exc:
        state, detail = "not applicable", str(exc)
    except CheckError as exc:
        detail, hint = str(exc), exc.hint
    except ConnectError as exc:
        detail, hint, is_lost = exc.message, "; ".join(exc.hints) or _CONNECT_HINT, True
    except MemharborError as exc:
        detail, hint = exc.message, "; ".join(exc.hints)
    except psycopg.Error as exc:
        is_lost = is_connection_lost(exc)
        detail, hint = _said(exc), _CONNECT_HINT if is_lost else ""
    except Exception as exc:  # noqa: BLE001 - whatever breaks in Mem0 or the driver is what the check is there to find
        detail = _said(exc)
    return CheckResult(name, state, detail, hint, time.monotonic() - begun_at), is_lost


def _said(exc: Exception) -> str:
    return f"{type(exc).__name__}: {str(exc).strip()}"
