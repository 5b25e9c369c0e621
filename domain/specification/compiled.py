"""Specifications as generated Python: constants are bound, and names only plain identifiers."""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping
from datetime import date, datetime
from decimal import Decimal
from typing import Any, TypeAlias
from uuid import UUID

from leftfold.domain.specification.binding import kinds_of
from leftfold.domain.specification.tree import (
    ORDERINGS,
    All,
    AnyOf,
    Attribute,
    Compare,
    Not,
    Opaque,
    Specification,
    expand,
)
from leftfold.domain.specification.values import are_alike, kind_of

Test: TypeAlias = Callable[[Any], bool]

MAX_TYPES = 64
MAX_DEPTH = 40
"""Beyond it the generated expression could be too deep for Python's own parser."""


def compile_for_first(specification: Specification[Any]) -> Test:
    """Return a function that compiles itself for the first candidate's type, and gives way to it.

    Candidates of another type are told apart by their class, and get a function of their own.
    """
    by_type: dict[type, Test] = {}

    def is_satisfied_by(candidate: Any) -> bool:
        candidate_type = candidate.__class__
        test = by_type.get(candidate_type)
        if test is None:
            is_first = not by_type
            if len(by_type) >= MAX_TYPES:
                by_type.clear()
            test = _compile(specification, candidate, is_satisfied_by)
            by_type[candidate_type] = test
            if is_first:
                vars(specification)["is_satisfied_by"] = test
        return test(candidate)

    return is_satisfied_by


def _compile(specification: Specification[Any], candidate: Any, others: Test) -> Test:
    writer = _Writer(type(candidate), is_mapping=isinstance(candidate, Mapping))
    try:
        expression = writer.write(specification, 0)
    except _TooDeepError:
        return specification.check
    source = (
        "def is_satisfied_by(candidate):\n"
        "    if candidate.__class__ is not candidate_type:\n"
        "        return others(candidate)\n"
        "    try:\n"
        f"        return {expression}\n"
        "    except (TypeError, AttributeError, KeyError):\n"
        "        return check(candidate)\n"  # which says what is wrong
    )
    scope: dict[str, Any] = {**writer.names, "others": others, "check": specification.check}
    exec(source, scope)  # noqa: S102 - made of our own words; names and values are bound
    test: Test = scope["is_satisfied_by"]
    return test


TESTS = {
    "contains": "{} in v",
    "starts with": "v.startswith({})",
    "ends with": "v.endswith({})",
    "in": "v in {}",
}
"""How text and lists are tested; the other signs are Python's own."""


ORDERLY = frozenset({bool, int, float, Decimal, str, date, UUID})
"""Types whose values compare with their like and need no look at them first."""


class _TooDeepError(Exception):
    """The tree is deeper than a generated expression may be."""


class _Writer:
    """Writes the expression, and remembers what its names stand for."""

    def __init__(self, candidate_type: type, *, is_mapping: bool) -> None:
        self.names: dict[str, object] = {"candidate_type": candidate_type}
        self._is_mapping = is_mapping
        self._kinds = {} if is_mapping else kinds_of(candidate_type)

    def write(self, specification: Specification[Any], depth: int) -> str:
        if depth > MAX_DEPTH:
            raise _TooDeepError
        match expand(specification):
            case All(()):
                return "True"
            case AnyOf(()):
                return "False"
            case All(parts):
                return f"({' and '.join(self.write(part, depth + 1) for part in parts)})"
            case AnyOf(parts):
                return f"({' or '.join(self.write(part, depth + 1) for part in parts)})"
            case Not(part):
                return f"(not {self.write(part, depth + 1)})"
            case Opaque() as opaque:
                return f"{self._name(opaque.check)}(candidate)"
            case Compare() as leaf:
                return self._leaf(leaf)
        raise TypeError(specification)  # pragma: no cover - those are all nodes

    def _leaf(self, leaf: Compare) -> str:
        left, sign, right = leaf.left, leaf.sign, leaf.right
        if right is None and sign in ORDERINGS:
            return "False"
        if right is None:
            return f"({self._read(left)} {'is' if sign == '==' else 'is not'} None)"
        if isinstance(right, Attribute):
            if not self._is_known(leaf):
                orderly, checked = self._name(ORDERLY), self._name(leaf.test)
                return (
                    f"(v {sign} w if (v := {self._read(left)}).__class__ is "
                    f"(w := {self._read(right)}).__class__ and v.__class__ in {orderly} "
                    f"else {checked}(v, w))"
                )
            if sign in ORDERINGS:
                return (
                    f"((v := {self._read(left)}) is not None and "
                    f"(w := {self._read(right)}) is not None and v {sign} w)"
                )
            return f"({self._read(left)} {sign} {self._read(right)})"
        value = self._name(frozenset(right) if isinstance(right, tuple) else right)
        test = TESTS.get(sign, f"v {sign} {{}}").format(value)
        if not self._is_known(leaf):
            return self._looked_at(leaf, test)
        if sign in {"==", "!=", "in"}:
            return f"({self._read(left)} {sign} {value})"
        return f"((v := {self._read(left)}) is not None and {test})"

    def _looked_at(self, leaf: Compare, test: str) -> str:
        """Write a test that looks at the value's type first; other types take the long way."""
        right = leaf.right
        types = {type(value) for value in (right if isinstance(right, tuple) else (right,))}
        checked = self._name(lambda value: leaf.test(value, right))
        if len(types) != 1 or datetime in types:
            return f"{checked}({self._read(leaf.left)})"
        kind = self._name(types.pop())
        return f"({test} if (v := {self._read(leaf.left)}).__class__ is {kind} else {checked}(v))"

    def _is_known(self, leaf: Compare) -> bool:
        """Tell whether the declared types make a look at the values' types needless.

        Raises `UnlikeTypes` where they can never be compared.
        """
        kind = self._kinds.get(leaf.left.path)
        if kind is None:
            return False
        if isinstance(leaf.right, Attribute):
            return self._kinds.get(leaf.right.path) == kind and kind != "datetime"
        values = leaf.right if isinstance(leaf.right, tuple) else (leaf.right,)
        is_same = all(are_alike(kind, kind_of(value)) for value in values)
        # A time without a zone is unlike, and equal to none without saying so.
        return is_same and kind != "datetime"

    def _read(self, attribute: Attribute) -> str:
        path = attribute.path
        if self._is_mapping and "." not in path:
            return f"candidate[{self._name(path)}]"
        # A word of Python's own is no name in source, and other alphabets are changed there.
        if "." in path or not path.isascii() or keyword.iskeyword(path):
            return f"{self._name(attribute.of)}(candidate)"
        return f"candidate.{path}"

    def _name(self, value: object) -> str:
        name = f"k{len(self.names)}"
        self.names[name] = value
        return name
