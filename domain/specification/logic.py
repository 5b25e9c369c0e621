"""What can be proved about specifications: simpler forms, and which one implies which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
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

MAX_STEPS = 50_000
"""Values that a proof looks at before it is given up: it is then not proved."""

INVERSE = {"==": "!=", "!=": "=="}
WEAKER = {"<": {"<", "<=", "!="}, ">": {">", ">=", "!="}}
EXCLUDED = {
    "<": {">", ">=", "=="},
    "<=": {">"},
    ">": {"<", "<=", "=="},
    ">=": {"<"},
    "==": {"<", ">"},
}
MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}


def simplify(specification: Node) -> Node:
    """Return a specification of the same meaning: negation at the leaves, nothing redundant.

    Where very many leaves look at one attribute, they are not compared each with each.
    """
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
    if NEVER in flat or _is_contradiction(flat):
        return NEVER
    kept = _without_redundant(flat, lambda part, other: _implies_leaf(other, part))
    known = set(kept)
    kept = [p for p in kept if not (isinstance(p, AnyOf) and known.intersection(p.parts))]
    return kept[0] if len(kept) == 1 else All(tuple(kept))


def _any(parts: Iterable[Node]) -> Node:
    flat = _flat(parts, AnyOf)
    if ALWAYS in flat or _is_contradiction([_negation(part) for part in flat if _is_leaf(part)]):
        return ALWAYS
    kept = _without_redundant(flat, _implies_leaf)
    known = set(kept)
    kept = [p for p in kept if not (isinstance(p, All) and known.intersection(p.parts))]
    return kept[0] if len(kept) == 1 else AnyOf(tuple(kept))


def _flat(parts: Iterable[Node], kind: type[All[Any] | AnyOf[Any]]) -> list[Node]:
    """Return the parts of parts of one kind, each once."""
    flat: dict[Node, None] = {}
    for part in parts:
        for inner in part.parts if isinstance(part, kind) else (part,):
            flat[inner] = None
    return list(flat)


def _is_contradiction(parts: list[Node]) -> bool:
    """Tell whether it is proved that nothing satisfies all the parts."""
    return _is_empty(parts) or any(
        _implies_leaf(part, _negation(other)) or _implies_leaf(other, _negation(part))
        for group in _groups_to_pair(parts)
        for part, other in combinations(group, 2)
        if not (_values_of(part) and _values_of(other))  # of those, all together were asked about
    )


def _without_redundant(parts: list[Node], is_redundant: Callable[[Node, Node], bool]) -> list[Node]:
    """Leave out the parts that another part makes needless; of two equal ones keep the first."""
    dropped: set[int] = set()
    for group in _groups_to_pair(parts):
        for part in reversed(group):
            others = (other for other in group if other is not part and id(other) not in dropped)
            if any(is_redundant(part, other) for other in others):
                dropped.add(id(part))
    return [part for part in parts if id(part) not in dropped]


def _groups_to_pair(parts: list[Node]) -> Iterable[list[Node]]:
    """Return the groups of one attribute that are small enough to compare each with each."""
    for group in _by_path(parts).values():
        if len(group) * sum(map(_size, group)) <= MAX_STEPS:
            yield group


def _by_path(parts: Iterable[Node]) -> dict[str, list[Node]]:
    """Return the leaves that look at each attribute."""
    groups: dict[str, list[Node]] = {}
    for part in parts:
        leaf = _leaf(part)
        if leaf is not None:
            paths = {leaf.left.path: None}
            if isinstance(leaf.right, Attribute):
                paths[leaf.right.path] = None
            for path in paths:
                groups.setdefault(path, []).append(part)
    return groups


def _leaf(part: Node) -> Compare | None:
    leaf = part.part if isinstance(part, Not) else part
    return leaf if isinstance(leaf, Compare) else None


def _is_leaf(part: Node) -> bool:
    return _leaf(part) is not None


def _size(part: Node) -> int:
    """Return how many values a leaf compares with."""
    leaf = _leaf(part)
    return len(leaf.right) if leaf is not None and isinstance(leaf.right, tuple) else 1


def implies(first: Node, second: Node) -> bool:
    """Tell whether it is proved that whatever satisfies the first satisfies the second."""
    left = MAX_STEPS

    def prove(a: Node, b: Node) -> bool:
        nonlocal left
        left -= _size(a) + _size(b)
        if left < 0:
            return False
        if a in (b, NEVER) or b == ALWAYS:
            return True
        if isinstance(a, AnyOf):
            return all(prove(part, b) for part in a.parts)
        if isinstance(b, All):
            return all(prove(a, part) for part in b.parts)
        if not isinstance(a, All) and not isinstance(b, AnyOf):
            return _implies_leaf(a, b)
        known = a.parts if isinstance(a, All) else (a,)
        wanted = b.parts if isinstance(b, AnyOf) else (b,)
        # What is known implies what is wanted if nothing satisfies it and none of those.
        together = [*known, *(_negation(part) for part in wanted if _is_leaf(part))]
        left -= sum(map(_size, together))
        return (
            (left >= 0 and _is_empty(together))
            or (len(wanted) > 1 and any(prove(a, part) for part in wanted))
            or (len(known) > 1 and any(prove(part, b) for part in known))
        )

    return prove(simplify(first), simplify(second))


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
Intervals: TypeAlias = tuple[Interval, ...]
"""In order, and none within another."""
EVERYTHING: Intervals = ((None, None),)


@dataclass(frozen=True)
class _Values:
    """Values of one kind that an attribute may have: intervals in order, and perhaps none."""

    kind: str | None
    intervals: Intervals
    with_none: bool

    def is_within(self, other: _Values) -> bool:
        if not _are_comparable((self, other)):
            return False
        beyond = _both(self.intervals, _outside(other.intervals))
        return not beyond and (other.with_none or not self.with_none)


def _are_comparable(sets: Iterable[_Values]) -> bool:
    kinds = {each.kind for each in sets} - {None}
    return all(are_alike(kind, other) for kind, other in combinations(kinds, 2))


def _both(a: Intervals, b: Intervals) -> Intervals:
    """Return what is in both."""
    found: list[Interval] = []
    i = j = 0
    while i < len(a) and j < len(b):
        (a_low, a_high), (b_low, b_high) = a[i], b[j]
        low = b_low if a_low is None or (b_low is not None and a_low < b_low) else a_low
        is_a_first = b_high is None or (a_high is not None and a_high < b_high)
        high = a_high if is_a_first else b_high
        if low is None or high is None or low < high:
            found.append((low, high))
        i, j = (i + 1, j) if is_a_first else (i, j + 1)
    return tuple(found)


def _values_of(part: Node) -> _Values | None:
    """Return the values of its attribute that satisfy a leaf; None if that is no set of values."""
    negated = isinstance(part, Not)
    leaf = _leaf(part)
    if leaf is None or isinstance(leaf.right, Attribute):
        return None
    right = leaf.right
    if right is None:
        is_none = (leaf.sign == "==") is not negated
        return _Values(None, () if is_none else EVERYTHING, is_none)
    intervals: Intervals
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
        table: dict[str, Intervals] = {
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
    return _Values(kind, intervals, with_none)


def _point(value: Any) -> tuple[_Bound, _Bound]:
    return _Bound(value, -1), _Bound(value, 1)


def _outside(intervals: Intervals) -> Intervals:
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


def _is_empty(parts: Iterable[Node]) -> bool:
    """Tell whether no value of some attribute satisfies all the parts that look at it."""
    for group in _by_path(parts).values():
        sets = [values for part in group if (values := _values_of(part))]
        if not sets or not _are_comparable(sets) or sum(map(_size, group)) > MAX_STEPS:
            continue
        if all(each.with_none for each in sets):
            continue
        common = [each.intervals for each in sets]
        while len(common) > 1:  # in pairs of like size: each value is looked at few times
            odd = common[len(common) // 2 * 2 :]
            common = [*map(_both, common[::2], common[1::2]), *odd]
        if not common[0]:
            return True
    return False


def _implies_leaf(a: Node, b: Node) -> bool:
    """Tell whether one leaf proves another."""
    if a == b:
        return True
    leaf, other = _leaf(a), _leaf(b)
    first, second = _values_of(a), _values_of(b)
    if leaf is not None and other is not None and first and second:
        return leaf.left.path == other.left.path and first.is_within(second)
    if isinstance(a, Compare) and isinstance(b, Not) and isinstance(b.part, Compare):
        return b.part.sign in EXCLUDED.get(_sign_as_in(a, b.part) or "", ())
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
    sign = _sign_as_in(a, b)
    return sign is not None and b.sign in WEAKER.get(sign, {sign})


def _sign_as_in(a: Compare, b: Compare) -> str | None:
    """Return the sign between the two attributes of `a`, in the order that `b` has them."""
    if isinstance(a.right, Attribute) and isinstance(b.right, Attribute):
        if (a.left.path, a.right.path) == (b.left.path, b.right.path):
            return a.sign
        if (a.left.path, a.right.path) == (b.right.path, b.left.path):
            return MIRRORED[a.sign]
    return None


def _negation(part: Node) -> Node:
    return _simplify(part, negated=True)
