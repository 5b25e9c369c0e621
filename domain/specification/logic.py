"""What can be proved about specifications: simpler forms, and which one implies which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias, cast

from leftfold.domain.specification.tree import (
    ALWAYS,
    NEVER,
    ORDERINGS,
    TEXTUAL,
    All,
    AnyOf,
    Attribute,
    Compare,
    Not,
    Specification,
    expand,
)
from leftfold.domain.specification.values import are_alike, kind_of

Node: TypeAlias = Specification[Any]

MAX_STEPS = 20_000
"""Steps after which a proof is given up: it is then not proved."""

INVERSE = {"==": "!=", "!=": "=="}
MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}


def simplify(specification: Node) -> Node:
    """Return a specification of the same meaning: negation at the leaves, nothing redundant."""
    return _simplify(specification, negated=False)


def _simplify(specification: Node, *, negated: bool) -> Node:
    match expand(specification):
        case All(parts):
            simple = [_simplify(part, negated=negated) for part in parts]
            return _any(simple) if negated else _all(simple)
        case AnyOf(parts):
            simple = [_simplify(part, negated=negated) for part in parts]
            return _all(simple) if negated else _any(simple)
        case Not(part):
            return _simplify(part, negated=not negated)
        case Compare() as leaf:
            return _simple_leaf(leaf, negated=negated)
        case opaque:
            return Not(opaque) if negated else opaque


def _simple_leaf(leaf: Compare, *, negated: bool) -> Node:
    if leaf.right is None and leaf.sign in ORDERINGS:
        return ALWAYS if negated else NEVER
    if leaf.sign == "in":
        values = cast("tuple[Any, ...]", leaf.right)  # what `is_in` keeps
        if not values:
            return ALWAYS if negated else NEVER
        if len(values) == 1:
            leaf = Compare(leaf.left, "==", values[0])
    if negated and leaf.sign in INVERSE:
        return Compare(leaf.left, INVERSE[leaf.sign], leaf.right)
    return Not(leaf) if negated else leaf


def _all(parts: Iterable[Node]) -> Node:
    flat = _flat(parts, All)
    if NEVER in flat or any(_excludes(p, q) for p, q in _pairs(flat)) or _is_empty(flat):
        return NEVER
    kept = _without_redundant(flat, lambda part, other: _implies_leaf(other, part))
    kept = [p for p in kept if not (isinstance(p, AnyOf) and any(q in p.parts for q in kept))]
    return kept[0] if len(kept) == 1 else All(tuple(kept))


def _any(parts: Iterable[Node]) -> Node:
    flat = _flat(parts, AnyOf)
    if ALWAYS in flat or any(_covers(p, q) for p, q in _pairs(flat)):
        return ALWAYS
    kept = _without_redundant(flat, _implies_leaf)
    kept = [p for p in kept if not (isinstance(p, All) and any(q in p.parts for q in kept))]
    return kept[0] if len(kept) == 1 else AnyOf(tuple(kept))


def _flat(parts: Iterable[Node], kind: type[All[Any] | AnyOf[Any]]) -> list[Node]:
    """Return the parts of parts of one kind, each once."""
    flat: dict[Node, None] = {}
    for part in parts:
        for inner in part.parts if isinstance(part, kind) else (part,):
            flat[inner] = None
    return list(flat)


def _pairs(parts: list[Node]) -> Iterable[tuple[Node, Node]]:
    by_path = _by_path(parts)
    for group in by_path.values():
        for number, part in enumerate(group):
            for other in group[number + 1 :]:
                yield part, other


def _by_path(parts: Iterable[Node]) -> dict[str, list[Node]]:
    groups: dict[str, list[Node]] = {}
    for part in parts:
        leaf = part.part if isinstance(part, Not) else part
        if isinstance(leaf, Compare):
            groups.setdefault(leaf.left.path, []).append(part)
    return groups


def _without_redundant(parts: list[Node], is_redundant: Any) -> list[Node]:
    """Leave out parts that another part makes needless; of two equal ones keep the first."""
    kept = list(parts)
    for group in _by_path(parts).values():
        for part in group:
            others = [other for other in group if other is not part and other in kept]
            if any(is_redundant(part, other) for other in others):
                kept.remove(part)
    return kept


def implies(first: Node, second: Node) -> bool:
    """Tell whether it is proved that whatever satisfies the first satisfies the second."""
    steps = [MAX_STEPS]

    def prove(a: Node, b: Node) -> bool:
        steps[0] -= 1
        if steps[0] < 0:
            return False
        if a in (b, NEVER) or b == ALWAYS:
            return True
        if isinstance(a, AnyOf):
            return all(prove(part, b) for part in a.parts)
        if isinstance(b, All):
            return all(prove(a, part) for part in b.parts)
        if isinstance(b, AnyOf) and any(prove(a, part) for part in b.parts):
            return True
        if isinstance(a, All):
            return any(prove(part, b) for part in a.parts) or _together(a, b)
        return _implies_leaf(a, b)

    return prove(simplify(first), simplify(second))


def _together(a: All[Any], b: Node) -> bool:
    """Tell whether what the parts say of one attribute together proves a leaf."""
    there = _leaf_set(b)
    if there is None:
        return False
    path, wanted = there
    known = [found[1] for part in a.parts if (found := _leaf_set(part)) and found[0] == path]
    return bool(known) and reduce(_both, known).is_within(wanted)


# Leaves as sets of values ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Bound:
    """One end of an interval. `side` is -1 just below the value, 1 just above it."""

    value: Any  # values of one kind, which have an order
    side: int

    def __lt__(self, other: _Bound) -> bool:
        if self.value == other.value:
            return self.side < other.side
        return bool(self.value < other.value)


Interval: TypeAlias = tuple[_Bound | None, _Bound | None]
"""From a bound to a bound, neither of which is in it; `None` is without end."""


@dataclass(frozen=True)
class _Values:
    """Values of one kind that an attribute may have: intervals in order, and perhaps none."""

    kind: str | None
    intervals: tuple[Interval, ...]
    with_none: bool

    def is_within(self, other: _Values) -> bool:
        if self.with_none and not other.with_none:
            return False
        if not self.intervals:
            return True
        if not _comparable(self, other):
            return False
        return all(any(_inside(i, o) for o in other.intervals) for i in self.intervals)

    @property
    def is_empty(self) -> bool:
        return not self.intervals and not self.with_none


def _comparable(a: _Values, b: _Values) -> bool:
    return a.kind is None or b.kind is None or are_alike(a.kind, b.kind)


def _inside(inner: Interval, outer: Interval) -> bool:
    low, high = inner
    is_low = outer[0] is None or (low is not None and not low < outer[0])
    is_high = outer[1] is None or (high is not None and not outer[1] < high)
    return is_low and is_high


def _both(a: _Values, b: _Values) -> _Values:
    """Return what is in both."""
    found: list[Interval] = []
    for a_low, a_high in a.intervals:
        for b_low, b_high in b.intervals:
            low = b_low if a_low is None or (b_low is not None and a_low < b_low) else a_low
            high = b_high if a_high is None or (b_high is not None and b_high < a_high) else a_high
            if low is None or high is None or low < high:
                found.append((low, high))
    return _Values(a.kind or b.kind, tuple(found), a.with_none and b.with_none)


EVERYTHING: tuple[Interval, ...] = ((None, None),)


def _leaf_set(part: Node) -> tuple[str, _Values] | None:
    """Return the attribute and its values that satisfy a leaf; None if that is no set of values."""
    negated = isinstance(part, Not)
    leaf = part.part if isinstance(part, Not) else part
    if not isinstance(leaf, Compare) or isinstance(leaf.right, Attribute):
        return None
    path, right = leaf.left.path, leaf.right
    if right is None:
        is_none = (leaf.sign == "==") is not negated
        return path, _Values(None, () if is_none else EVERYTHING, is_none)
    intervals: tuple[Interval, ...]
    if isinstance(right, tuple):
        kinds = {kind_of(value) for value in right}
        if len(kinds) != 1:
            return None
        kind = kinds.pop()
        intervals = tuple(_point(value) for value in sorted(right))
        with_none = False
    else:
        kind = kind_of(right)
        below, above = _point(right)
        table: dict[str, tuple[Interval, ...]] = {
            "==": ((below, above),),
            "!=": ((None, below), (above, None)),
            "<": ((None, below),),
            "<=": ((None, above),),
            ">": ((above, None),),
            ">=": ((below, None),),
        }
        if leaf.sign not in table:
            return None
        intervals = table[leaf.sign]
        with_none = leaf.sign == "!="
    if negated:
        intervals, with_none = _outside(intervals), not with_none
    return path, _Values(kind, intervals, with_none)


def _point(value: Any) -> tuple[_Bound, _Bound]:
    return _Bound(value, -1), _Bound(value, 1)


def _outside(intervals: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """Return what is in none of the intervals, which are in order."""
    found: list[Interval] = []
    low: _Bound | None = None
    is_open = True
    for begin, end in intervals:
        if begin is not None and (low is None or low < begin):
            found.append((low, begin))
        low, is_open = end, end is not None
    if is_open:
        found.append((low, None))
    return tuple(found)


def _is_empty(parts: list[Node]) -> bool:
    """Tell whether no value of some attribute satisfies all the parts that look at it."""
    for group in _by_path(parts).values():
        sets = [found[1] for part in group if (found := _leaf_set(part)) is not None]
        if any(not _comparable(a, b) for a in sets for b in sets):
            continue
        if sets and reduce(_both, sets).is_empty:
            return True
    return False


def _implies_leaf(a: Node, b: Node) -> bool:
    """Tell whether one leaf proves another."""
    if a == b:
        return True
    first, second = _leaf_set(a), _leaf_set(b)
    if first and second:
        return first[0] == second[0] and first[1].is_within(second[1])
    if isinstance(a, Compare) and isinstance(b, Compare):
        return _implies_text(a, b) or _implies_attributes(a, b) or _implies_present(a, b)
    return False


def _implies_text(a: Compare, b: Compare) -> bool:
    if a.left.path != b.left.path or b.sign not in TEXTUAL or not isinstance(b.right, str):
        return False
    if a.sign in {"==", "in"}:
        values = a.right if isinstance(a.right, tuple) else (a.right,)
        return all(isinstance(v, str) and TEXTUAL[b.sign](v, b.right) for v in values)
    if a.sign not in TEXTUAL or not isinstance(a.right, str):
        return False
    return b.sign in {a.sign, "contains"} and TEXTUAL[b.sign](a.right, b.right)


def _implies_present(a: Compare, b: Compare) -> bool:
    """Tell whether a leaf that `None` never satisfies proves that there is a value."""
    if b.sign != "!=" or b.right is not None:
        return False
    if a.sign in TEXTUAL:
        return a.left.path == b.left.path
    if isinstance(a.right, Attribute) and a.sign in ORDERINGS:
        return b.left.path in {a.left.path, a.right.path}
    return False


def _implies_attributes(a: Compare, b: Compare) -> bool:
    if not isinstance(a.right, Attribute) or not isinstance(b.right, Attribute):
        return False
    sign = a.sign
    if (a.left.path, a.right.path) == (b.right.path, b.left.path):
        sign = MIRRORED[sign]
    elif (a.left.path, a.right.path) != (b.left.path, b.right.path):
        return False
    weaker = {"<": {"<", "<=", "!="}, ">": {">", ">=", "!="}}
    return b.sign in weaker.get(sign, {sign})


def _negation(part: Node) -> Node:
    return _simplify(part, negated=True)


def _excludes(a: Node, b: Node) -> bool:
    return _implies_leaf(a, _negation(b)) or _implies_leaf(b, _negation(a))


def _covers(a: Node, b: Node) -> bool:
    return _implies_leaf(_negation(a), b) or _implies_leaf(_negation(b), a)
