"""Run the checks one after another; what breaks is a result, and the clean-up comes last whatever happened."""

from __future__ import annotations

import time
from collections.abc import Callable

from memharbor.errors import MemharborError
from memharbor.validation.checks import CHECKS
from memharbor.validation.probe import Probe, remove_probes
from memharbor.validation.results import CheckError, CheckResult, NotApplicableError, State, ValidationContext


def run_checks(
    context: ValidationContext, *, on_result: Callable[[CheckResult], None] | None = None
) -> list[CheckResult]:
    """
    Run every check, then remove what they wrote.

    Args:
        context: What is validated.
        on_result: Told of each result as it comes.

    Returns:
        One result per check in the order of `CHECKS`, and one for the clean-up.
    """
    results: list[CheckResult] = []

    def run(name: str, check: Callable[[Probe], str]) -> None:
        results.append(run_check(name, check, probe))
        if on_result is not None:
            on_result(results[-1])

    with Probe(context) as probe:
        try:
            for name, check in CHECKS:
                run(name, check)
        finally:
            run("clean-up", remove_probes)
    return results


def run_check(name: str, check: Callable[[Probe], str], probe: Probe) -> CheckResult:
    """Make one check; whatever it raises is its result."""
    begun_at = time.monotonic()
    state: State = "failed"
    hint = ""
    try:
        detail = check(probe)
        state = "ok"
    except NotApplicableError as exc:
        state, detail = "not applicable", str(exc)
    except CheckError as exc:
        detail, hint = str(exc), exc.hint
    except MemharborError as exc:
        detail, hint = exc.message, "; ".join(exc.hints)
    except Exception as exc:  # noqa: BLE001 - whatever breaks in Mem0 or the driver is what the check is there to find
        detail = f"{type(exc).__name__}: {str(exc).strip()}"
    return CheckResult(name, state, detail, hint, time.monotonic() - begun_at)
