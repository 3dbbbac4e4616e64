"""
What can be wrong, checked one by one: before anything exists as well as after.

Each check looks at one thing and answers with findings; every finding that is not good names its cause and the next
command. A check that breaks is a finding itself. Must not change anything.
"""

from __future__ import annotations

from memharbor.database import redact_dsn
from memharbor.doctor import machine
from memharbor.doctor.database import check_database
from memharbor.doctor.findings import Finding, collect, failure
from memharbor.doctor.services import check_services
from memharbor.errors import MemharborError
from memharbor.stack import StackNotUpError, find_leader
from memharbor.target import find_target


def examine(stack: str, dsn: str | None) -> list[Finding]:
    """
    Look at the machine, and at the stack or database as far as it exists.

    Args:
        stack: Name of the stack.
        dsn: A database that Pulumi did not make; the machine's containers are not looked at then.
    """
    findings: list[Finding] = []
    if dsn is None:
        for area, check in machine.CHECKS:
            findings += collect(area, check, "make setup")
    try:
        target = find_target(stack, dsn)
    except StackNotUpError as exc:
        findings.append(Finding("stack", "warning", exc.message, exc.hints[0]))
        return findings + collect("ports", lambda: machine.check_ports(stack), "memharbor settings show")
    except (MemharborError, OSError) as exc:
        said = exc if isinstance(exc, MemharborError) else MemharborError(f"the stack cannot be read: {exc}")
        findings.append(failure("stack", said, "make setup, then `source .venv/bin/activate`"))
        return findings
    look = f"psql {redact_dsn(target.admin_dsn)}"
    if target.outputs is not None:
        findings += check_services(target, target.outputs)
        look = f"docker logs {find_leader(target.outputs).container}"
    return findings + collect("database", lambda: check_database(target), look)


__all__ = ["Finding", "examine"]
