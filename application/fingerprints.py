"""Fingerprints: what tells whether code has changed, the same in every process."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from types import CodeType, FunctionType
from typing import Any


def sorted_text(types: Mapping[str, Any]) -> str:
    """Return types by their names as text, in one order."""
    return str(sorted((name, _text(each)) for name, each in types.items()))


def code_of(function: Any) -> Iterator[str]:
    """Yield what a function does, without where it is written.

    With the functions of its own module that it names, and not what others do that it calls.
    """
    if not isinstance(function, FunctionType):
        yield _text(function)
        return
    found = [function]
    for each in found:  # which grows
        yield from _code(each)
        yield _text((each.__defaults__, each.__kwdefaults__))
        for cell in each.__closure__ or ():
            yield _text(cell.cell_contents)
        found += (named for named in _named_by(each) if named not in found)


def digest(parts: Iterable[str]) -> str:
    """Return a fingerprint of texts in their order."""
    digesting = sha256()
    for part in parts:
        digesting.update(part.encode() + b"\0")
    return digesting.hexdigest()[:32]


def _named_by(function: FunctionType) -> list[FunctionType]:
    """Return the functions of a function's own module that it names, each once."""
    names = dict.fromkeys(name for code in _codes(function.__code__) for name in code.co_names)
    named = map(function.__globals__.get, names)
    module = function.__module__
    return [n for n in named if isinstance(n, FunctionType) and n.__module__ == module]


def _code(function: FunctionType) -> Iterator[str]:
    for code in _codes(function.__code__):
        yield code.co_code.hex()
        yield _text(code.co_names)
        yield from (_text(c) for c in code.co_consts if not isinstance(c, CodeType))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield code and what is defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _text(value: object) -> str:
    """Return a value as text that is the same in every process: no addresses, no order of sets."""
    if isinstance(value, (frozenset, set)):
        return str(sorted(map(_text, value)))
    if isinstance(value, tuple):
        return str([_text(each) for each in value])
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
