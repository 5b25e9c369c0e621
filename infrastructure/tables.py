"""Tables of views: columns derived from row types, and the statements on them.

SQLAlchemy Core writes the SQL; it never connects. The statements run on the eventsourcing
library's own connections, so that events, rows and checkpoints share one transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import Any, Generic, TypeAlias, TypeVar
from uuid import UUID

import sqlalchemy as sa
from pydantic_core import to_json
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from leftfold.application import Projection
from leftfold.application.ports import Order, Seek
from leftfold.domain import ALWAYS, Personal, Specification
from leftfold.domain.personal import Keys
from leftfold.domain.specification.values import MAX_DECIMALS
from leftfold.infrastructure.rows import (
    CHECKS,
    Column,
    RowShape,
    aware,
    describe,
    scaled,
)
from leftfold.infrastructure.where import Conditions, form_of

R = TypeVar("R")

LONGEST_NAME = 63
"""Bytes that PostgreSQL knows of a name."""
STATEMENTS = 200
"""Statements that a view remembers: one for each form of question."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

SQLITE: sa.Dialect = sqlite.dialect(paramstyle="named")
POSTGRES: sa.Dialect = postgresql.dialect(paramstyle="pyformat")  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped


@dataclass(frozen=True)
class Statement:
    """SQL text for a driver, and the values it is run with."""

    sql: str
    parameters: Mapping[str, object]

    def given(self, values: Mapping[str, object]) -> Statement:
        """Return it with these values."""
        return Statement(self.sql, {**self.parameters, **values})


@dataclass(frozen=True)
class _Kind:
    """How values of a Python type are kept: the column's type, the way out, the way people see it.

    `None` means that the driver's own is right.
    """

    column: sa.types.TypeEngine[Any]
    decode: Callable[[Any], object] | None = None
    display: Callable[[sa.ColumnElement[Any]], sa.ColumnElement[Any]] | None = None


def unscaled(number: int) -> Decimal:
    """Return the Decimal of a whole number of millionths, with no needless zeros."""
    value = Decimal(number).scaleb(-MAX_DECIMALS).normalize()
    return value if value.as_tuple().exponent <= 0 else value.quantize(Decimal(1))  # type: ignore[operator]  # finite, so a number


def microseconds(moment: datetime) -> int:
    """Return a moment as microseconds since 1970 (UTC). Raises `ValueError` without a zone."""
    return (aware(moment) - EPOCH) // MICROSECOND


def _iso_time(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.func.strftime(
        sa.literal_column("'%Y-%m-%dT%H:%M:%fZ'"),
        column / sa.literal_column("1000000.0"),
        sa.literal_column("'unixepoch'"),
    )


_SQLITE_ENCODERS: Mapping[type, Callable[[Any], Any]] = {
    **CHECKS,
    Decimal: scaled,
    datetime: microseconds,
    date: date.isoformat,
    UUID: lambda value: value.hex,
}
_SQLITE_KINDS: Mapping[type, _Kind] = {
    int: _Kind(sa.BigInteger()),
    Decimal: _Kind(
        sa.BigInteger(), unscaled, lambda column: column / sa.literal_column("1000000.0")
    ),
    float: _Kind(sa.Float()),
    str: _Kind(sa.Text()),
    bool: _Kind(sa.Boolean(), bool),
    datetime: _Kind(sa.BigInteger(), lambda n: EPOCH + timedelta(microseconds=n), _iso_time),
    date: _Kind(sa.Text(), date.fromisoformat),
    UUID: _Kind(sa.Text(), UUID),
}
_POSTGRES_ENCODERS: Mapping[type, Callable[[Any], Any]] = {
    **CHECKS,
    # JSON has no room for the seconds of an offset, which old local times have.
    datetime: lambda moment: aware(moment).astimezone(UTC),
}
_POSTGRES_KINDS: Mapping[type, _Kind] = {
    int: _Kind(sa.BigInteger()),
    Decimal: _Kind(sa.Numeric()),
    float: _Kind(sa.Double()),
    str: _Kind(sa.Text(collation="C")),
    bool: _Kind(sa.Boolean()),
    datetime: _Kind(sa.DateTime(timezone=True), lambda at: at.astimezone(UTC)),
    date: _Kind(sa.Date()),
    UUID: _Kind(sa.Uuid()),
}


Encoded: TypeAlias = list[tuple[Any, list[object]]]
"""Rows with their values as a table keeps them: the key, the columns, whether it is a member."""


class _After(Enum):
    """What the row that a query goes on after has in the order's column."""

    VALUE = 1
    ABSENT = 2


class ViewTable(Generic[R]):
    """One projection's table on one database: its definition, its codec, its statements.

    Raises `InvalidModelError` for a row type that has no columns.
    """

    def __init__(
        self, projection: Projection[R], dialect: sa.Dialect, keys: Keys | None = None
    ) -> None:
        """Derive the table from the projection's row type."""
        is_sqlite = dialect is SQLITE
        kinds = _SQLITE_KINDS if is_sqlite else _POSTGRES_KINDS
        self.projection = projection
        self.dialect = dialect
        self._enums: set[str] = set()
        self._shape = RowShape(projection, _SQLITE_ENCODERS if is_sqlite else _POSTGRES_ENCODERS)
        key = sa.Column("key", sa.Text(collation=None if is_sqlite else "C"), primary_key=True)
        columns: list[sa.Column[Any]] = []
        shown: list[sa.ColumnElement[Any]] = []
        self._decoders: list[tuple[int, Callable[[Any], object]]] = []
        for index, field in enumerate(self._shape.columns):
            kind = kinds[field.stored_type]
            column = sa.Column(field.name, kind.column, nullable=field.is_optional)
            columns.append(column)
            shown.append((kind.display(column) if kind.display else column).label(field.name))
            if issubclass(field.python_type, Enum):
                self._enums.add(field.name)
            decode = _decoder(field, kind, keys)
            if decode:
                self._decoders.append((index, decode))
        member = sa.Column("member", sa.Boolean, nullable=False)
        self.table = sa.Table(
            projection.table, sa.MetaData(), key, *columns, member, sqlite_with_rowid=False
        )
        named = {name: self.table.c[name] for name in projection.columns}
        self._conditions = Conditions(named, self._constant, is_sqlite=is_sqlite)
        self._written = lru_cache(STATEMENTS)(self._write_select)
        self._counting = lru_cache(STATEMENTS)(self._write_count)
        self._shown = sa.select(key, *shown).where(self.table.c.member)

    @cached_property
    def description(self) -> str:
        """The columns as text, whatever the database; stored, to notice a changed row type."""
        return describe(self._shape.columns)

    @cached_property
    def definition(self) -> str:
        """The statement that makes the table."""
        return self._text(CreateTable(self.table, if_not_exists=True))

    @cached_property
    def member_view(self) -> str:
        """The statement that makes a SQL view of the members, for people."""
        query = self._shown.compile(dialect=self.dialect, compile_kwargs={"literal_binds": True})
        return f'CREATE VIEW "{self.projection.name}" AS {query}'

    @cached_property
    def select_by_key(self) -> str:
        """The beginning of a query for rows by their keys: the key, then the row's columns."""
        names = ", ".join(f'"{name}"' for name in self.projection.columns)
        return f'SELECT key, {names} FROM "{self.table.name}" WHERE key '

    @cached_property
    def delete_by_key(self) -> str:
        """The beginning of a statement that deletes rows by their keys."""
        return f'DELETE FROM "{self.table.name}" WHERE key '

    @cached_property
    def into(self) -> str:
        """Where an INSERT of rows as `encode` makes them puts them."""
        return f'"{self.table.name}"'

    @cached_property
    def on_conflict(self) -> str:
        """The end of an INSERT that changes the rows which are there."""
        changed = ", ".join(
            f'"{c.name}" = excluded."{c.name}"' for c in self.table.c if not c.primary_key
        )
        return f" ON CONFLICT (key) DO UPDATE SET {changed}"

    @cached_property
    def upsert_json(self) -> str:
        """PostgreSQL: insert or change rows, given as one JSON array of objects."""
        names = ", ".join(f'"{c.name}"' for c in self.table.c)
        kinds = ", ".join(
            f'"{c.name}" {c.type.compile(dialect=self.dialect)}' for c in self.table.c
        )
        return (
            f'INSERT INTO "{self.table.name}" ({names}) '
            f"SELECT {names} FROM json_to_recordset(%s::json) AS r ({kinds}){self.on_conflict}"
        )

    @cached_property
    def copy(self) -> str:
        """PostgreSQL: insert rows that are not there, given as `encode` makes them."""
        names = ", ".join(f'"{c.name}"' for c in self.table.c)
        return f'COPY "{self.table.name}" ({names}) FROM STDIN'

    @cached_property
    def differing(self) -> str:
        """The condition that rows `a` and `b` of such a table are not the same."""
        sign = "IS NOT" if self.dialect is SQLITE else "IS DISTINCT FROM"
        names = (*self.projection.columns, "member")
        return " OR ".join(f'a."{name}" {sign} b."{name}"' for name in names)

    def comparison(self, other: ViewTable[Any]) -> str:
        """The query for the numbers of rows: the same, changed, only here, only there."""
        mine, theirs = f'"{self.table.name}"', f'"{other.table.name}"'
        differing = self.differing
        return (
            f"SELECT count(b.key) - count(CASE WHEN b.key IS NOT NULL AND ({differing}) THEN 1 END)"
            f", count(CASE WHEN b.key IS NOT NULL AND ({differing}) THEN 1 END)"
            f", count(*) - count(b.key)"
            f", (SELECT count(*) FROM {theirs} AS b WHERE NOT EXISTS "
            f"(SELECT 1 FROM {mine} AS a WHERE a.key = b.key)) "
            f"FROM {mine} AS a LEFT JOIN {theirs} AS b ON a.key = b.key"
        )

    def replacing(self, anew: ViewTable[Any]) -> tuple[str, str]:
        """The statements that give this table the rows of another, and change no others."""
        mine, theirs = f'"{self.table.name}"', f'"{anew.table.name}"'
        names = ", ".join(f'"{c.name}"' for c in self.table.c)
        # All that differ go before any comes: two may have changed places in a unique column.
        same = f"SELECT 1 FROM {theirs} AS a WHERE a.key = b.key AND NOT ({self.differing})"
        there = f"SELECT 1 FROM {mine} AS b WHERE b.key = a.key"
        put = f"INSERT INTO {mine} ({names}) SELECT {names} FROM {theirs} AS a"
        return (
            f"DELETE FROM {mine} AS b WHERE NOT EXISTS ({same})",
            f"{put} WHERE NOT EXISTS ({there})",
        )

    def encode(self, rows: Mapping[str, R | None], known: Encoded | None = None) -> Encoded:
        """Return rows, without those that are none, with their values in the table's order.

        Of rows that a table with the same columns has encoded, only membership is told anew.
        Raises `ValueOutOfRangeError`.
        """
        shows, encode = self.projection.shows, self._shape.encode
        if known is not None:
            return [(row, [*values[:-1], shows(row)]) for row, values in known]
        return [
            (row, [key, *encode(key, row), shows(row)])
            for key, row in rows.items()
            if row is not None
        ]

    def dump(self, encoded: Encoded) -> str:
        """Return encoded rows as the JSON that `upsert_json` takes."""
        names = ("key", *self.projection.columns, "member")
        return to_json([dict(zip(names, values, strict=True)) for _, values in encoded]).decode()

    def decode(self, values: Iterable[Any]) -> R:
        """Make a row of the values of its columns."""
        fields = list(values)
        for index, decode in self._decoders:
            if fields[index] is not None:
                fields[index] = decode(fields[index])
        row: R = self.projection.row(*fields)
        return row

    def select(
        self,
        order: Order | None,
        limit: int | None,
        seek: Seek | None = None,
        where: Specification[Any] = ALWAYS,
    ) -> Statement:
        """Return the query for member rows: the key, then the row's columns."""
        form, constants = form_of(where)
        values = self._conditions.values(constants)
        after = None
        if order is not None and seek is not None:
            value = self._shape.sought(order, seek)
            after = _After.ABSENT if value is None else _After.VALUE
            values |= {"after": value, "after_key": seek.key}
        return self._written(form, order, limit, after).given(values)

    def count(self, where: Specification[Any]) -> Statement:
        """Return the query for the number of member rows."""
        form, constants = form_of(where)
        return self._counting(form).given(self._conditions.values(constants))

    @cached_property
    def indexes(self) -> dict[str, str]:
        """How the projection's indexes are made, by their names; the key ends each, for paging."""
        # Pages begin with the absent; PostgreSQL's indexes end with them unless they are told.
        is_sqlite, columns, projection = self.dialect is SQLITE, self.table.c, self.projection
        made = [
            sa.Index(
                index_name(projection, names, "index"),
                *(columns[n] if is_sqlite else columns[n].asc().nulls_first() for n in names),
                columns.key,
            )
            for names in projection.indexes
        ]
        made += (
            sa.Index(
                index_name(projection, names, "unique"), *(columns[n] for n in names), unique=True
            )
            for names in projection.unique
        )
        return {str(i.name): self._text(CreateIndex(i, if_not_exists=True)) for i in made}

    def _constant(self, name: str, value: object) -> object:
        """Return what a column holds for a specification's constant."""
        if isinstance(value, str) and name in self._enums:
            return value  # specifications know an enum's members by their values
        return self._shape.encode_one(name, value)

    def _write_select(
        self,
        form: Specification[Any],
        order: Order | None,
        limit: int | None,
        after: _After | None,
    ) -> Statement:
        table, key = self.table, self.table.c.key
        query = sa.select(key, *(table.c[name] for name in self.projection.columns))
        query = query.where(table.c.member, self._conditions.write(form))
        if order is not None:
            column = table.c[order.column]
            if after is not None:
                query = query.where(_beyond(column, key, order, after))
            direction = column.desc() if order.descending else column.asc()
            query = query.order_by(
                direction.nulls_last() if order.descending else direction.nulls_first()
            )
        query = query.order_by(key.asc())
        if limit is not None:
            # Not bound: PostgreSQL would plan anew each time, for a tenth of the rows.
            query = query.limit(sa.literal_column(str(int(limit))))
        return self._statement(query)

    def _write_count(self, form: Specification[Any]) -> Statement:
        counted = sa.select(sa.func.count()).select_from(self.table)
        return self._statement(counted.where(self.table.c.member, self._conditions.write(form)))

    def _statement(self, query: sa.Select[Any]) -> Statement:
        compiled = query.compile(dialect=self.dialect)
        return Statement(str(compiled), compiled.params)

    def _text(self, element: sa.schema.ExecutableDDLElement) -> str:
        return str(element.compile(dialect=self.dialect)).strip()


def index_name(projection: Projection[Any], columns: tuple[str, ...], kind: str) -> str:
    """Return the name of an index of columns; databases cut long ones, and so would mix them up."""
    name = "_".join((projection.table, *columns, kind))
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{projection.table}_{sha256(name.encode()).hexdigest()[:8]}_{kind}"


def _beyond(
    column: sa.Column[Any], key: sa.Column[Any], order: Order, after: _After
) -> sa.ColumnElement[bool]:
    """Say that a row comes after the one sought, which has a value in the column or has none."""
    key_beyond = key > sa.bindparam("after_key", type_=sa.Text())
    if after is _After.ABSENT:
        same = sa.and_(column.is_(None), key_beyond)
        return same if order.descending else sa.or_(column.is_not(None), same)
    value = sa.bindparam("after", type_=column.type)
    same = sa.and_(column == value, key_beyond)
    if order.descending:
        return sa.or_(column < value, column.is_(None), same)
    return sa.or_(column > value, same)


def _decoder(field: Column, kind: _Kind, keys: Keys | None) -> Callable[[Any], object] | None:
    if field.python_type is Personal:
        if keys is None:
            return Personal
        return lambda text: Personal.stored(text, keys, field.kind)
    return field.python_type if issubclass(field.python_type, Enum) else kind.decode
