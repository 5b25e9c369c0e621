"""Planning: which part of a specification a database can tell, and which views could answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leftfold.application.model import Model
from leftfold.application.projection import Projection
from leftfold.domain import ALWAYS, LeftfoldError, Specification
from leftfold.domain.specification.tree import All, AnyOf, Not, Opaque, expand

MAX_OPERATORS, MAX_DEPTH = 800, 24
"""What is left to a database in one query: SQLite's parser takes 1,000 operators, and overflows
its stack at some forty levels of parentheses."""


@dataclass(frozen=True)
class Plan:
    """A specification in two parts that hold together exactly where the whole does."""

    sql: Specification[Any]
    """The strongest part that a database can tell."""
    rest: Specification[Any]
    """What is left to Python; `ALWAYS` if nothing is."""
    views: tuple[str, ...] = ()
    """The model's views that hold every row in question: it implies their own specification."""

    def __str__(self) -> str:
        views = ", ".join(self.views) or "none"
        return f"in the database: {self.sql}\nin Python: {self.rest}\nfull answers from: {views}"


def plan(specification: Specification[Any], model: Model | None = None) -> Plan:
    """Say how a specification would be answered: wrapped callables are left to Python."""
    told: list[Specification[Any]] = []
    left: list[Specification[Any]] = []
    room = MAX_OPERATORS
    for part in _conjuncts(specification):
        weaker = _without_opaque(part, negated=False)
        operators = _operators(weaker)
        if operators > room or _depth(weaker) > MAX_DEPTH:
            left.append(part)
            continue
        room -= operators
        if weaker != ALWAYS:
            told.append(weaker)
        if _is_opaque(part):
            left.append(part)
    projections = model.projections if model is not None else ()
    views = tuple(p.name for p in projections if can_answer(p, specification))
    return Plan(_all(told), _all(left), views)


def can_answer(projection: Projection[Any], specification: Specification[Any]) -> bool:
    """Tell whether a view has the attributes asked for, and leaves out none of the rows."""
    try:
        bound = specification.bind(projection.row)
    except LeftfoldError:
        return False
    return bound.implies(projection.specification)


def _conjuncts(specification: Specification[Any]) -> list[Specification[Any]]:
    node = expand(specification)
    if isinstance(node, All):
        return [inner for part in node.parts for inner in _conjuncts(part)]
    return [node]


def _all(parts: Sequence[Specification[Any]]) -> Specification[Any]:
    return parts[0] if len(parts) == 1 else All(tuple(parts))


def _is_opaque(specification: Specification[Any]) -> bool:
    match expand(specification):
        case All(parts) | AnyOf(parts):
            return any(map(_is_opaque, parts))
        case Not(part):
            return _is_opaque(part)
        case node:
            return isinstance(node, Opaque)


def _operators(specification: Specification[Any]) -> int:
    """Count the operators of a condition, or some more."""
    match expand(specification):
        case All(parts) | AnyOf(parts):
            return 1 + sum(map(_operators, parts))
        case Not(part):
            return 2 + _operators(part)  # `IS NULL` of one attribute or two
        case _:
            return 1


def _depth(specification: Specification[Any]) -> int:
    match expand(specification):
        case All(parts) | AnyOf(parts):
            return 1 + max(map(_depth, parts), default=0)
        case Not(part):
            return 1 + _depth(part)
        case _:
            return 1


def _without_opaque(specification: Specification[Any], *, negated: bool) -> Specification[Any]:
    """Return the strongest specification without callables that this one implies."""
    node = expand(specification)
    if isinstance(node, Opaque):
        return ALWAYS
    if isinstance(node, Not):
        return _without_opaque(node.part, negated=not negated)
    if isinstance(node, (All, AnyOf)):
        parts = tuple(_without_opaque(part, negated=negated) for part in node.parts)
        if isinstance(node, All) is not negated:
            return All(tuple(part for part in parts if part != ALWAYS))
        return ALWAYS if ALWAYS in parts else AnyOf(parts)
    return Not(node) if negated else node
