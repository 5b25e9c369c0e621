"""Values that specifications compare: which ones every use of a specification can keep."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime
from decimal import Context, Decimal, Inexact
from enum import Enum
from typing import TypeAlias
from uuid import UUID

from leftfold.domain.errors import LeftfoldError

Value: TypeAlias = bool | int | float | Decimal | str | datetime | date | UUID
"""What an attribute is compared with, apart from `None` and another attribute."""

MAX_INTEGER = 2**63 - 1
MAX_DIGITS, MAX_DECIMALS = 18, 6
SHOWN = 60
EXACT = Context(prec=MAX_DIGITS + 1, traps=[Inexact])
"""Arithmetic that raises where it would round, whatever the program's own context does."""

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
    """Return a value as it compares: an enum's member as its value, a moment in UTC.

    Python compares moments of one zone by the clock on the wall, which shows some hours twice.
    """
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, datetime) and is_aware(value):
        try:
            return value.astimezone(UTC)
        except OverflowError:
            return value
    return value


def constant(value: object) -> Value | None:
    """Return a value in the one form that specifications keep. Raises `InvalidValue`."""
    match value.value if isinstance(value, Enum) else value:
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
    if isinstance(value, Enum):
        value = value.value
    kind = KINDS.get(type(value))
    if kind is None:
        return next((k for t, k in KINDS.items() if isinstance(value, t)), None)
    return kind


def is_aware(moment: datetime) -> bool:
    """Tell whether a moment has a zone, and the zone an offset then."""
    return moment.utcoffset() is not None


def is_exact_float(number: int) -> bool:
    """Tell whether a float can be this whole number."""
    try:
        return float(number) == number
    except OverflowError:
        return False


def millionths(number: Decimal) -> int:
    """Return a decimal in millionths, in time that does not grow with its exponent.

    Raises `ValueError` if it has more decimals, or far too many digits before the point.
    """
    if not number.is_finite():
        msg = "not a finite number"
        raise ValueError(msg)
    if not number:
        return 0
    if number.adjusted() > MAX_DIGITS - MAX_DECIMALS:
        msg = f"more than {MAX_DIGITS - MAX_DECIMALS} digits before the point"
        raise ValueError(msg)
    try:
        return int(EXACT.to_integral_exact(EXACT.scaleb(number, MAX_DECIMALS)))
    except Inexact:
        msg = f"more than {MAX_DECIMALS} digits after the point"
        raise ValueError(msg) from None


def are_alike(left: str | None, right: str | None) -> bool:
    """Tell whether two kinds compare: the same, or whole numbers with others."""
    if left == right:
        return left is not None
    return {left, right} in ({"int", "Decimal"}, {"int", "float"})


def _decimal(number: Decimal) -> Decimal:
    try:
        units = millionths(number)
    except ValueError as error:
        raise _invalid(number, str(error)) from None
    if abs(units) >= 10**MAX_DIGITS:
        raise _invalid(number, f"more than {MAX_DIGITS - MAX_DECIMALS} digits before the point")
    exponent = -MAX_DECIMALS
    while exponent < 0 and units % 10 == 0:
        units, exponent = units // 10, exponent + 1
    return EXACT.scaleb(Decimal(units), exponent)


def _text(text: str) -> str:
    if "\0" in text:
        raise _invalid(text, "it holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _invalid(text, "it holds half of a surrogate pair") from None
    return str(text)


def _moment(moment: datetime) -> datetime:
    if not is_aware(moment):
        raise _invalid(moment, "a time without a zone")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise _invalid(moment, "beyond the years 1 to 9999 in UTC") from None


def _invalid(value: object, reason: str) -> InvalidValue:
    try:
        shown = ascii(value)
    except ValueError:  # Python writes no whole number of thousands of digits
        shown = f"a huge {type(value).__name__}"
    return InvalidValue(shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…", reason)
