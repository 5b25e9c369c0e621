"""Tables of views: columns derived from row types, and the statements on them.

SQLAlchemy Core writes the SQL; it never connects. The statements run on the eventsourcing
library's own connections, so that events, rows and checkpoints share one transaction.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from functools import cached_property
from operator import attrgetter
from typing import Any, Generic, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateTable

from leftfold.application import InvalidModelError, Projection, ValidationFailed
from leftfold.application.ports import Order, Seek
from leftfold.infrastructure.errors import ValueOutOfRangeError

R = TypeVar("R")

SCALE = 6  # decimals that a Decimal column keeps
MAX_INTEGER = 2**63 - 1
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

SQLITE: sa.Dialect = sqlite.dialect(paramstyle="named")
POSTGRES: sa.Dialect = postgresql.dialect(paramstyle="pyformat")  # type: ignore[no-untyped-call]  # see above


@dataclass(frozen=True)
class Statement:
    """SQL text for a driver, and the values it is run with."""

    sql: str
    parameters: Mapping[str, object]


@dataclass(frozen=True)
class _Kind:
    """How values of a Python type are kept: a column type, and the ways in and out.

    `None` for a way means that the driver's own is right.
    """

    column: sa.types.TypeEngine[Any]
    encode: Callable[[Any], object] | None = None
    decode: Callable[[Any], object] | None = None
    display: Callable[[sa.ColumnElement[Any]], sa.ColumnElement[Any]] | None = None


def scaled(value: Decimal) -> int:
    """Return a Decimal as a whole number of millionths. Raises `ValueError` if that loses some."""
    number = value.scaleb(SCALE) if value.is_finite() else value
    whole = int(number)
    if whole != number:
        msg = f"more than {SCALE} decimals"
        raise ValueError(msg)
    return _bounded(whole)


def unscaled(number: int) -> Decimal:
    """Return the Decimal of a whole number of millionths, with no needless zeros."""
    value = Decimal(number).scaleb(-SCALE).normalize()
    return value if value.as_tuple().exponent <= 0 else value.quantize(Decimal(1))  # type: ignore[operator]  # finite, so a number


def _bounded(number: int) -> int:
    if not -MAX_INTEGER <= number <= MAX_INTEGER:
        msg = "too large"
        raise ValueError(msg)
    return number


def _exact(value: Decimal) -> Decimal:
    scaled(value)
    return value


def _storable(text: str) -> str:
    if "\0" in text:
        msg = "holds a NUL character"
        raise ValueError(msg)
    text.encode()
    return text


def _iso_time(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.func.strftime(
        sa.literal_column("'%Y-%m-%dT%H:%M:%fZ'"),
        column / sa.literal_column("1000000.0"),
        sa.literal_column("'unixepoch'"),
    )


_SQLITE_KINDS: dict[type, _Kind] = {
    int: _Kind(sa.BigInteger(), _bounded),
    Decimal: _Kind(
        sa.BigInteger(), scaled, unscaled, lambda column: column / sa.literal_column("1000000.0")
    ),
    float: _Kind(sa.Float()),
    str: _Kind(sa.Text(), _storable),
    bool: _Kind(sa.Boolean(), None, bool),
    datetime: _Kind(
        sa.BigInteger(),
        lambda at: (at - EPOCH) // MICROSECOND,
        lambda n: EPOCH + timedelta(microseconds=n),
        _iso_time,
    ),
    date: _Kind(sa.Text(), date.isoformat, date.fromisoformat),
    UUID: _Kind(sa.Text(), lambda value: value.hex, UUID),
}
_POSTGRES_KINDS: dict[type, _Kind] = {
    int: _Kind(sa.BigInteger(), _bounded),
    Decimal: _Kind(sa.Numeric(), _exact),
    float: _Kind(sa.Double()),
    str: _Kind(sa.Text(collation="C"), _storable),
    bool: _Kind(sa.Boolean()),
    datetime: _Kind(sa.DateTime(timezone=True), None, lambda at: at.astimezone(UTC)),
    date: _Kind(sa.Date()),
    UUID: _Kind(sa.Uuid()),
}


def _kind_of(
    projection: Projection[Any], name: str, hint: Any, kinds: dict[type, _Kind]
) -> tuple[_Kind, bool]:
    options = (
        typing.get_args(hint)
        if typing.get_origin(hint) in {typing.Union, types.UnionType}
        else (hint,)
    )
    plain = [option for option in options if option is not types.NoneType]
    if len(plain) == 1 and isinstance(plain[0], type):
        (python_type,) = plain
        if issubclass(python_type, Enum):
            kind = _Kind(kinds[str].column, lambda member: member.value, python_type)
            return kind, len(options) > 1
        if python_type in kinds:
            return kinds[python_type], len(options) > 1
    msg = f"projection {projection.name}: no column type for {name}: {hint}"
    raise InvalidModelError(msg)


class ViewTable(Generic[R]):
    """One projection's table on one database: its definition, its codec, its statements.

    Raises `InvalidModelError` for a row type that has no columns.
    """

    def __init__(self, projection: Projection[R], dialect: sa.Dialect) -> None:
        """Derive the table from the projection's row type."""
        self.projection = projection
        self.dialect = dialect
        kinds = _SQLITE_KINDS if dialect is SQLITE else _POSTGRES_KINDS
        key = sa.Column(
            "key", sa.Text(collation=None if dialect is SQLITE else "C"), primary_key=True
        )
        columns = []
        self._decoders: list[tuple[int, Callable[[Any], object]]] = []
        self._encoders: list[tuple[int, str, Callable[[Any], object]]] = []
        shown: list[sa.ColumnElement[Any]] = []
        for index, (name, hint) in enumerate(projection.column_types.items()):
            if name in {"key", "member"}:
                msg = f"projection {projection.name}: {name!r} is a column of every view"
                raise InvalidModelError(msg)
            kind, is_optional = _kind_of(projection, name, hint, kinds)
            column = sa.Column(name, kind.column, nullable=is_optional)
            columns.append(column)
            shown.append((kind.display(column) if kind.display else column).label(name))
            if kind.decode:
                self._decoders.append((index, kind.decode))
            if kind.encode:
                self._encoders.append((index, name, kind.encode))
        self.table = sa.Table(
            projection.table,
            sa.MetaData(),
            key,
            *columns,
            sa.Column("member", sa.Boolean, nullable=False),
            sqlite_with_rowid=False,
            postgresql_with={"fillfactor": 60},
        )
        self._shown = sa.select(key, *shown).where(self.table.c.member)
        self._values: Callable[[R], tuple[object, ...]] = _values_of(projection.columns)

    @cached_property
    def definition(self) -> str:
        """The statement that makes the table; stored, to notice a changed row type."""
        return self._text(CreateTable(self.table, if_not_exists=True))

    @cached_property
    def member_view(self) -> str:
        """The statement that makes a SQL view of the members, for people."""
        query = self._shown.compile(dialect=self.dialect, compile_kwargs={"literal_binds": True})
        return f"CREATE VIEW {self.projection.name} AS {query}"

    @cached_property
    def insert(self) -> str:
        """The beginning of an INSERT of rows as `encode` makes them."""
        return f"INSERT INTO {self.table.name} VALUES "

    @cached_property
    def on_conflict(self) -> str:
        """The end of an INSERT that changes the rows which are there."""
        changed = ", ".join(
            f'"{c.name}" = excluded."{c.name}"' for c in self.table.c if not c.primary_key
        )
        return f" ON CONFLICT (key) DO UPDATE SET {changed}"

    @cached_property
    def upsert_json(self) -> str:
        """PostgreSQL: insert or change rows, given as one JSON array of [key, member, row]."""
        names = ", ".join(f'"{c.name}"' for c in self.table.c)
        fields = ", ".join(f'r."{name}"' for name in self.projection.columns)
        return (
            f"INSERT INTO {self.table.name} ({names}) "
            f"SELECT e->>0, {fields}, (e->>1)::boolean FROM json_array_elements(%s::json) AS e, "
            f"json_populate_record(NULL::{self.table.name}, e->2) AS r " + self.on_conflict
        )

    def encode(self, key: str, row: R) -> list[object]:
        """Return a row's values in the table's order. Raises `ValueOutOfRangeError`."""
        values = list(self._values(row))
        for index, name, encode in self._encoders:
            value = values[index]
            if value is not None:
                try:
                    values[index] = encode(value)
                except (ValueError, OverflowError) as error:
                    raise ValueOutOfRangeError(
                        self.projection.name, name, repr(value), str(error)
                    ) from None
        return [key, *values, self.projection.shows(row)]

    def checked(self, row: R) -> R:
        """Return the row itself if the database can keep it. Raises `ValueOutOfRangeError`."""
        self.encode("", row)
        return row

    def decode(self, values: Iterable[Any]) -> R:
        """Make a row of the values of its columns."""
        fields = list(values)
        for index, decode in self._decoders:
            if fields[index] is not None:
                fields[index] = decode(fields[index])
        row: R = self.projection.row(*fields)
        return row

    def select(self, order: Order | None, limit: int | None, seek: Seek | None = None) -> Statement:
        """Return the query for member rows: the key, then the row's columns."""
        table, key = self.table, self.table.c.key
        query = sa.select(key, *(table.c[name] for name in self.projection.columns))
        query = query.where(table.c.member)
        if order is not None:
            column = table.c[order.column]
            if seek is not None:
                query = query.where(self._after(column, order, seek))
            direction = column.desc() if order.descending else column.asc()
            query = query.order_by(
                direction.nulls_last() if order.descending else direction.nulls_first()
            )
        query = query.order_by(key.asc())
        if limit is not None:
            query = query.limit(limit)
        compiled = query.compile(dialect=self.dialect)
        return Statement(str(compiled), compiled.params)

    def _after(self, column: sa.Column[Any], order: Order, seek: Seek) -> sa.ColumnElement[bool]:
        key_after = self.table.c.key > seek.key
        if seek.value is None:
            same = sa.and_(column.is_(None), key_after)
            return same if order.descending else sa.or_(column.is_not(None), same)
        value = self._encode_one(order.column, seek.value)
        same = sa.and_(column == value, key_after)
        if order.descending:
            return sa.or_(column < value, column.is_(None), same)
        return sa.or_(column > value, same)

    def _encode_one(self, name: str, value: object) -> Any:
        index = self.projection.columns.index(name)
        for at, _, encode in self._encoders:
            if at == index:
                try:
                    return encode(value)
                except (ValueError, OverflowError):
                    reason = (("cursor", "is not a cursor of this order"),)
                    raise ValidationFailed(self.projection.name, reason) from None
        return value

    def _text(self, element: sa.schema.ExecutableDDLElement) -> str:
        return str(element.compile(dialect=self.dialect)).strip()


def _values_of(columns: tuple[str, ...]) -> Callable[[Any], tuple[object, ...]]:
    getter = attrgetter(*columns)
    return getter if len(columns) > 1 else lambda row: (getter(row),)
