"""The examples in the docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import memharbor

NAMES = [
    module.name
    for module in pkgutil.walk_packages(memharbor.__path__, "memharbor.")
    if module.name != "memharbor.__main__"
]


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_the_module_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in NAMES) > 20
