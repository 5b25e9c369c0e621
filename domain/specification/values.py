"""Values that specifications compare: which ones every use of a specification can keep."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from typing import TypeAlias
from uuid import UUID

from leftfold.domain.errors import LeftfoldError

Value: TypeAlias = bool | int | float | Decimal | str | datetime | date | UUID
"""What an attribute is compared with, apart from `None` and another attribute."""

MAX_INTEGER = 2**63 - 1
MAX_DIGITS, MAX_DECIMALS = 18, 6
EXACT_IN_FLOAT = 2**53
SHOWN = 60

KINDS: dict[type, str] = {
    bool: "bool",
    int: "int",
    Decimal: "Decimal",
    float: "float",
    str: "str",
    datetime: "datetime",
    date: "date",
    UUID: "UUID",
}
"""The kinds of values by their Python type. Values of one kind have an order."""


class InvalidValue(LeftfoldError, message="{value} cannot be compared: {reason}"):
    """A specification compares with a value that it could not mean the same everywhere."""

    value: str
    reason: str


class UnlikeTypes(LeftfoldError, message="cannot compare {left} with {right}"):
    """Two values of these types are never equal and have no order."""

    left: str
    right: str


def plain(value: object) -> object:
    """Return an enum's member as its value, and anything else as it is."""
    return value.value if isinstance(value, Enum) else value


def constant(value: object) -> Value | None:
    """Return a value in the one form that specifications keep. Raises `InvalidValue`."""
    match plain(value):
        case None:
            return None
        case bool() as truth:
            return truth
        case int() as number:
            if not -MAX_INTEGER - 1 <= number <= MAX_INTEGER:
                raise _invalid(value, "more than 64 bits")
            return int(number)
        case Decimal() as number:
            return _decimal(number)
        case float() as number:
            if not math.isfinite(number):
                raise _invalid(value, "not finite")
            return float(number)
        case str() as text:
            return _text(text)
        case datetime() as moment:
            return _moment(moment)
        case date() | UUID() as other:
            return other
        case _:
            raise _invalid(value, f"a {type(value).__name__} is no value of a specification")


def kind_of(value: object) -> str | None:
    """Return the kind of a value that an attribute has; None for one that cannot be compared."""
    value = plain(value)
    kind = KINDS.get(type(value))
    if kind is None:
        return next((k for t, k in KINDS.items() if isinstance(value, t)), None)
    return kind


def are_alike(left: str | None, right: str | None) -> bool:
    """Tell whether two kinds compare: the same, or whole numbers with others."""
    if left == right:
        return left is not None
    return {left, right} in ({"int", "Decimal"}, {"int", "float"})


def _decimal(number: Decimal) -> Decimal:
    if not number.is_finite():
        raise _invalid(number, "not a finite number")
    sign, digits, exponent = number.as_tuple()
    if not any(digits):
        return Decimal(0)
    assert isinstance(exponent, int)  # noqa: S101 - it is finite
    while digits[-1] == 0 and exponent < 0:  # by hand: the context could round
        digits, exponent = digits[:-1], exponent + 1
    if exponent < -MAX_DECIMALS:
        raise _invalid(number, f"more than {MAX_DECIMALS} digits after the point")
    if len(digits) + exponent > MAX_DIGITS - MAX_DECIMALS:
        raise _invalid(number, f"more than {MAX_DIGITS - MAX_DECIMALS} digits before the point")
    if exponent > 0:
        digits, exponent = digits + (0,) * exponent, 0
    return Decimal((sign, digits, exponent))


def _text(text: str) -> str:
    if "\0" in text:
        raise _invalid(text, "it holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _invalid(text, "it holds half of a surrogate pair") from None
    return str(text)


def _moment(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise _invalid(moment, "a time without a zone")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise _invalid(moment, "beyond the years 1 to 9999 in UTC") from None


def _invalid(value: object, reason: str) -> InvalidValue:
    shown = ascii(value)
    return InvalidValue(shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…", reason)
