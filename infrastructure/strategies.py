"""Hypothesis strategies: specifications over a model, and candidates for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from random import Random  # noqa: TID251 - Hypothesis seeds it
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from hypothesis import strategies as st
from pydantic import BaseModel

from leftfold.domain import Specification, all_of, any_of, attr
from leftfold.domain.specification.binding import attribute_types, kind_of_type
from leftfold.domain.specification.tree import (
    ORDERINGS,
    All,
    AnyOf,
    Attribute,
    Compare,
    Not,
    expand,
)
from leftfold.domain.specification.values import KINDS, kind_of

T = TypeVar("T")
Values = st.SearchStrategy[Any]

TEXTS = [*"aA%_'\"\\ßé日 ", "", "a_b", "e\u0301", "\U0001f600"]


class _PutBack(tzinfo):
    """A zone whose clocks are put back one hour, so that the hour before happens twice."""

    before, after = timedelta(hours=2), timedelta(hours=1)
    put_back = datetime(2011, 12, 9, 13)  # noqa: DTZ001 - as the clock on the wall shows it

    def utcoffset(self, moment: datetime | None, /) -> timedelta:
        if moment is None:
            return self.after
        shown = moment.replace(tzinfo=None)
        is_second = shown >= self.put_back - timedelta(hours=1) and moment.fold
        return self.after if is_second or shown >= self.put_back else self.before

    def dst(self, moment: datetime | None, /) -> timedelta:
        return self.utcoffset(moment) - self.after

    def tzname(self, moment: datetime | None, /) -> str:
        return f"UTC+{self.utcoffset(moment)}"

    def fromutc(self, moment: datetime, /) -> datetime:
        shown = moment + self.before
        if shown.replace(tzinfo=None) < self.put_back:
            return shown
        shown = moment + self.after
        is_second = shown.replace(tzinfo=None) < self.put_back
        return shown.replace(fold=int(is_second))


ZONES = (UTC, timezone(timedelta(hours=9)), timezone(timedelta(hours=-3, minutes=-30)), _PutBack())
MOMENT = datetime(2011, 12, 9, 12, 50, tzinfo=UTC)

MOMENTS = [
    *(MOMENT.astimezone(zone) for zone in ZONES),
    *(datetime(2011, 12, 9, 12, 20, tzinfo=ZONES[3], fold=fold) for fold in (0, 1)),
]
DECIMALS = ["2.5", "2.50", "0", "-0.000001", "10", "1E+1"]  # equal ones of different scale, too
VALUES: Mapping[str, Values] = {
    "bool": st.booleans(),
    "int": st.integers(-3, 3) | st.sampled_from([2**63 - 1, -(2**63), 2**53 + 1]),
    "Decimal": st.sampled_from(DECIMALS).map(Decimal)
    | st.decimals(-(10**11), 10**11, allow_nan=False, places=6),
    "float": st.sampled_from([0.0, -0.0, 1.5, -1.5, 1e300, 5e-324])
    | st.floats(allow_nan=False, allow_infinity=False),
    "str": st.sampled_from(TEXTS)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    "datetime": st.sampled_from(MOMENTS)
    | st.datetimes(
        MOMENT.replace(year=2, tzinfo=None),
        MOMENT.replace(year=9998, tzinfo=None),
        timezones=st.sampled_from(ZONES),
    ),
    "date": st.sampled_from([date(2011, 12, 9), date(1, 1, 1)]) | st.dates(),
    "UUID": st.integers(0, 3).map(lambda n: UUID(int=n)) | st.uuids(),
}
"""Values of each kind, the awkward ones often."""


def specifications(
    model_type: type[T], *, max_leaves: int = 5
) -> st.SearchStrategy[Specification[T]]:
    """Draw specifications over the attributes that a model declares."""
    kinds = _kinds(model_type)
    of_each = {name: _leaves(name, kinds) for name in sorted(kinds)}  # to make them is dear
    leaves = st.sampled_from(list(of_each)).flatmap(of_each.__getitem__)
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(Specification.and_spec, inner, inner),
            st.builds(Specification.or_spec, inner, inner),
            st.builds(Specification.not_spec, inner),
            st.lists(inner, max_size=3).map(lambda parts: all_of(*parts)),
            st.lists(inner, max_size=3).map(lambda parts: any_of(*parts)),
        ),
        max_leaves=max_leaves,
    )


def candidates(model_type: type[T], near: Specification[Any] | None = None) -> st.SearchStrategy[T]:
    """Draw objects of a dataclass or pydantic model; with values that a specification names."""
    model: Any = model_type  # for mypy, a class of no known base may not be hashable
    hints, usual = _usual(model)
    named = _constants(near) if near is not None else {}
    close = {name: _values(hints[name], named[name]) for name in usual.keys() & named.keys()}
    return st.builds(model_type, **{**usual, **close})


def satisfying(specification: Specification[T], model_type: type[T]) -> st.SearchStrategy[T]:
    """Draw candidates that satisfy a specification. It finds none if none does."""
    names, simple = _names(model_type), specification.simplify()
    drawn = st.tuples(candidates(model_type, specification), st.randoms(use_true_random=False))

    def mend(pair: tuple[T, Random]) -> T:
        candidate, chance = pair
        values = {name: getattr(candidate, name) for name in names}
        _mend(simple, values, chance)
        return model_type(**values)

    return drawn.map(mend).filter(specification.is_satisfied_by)


def violating(specification: Specification[T], model_type: type[T]) -> st.SearchStrategy[T]:
    """Draw candidates that do not satisfy a specification."""
    return satisfying(~specification, model_type)


def _mend(node: Specification[Any], values: dict[str, Any], chance: Random) -> None:
    """Change values, so that they more likely satisfy a simple specification."""
    match node:
        case All(parts):
            for part in parts:
                _mend(part, values, chance)
        case AnyOf(parts) if parts:
            _mend(chance.choice(parts), values, chance)
        case Compare(left, _, right) | Not(Compare(left, _, right)) if left.path in values:
            if isinstance(right, Attribute):
                right = values.get(right.path)
            named = right if isinstance(right, tuple) else (right,)
            near = [each for value in named for each in _near(value)]
            fitting = [each for each in near if node.check({**values, left.path: each})]
            if fitting and not node.check(values):
                values[left.path] = chance.choice(fitting)
        case _:
            pass


@lru_cache
def _usual(model_type: Any) -> tuple[Mapping[str, Any], Mapping[str, Values]]:
    """Return the types of a model's fields, and strategies of their values."""
    hints = get_type_hints(model_type)
    return hints, {name: _values(hints[name], ()) for name in _names(model_type)}


def _names(model_type: Any) -> list[str]:
    if is_dataclass(model_type):
        return [field.name for field in fields(model_type) if field.init]
    if issubclass(model_type, BaseModel):
        return list(model_type.model_fields)
    msg = f"{model_type.__name__} is neither a dataclass nor a pydantic model"
    raise TypeError(msg)


def _kinds(model_type: Any) -> dict[str, Any]:
    """Return the attributes that can be compared, with their types."""
    types = attribute_types(model_type)
    return {name: types[name] for name in types if kind_of_type(types[name])}


def _leaves(name: str, types: Mapping[str, Any]) -> st.SearchStrategy[Specification[Any]]:
    left, kind = attr(name), kind_of_type(types[name])
    values = _values(types[name], ())
    same = [attr(other) for other, found in types.items() if kind_of_type(found) == kind]
    signs = st.sampled_from(["==", "!=", *ORDERINGS])
    leaves: list[st.SearchStrategy[Specification[Any]]] = [
        st.builds(left.compare, signs, values),
        st.builds(left.compare, signs, st.sampled_from(same)),
        st.builds(left.compare, st.sampled_from(["==", "!="]), st.none()),
        st.lists(values, max_size=4).map(left.is_in),
        st.builds(left.between, values, values),
    ]
    if kind == "str":
        texts = (left.contains, left.startswith, left.endswith)
        leaves += [values.map(search) for search in texts]
    return st.one_of(leaves)


def _values(hint: Any, named: Any) -> Values:
    """Draw values of a declared type: of its kind, or near to those named."""
    types = _allowed(hint)
    choices: list[Values] = []
    if type(None) in types:
        choices.append(st.none())
    for each in types:
        if each is type(None):
            continue
        if isinstance(each, type) and issubclass(each, Enum):
            choices.append(st.sampled_from(each))
        elif each in KINDS:
            choices.append(VALUES[KINDS[each]])
            close = [value for value in named if kind_of(value) == KINDS[each]]
            if close:
                choices.append(st.sampled_from([near for value in close for near in _near(value)]))
        else:
            choices.append(st.from_type(each))
    return st.one_of(choices)


def _allowed(hint: Any) -> tuple[Any, ...]:
    """Return the types that a hint allows."""
    if get_origin(hint) is Annotated:
        return _allowed(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) in {Union, UnionType} else (hint,)


def _constants(specification: Specification[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    waiting = [specification]
    while waiting:
        match expand(waiting.pop()):
            case All(parts) | AnyOf(parts):
                waiting.extend(parts)
            case Not(part):
                waiting.append(part)
            case Compare(left, _, right) if right is not None and not isinstance(right, Attribute):
                found.setdefault(left.path, []).extend(
                    right if isinstance(right, tuple) else [right]
                )
            case _:
                pass
    return found


def _near(value: Any) -> list[Any]:
    """Return a value and its neighbours."""
    match value:
        case bool():
            return [value, not value]
        case int():
            return [each for each in (value - 1, value, value + 1) if abs(each) < 2**63]
        case Decimal():
            step = Decimal("0.000001")
            return [value - step, value, value + step]
        case str():
            return [value, f"{value}a", f"a{value}", value[:-1]]
        case datetime():
            return [value, *(value.astimezone(zone) for zone in ZONES[1:])]
        case _:
            return [value]
