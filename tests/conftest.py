"""What all layers share: the option of `make golden`, and that no test calls Mem0's makers."""

from __future__ import annotations

import os

import pytest

# Before anything imports Mem0, which reads it then.
os.environ.setdefault("MEM0_TELEMETRY", "False")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files again; review the diff")
