"""Rows of views: which values every database can keep exactly, and which are refused by name."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import MAXYEAR, MINYEAR, UTC, date, datetime
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from operator import attrgetter, methodcaller
from typing import Any, Generic, TypeVar
from uuid import UUID

from leftfold.application import InvalidModelError, Projection, ValidationFailed
from leftfold.application.ports import Order, Seek
from leftfold.domain import Personal
from leftfold.domain.specification.values import millionths
from leftfold.infrastructure.errors import ValueOutOfRangeError

R = TypeVar("R")

MIN_INTEGER, MAX_INTEGER = -(2**63), 2**63 - 1
TOO_LARGE = "more than 64 bits"
LONGEST_KEY = 1_000
"""Bytes of a key: indexes of PostgreSQL take some 2,700, and SQLite's any number."""
AMOUNTS = 4_096
"""Decimals of a column whose encoded values are remembered: prices are few."""
MAX_KNOWN = 1_000
"""Combinations of types that a shape remembers; a row type with many `None`s has more."""


def whole(number: int) -> int:
    """Return an integer of 64 bits. Raises `ValueError` for a larger one."""
    if not MIN_INTEGER <= number <= MAX_INTEGER:
        raise ValueError(TOO_LARGE)
    return number


def scaled(value: Decimal) -> int:
    """Return a Decimal in millionths. Raises `ValueError` if that is not exact."""
    return whole(millionths(value))


def exact(value: Decimal) -> Decimal:
    """Return a Decimal that `scaled` takes. Raises `ValueError`."""
    scaled(value)
    return value


def finite(value: float) -> float:
    """Return a finite float. Raises `ValueError` for others, and for an int that is none."""
    if not math.isfinite(value):
        msg = "not finite"
        raise ValueError(msg)
    if type(value) is not float and float(value) != value:
        msg = "more digits than a float has"
        raise ValueError(msg)
    return value


def storable(text: str) -> str:
    """Return text that is UTF-8 without NUL. Raises `ValueError` for other text."""
    if "\0" in text:
        msg = "holds a NUL character"
        raise ValueError(msg)
    if not text.isascii():
        text.encode()
    return text


def indexable(key: str) -> str:
    """Return a key that every database can keep in an index. Raises `ValueError` for another."""
    if len(storable(key).encode()) > LONGEST_KEY:
        msg = f"is longer than {LONGEST_KEY} bytes"
        raise ValueError(msg)
    return key


def aware(moment: datetime) -> datetime:
    """Return a moment that has a zone.

    Raises `ValueError` for one that has none, `OverflowError` for one beyond the years of UTC.
    """
    if moment.tzinfo is not UTC and moment.utcoffset() is None:
        msg = "has no time zone"
        raise ValueError(msg)
    if not MINYEAR < moment.year < MAXYEAR:
        moment.astimezone(UTC)
    return moment


def same(value: Any) -> Any:
    """Return the value: every one of its type can be kept."""
    return value


CHECKS: Mapping[type, Callable[[Any], Any]] = {
    int: whole,
    Decimal: exact,
    float: finite,
    str: storable,
    bool: same,
    datetime: aware,
    date: same,
    UUID: same,
}
ALSO: Mapping[type, type] = {float: int}
"""What typing lets pass for a type."""
NEVER: Mapping[type, type] = {int: bool, float: bool, date: datetime}
"""What Python takes for a type, and no database does."""


@dataclass(frozen=True, slots=True)
class Column:
    """One field of a row: its name, its type without `None`, and whether it may be `None`."""

    name: str
    python_type: type[Any]
    is_optional: bool
    kind: Any = None
    """Of personal data: the type of the value."""

    @property
    def stored_type(self) -> type[Any]:
        """The type whose values are stored: the text of an enumeration."""
        return str if issubclass(self.python_type, (Enum, Personal)) else self.python_type


def columns_of(projection: Projection[Any]) -> tuple[Column, ...]:
    """Return the columns of a projection's rows.

    Raises `InvalidModelError` for a field whose type has no column.
    """
    return tuple(_column(projection, name, hint) for name, hint in projection.column_types.items())


def _column(projection: Projection[Any], name: str, hint: Any) -> Column:
    if name in {"key", "member"}:
        raise InvalidModelError(f"projection {projection.name}: every view has a column {name!r}")
    is_union = typing.get_origin(hint) in {typing.Union, types.UnionType}
    options = typing.get_args(hint) if is_union else (hint,)
    plain = [option for option in options if option is not types.NoneType]
    if len(plain) == 1 and typing.get_origin(plain[0]) is Personal:
        return Column(name, Personal, len(options) > 1, *typing.get_args(plain[0]))
    if len(plain) == 1 and isinstance(plain[0], type):
        (python_type,) = plain
        is_text = issubclass(python_type, Enum) and all(
            isinstance(m.value, str) for m in python_type
        )
        if python_type in CHECKS or is_text:
            return Column(name, python_type, len(options) > 1)
    raise InvalidModelError(f"projection {projection.name}: no column type for {name}: {hint}")


def describe(columns: Sequence[Column]) -> str:
    """Return columns as text, to notice a row type that was changed: `sku str, sold datetime?`."""
    return ", ".join(
        f"{column.name} {_described(column)}{'?' * column.is_optional}" for column in columns
    )


def _described(column: Column) -> str:
    if column.python_type is Personal:
        return f"Personal[{column.kind.__name__ if isinstance(column.kind, type) else column.kind}]"
    return column.stored_type.__name__


class RowShape(Generic[R]):
    """The columns of a view's rows, and how their values are encoded."""

    def __init__(
        self,
        projection: Projection[R],
        encoders: Mapping[type, Callable[[Any], Any]] = CHECKS,
    ) -> None:
        """Encode values by their type; the encoders also check. Raises `InvalidModelError`."""
        self.projection = projection
        self.columns = columns_of(projection)
        self._by_name = {
            column.name: (column, _encoder(column, encoders)) for column in self.columns
        }
        self._encoders = [encode for _, encode in self._by_name.values()]
        self._values = _values_of(projection.columns)
        self._known: dict[tuple[type, ...], Callable[..., list[Any]]] = {}

    def encode(self, key: str, row: R) -> list[Any]:
        """Return a row's encoded values, in order. Raises `ValueOutOfRangeError`."""
        values = self._values(row)
        types_found = tuple(map(type, values))
        encode = self._known.get(types_found)  # most rows are like one before
        if encode is None:
            return self._encode_the_first(key, values, types_found)
        try:
            return encode(key, *values)
        except (ValueError, OverflowError, TypeError):  # the last from a NaN, as a cache's key
            return self._encode_one_by_one(key, values)

    def _encode_the_first(
        self, key: str, values: Sequence[object], types_found: tuple[type, ...]
    ) -> list[Any]:
        """Encode a row of types that were not met before, and remember how."""
        for column, value in zip(self.columns, values, strict=True):
            self._check_type(column, value)
        if len(self._known) < MAX_KNOWN:
            self._known[types_found] = _compiled(types_found, self._encoders)
        return self._encode_one_by_one(key, values)

    def _encode_one_by_one(self, key: str, values: Sequence[Any]) -> list[Any]:
        encoded: list[Any] = []
        for (name, (_, encode)), value in zip(self._by_name.items(), values, strict=True):
            try:
                encoded.append(None if value is None else encode(value))
            except (ValueError, OverflowError) as error:
                raise self._refusal(name, value, error) from None
        try:
            indexable(key)
        except ValueError as error:
            raise self._refusal("key", key, error) from None
        return encoded

    def encode_one(self, name: str, value: object) -> Any:
        """Return one column's value, encoded. Raises `ValueOutOfRangeError`."""
        column, encode = self._by_name[name]
        self._check_type(column, value)
        try:
            return None if value is None else encode(value)
        except (ValueError, OverflowError) as error:
            raise self._refusal(name, value, error) from None

    def sought(self, order: Order, seek: Seek) -> Any:
        """Return the value to go on after, encoded. Raises `ValidationFailed`: it is from outside.

        A value that no row can have would be refused by some databases and not by others.
        """
        try:
            storable(seek.key)
            return self.encode_one(order.column, seek.value)
        except (ValueOutOfRangeError, ValueError):
            reason = (("cursor", "is not a cursor of this order"),)
            raise ValidationFailed(self.projection.name, reason) from None

    def _check_type(self, column: Column, value: object) -> None:
        wanted = column.python_type
        if value is None:
            if not column.is_optional:
                raise self._refusal(column.name, value, "may not be None")
        elif not isinstance(value, (wanted, ALSO.get(wanted, wanted))) or (
            wanted in NEVER and isinstance(value, NEVER[wanted])
        ):
            raise self._refusal(column.name, value, f"is no {wanted.__name__}")

    def _refusal(self, name: str, value: object, reason: Exception | str) -> ValueOutOfRangeError:
        # Without the value: it may be personal, and this is logged.
        said = reason.reason if isinstance(reason, UnicodeEncodeError) else str(reason)
        kind = f"a value of type {type(value).__name__}"
        return ValueOutOfRangeError(self.projection.name, name, kind, said)


def _compiled(
    types_found: Sequence[type], encoders: Sequence[Callable[[Any], Any]]
) -> Callable[..., list[Any]]:
    """Return what encodes rows of just these types; it raises `ValueError` for what is refused.

    A call for each value would take most of the time of a page.
    """
    checks = [f"'\\0' in key or not key.isascii() or len(key) > {LONGEST_KEY}"]
    encoded: list[str] = []
    for index, (kind, encode) in enumerate(zip(types_found, encoders, strict=True)):
        name = f"v{index}"
        if kind is types.NoneType or encode is same:
            encoded.append(name)
        elif encode is whole:
            checks.append(f"not {MIN_INTEGER} <= {name} <= {MAX_INTEGER}")
            encoded.append(name)
        elif encode is storable:
            checks.append(f"not {name}.isascii() or '\\0' in {name}")
            encoded.append(name)
        else:
            encoded.append(f"encode{index}({name})")
    given = ", ".join(f"v{index}" for index in range(len(types_found)))
    source = (
        f"def encode(key, {given}):\n"
        f"    if {' or '.join(checks)}:\n"
        "        raise ValueError\n"
        f"    return [{', '.join(encoded)}]\n"
    )
    made: dict[str, Any] = {
        f"encode{index}": lru_cache(AMOUNTS)(encode) if kind is Decimal else encode
        for index, (kind, encode) in enumerate(zip(types_found, encoders, strict=True))
    }
    exec(source, made)  # noqa: S102 - made of numbers and names that are counted here
    compiled: Callable[..., list[Any]] = made["encode"]
    return compiled


def _encoder(column: Column, encoders: Mapping[type, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    if issubclass(column.python_type, Enum):
        return _text_of(encoders[str])
    if column.python_type is Personal:
        return methodcaller("text", column.kind)
    return encoders[column.python_type]


def _text_of(encode: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda member: encode(member.value)


def _values_of(names: tuple[str, ...]) -> Callable[[Any], tuple[object, ...]]:
    getter = attrgetter(*names)
    return getter if len(names) > 1 else lambda row: (getter(row),)
