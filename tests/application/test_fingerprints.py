"""What tells whether code has changed."""

from __future__ import annotations

from types import FunctionType, ModuleType

import pytest

from leftfold.application.fingerprints import code_of, digest

CODE = """
from dataclasses import replace

def fold(row, n):
    return replace(row, n=half(n))

def half(n):
    return whole(n) // {divisor}

def whole(n):
    return fold(n - 1) if n < {least} else n
"""


def fingerprint(**facts):
    module = ModuleType("views")
    exec(CODE.format(**facts), vars(module))
    assert isinstance(module.fold, FunctionType)
    return digest(code_of(module.fold))


def test_code_that_is_the_same_has_the_same():
    assert fingerprint(divisor=2, least=0) == fingerprint(divisor=2, least=0)


@pytest.mark.parametrize("facts", [{"divisor": 3, "least": 0}, {"divisor": 2, "least": 1}])
def test_a_function_of_the_module_that_is_called_on_the_way_is_looked_at(facts):
    assert fingerprint(divisor=2, least=0) != fingerprint(**facts)
