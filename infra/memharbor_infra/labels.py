"""
Labels of everything that a stack owns on an engine; `doctor` and the clean-up find resources by them.
"""

from __future__ import annotations


def labels(stack: str, service: str) -> dict[str, str]:
    """
    Name the labels of one resource.

    >>> labels("dev", "postgres")
    {'memharbor.service': 'postgres', 'memharbor.stack': 'dev'}
    """
    return {"memharbor.service": service, "memharbor.stack": stack}
