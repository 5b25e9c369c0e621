"""The reading side: query services on views and histories."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any, Protocol, TypeVar
from uuid import UUID

from eventsourcing.persistence import PersistenceError
from pydantic import TypeAdapter, ValidationError

from leftfold.application.bus import Dispatch, Outcome, handle
from leftfold.application.errors import EventStoreUnavailable, ValidationFailed
from leftfold.application.messages import Handling
from leftfold.application.ports import Order, Seek
from leftfold.application.projection import Page, Projection
from leftfold.application.receipt import Receipt
from leftfold.domain import ALWAYS, Aggregate, DomainEvent, Err, Event, Specification

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
A = TypeVar("A", bound=Aggregate)


class ViewOf(Protocol[R_co]):
    """A projection, seen by who reads its rows."""

    @property
    def row(self) -> type[R_co]:
        """The rows' type."""
        ...


class Views(Protocol):
    """Reads rows of views, as new as the query's `after` asks for.

    All raise `ViewBehind` if the view does not get there in time.
    """

    async def get(self, projection: ViewOf[R], key: str) -> R | None:
        """Return the row under a key, if it is a member of the view."""
        ...

    async def rows(
        self,
        projection: Projection[R],
        order: Order | None = None,
        limit: int | None = None,
        where: Specification[R] = ALWAYS,
    ) -> tuple[R, ...]:
        """Return the member rows that satisfy `where`, in order; by key if none is given."""
        ...

    async def page(
        self,
        projection: Projection[R],
        order: str,
        limit: int,
        cursor: str | None = None,
        where: Specification[R] = ALWAYS,
    ) -> Page[R]:
        """Return a page of the member rows that satisfy `where`.

        `order` is a column's name, `-` before it for descending; `cursor` comes from the page
        before. Raises `ValidationFailed` for one that does not fit, and for a specification
        whose names or types are not those of the rows.
        """
        ...

    async def count(self, projection: Projection[R], where: Specification[R] = ALWAYS) -> int:
        """Return how many member rows satisfy `where`. Raises `ValidationFailed`, as `page`."""
        ...


class Histories(Protocol):
    """Reads the streams of aggregates."""

    async def events(self, aggregate_id: UUID) -> tuple[Event, ...]:
        """Return an aggregate's events by version; none if it does not exist."""
        ...

    async def history(
        self, aggregate_type: type[Aggregate], aggregate_id: UUID
    ) -> tuple[DomainEvent, ...]:
        """Return an aggregate's events as others see them."""
        ...


class QueryService:
    """Answers queries. A subclass yields its handlers, as a service does for commands."""

    def __init__(self, views: Views, histories: Histories) -> None:
        """Read from these views and histories."""
        self.views = views
        self.histories = histories

    def handlers(self) -> Iterable[Handling]:
        """Yield the handlers, made by `QueryType.handled_by(method)`."""
        return ()


current_after: ContextVar[Receipt | None] = ContextVar("leftfold_after", default=None)


class ReadAt:
    """Up to which position of the log an answer has seen everything, at least."""

    def __init__(self) -> None:
        self._positions: list[int] = []

    def note(self, position: int) -> None:
        """Note that something was read at a position or later."""
        self._positions.append(position)

    @property
    def position(self) -> int:
        """The lowest of all that was read; 0 if nothing was."""
        return min(self._positions, default=0)


current_read: ContextVar[ReadAt | None] = ContextVar("leftfold_read", default=None)


async def answer(dispatch: Dispatch[Any]) -> Outcome:
    """Answer a query: the innermost step of the query bus."""
    token = current_after.set(dispatch.after)
    try:
        return await handle(dispatch)
    except PersistenceError as error:
        return Err(EventStoreUnavailable(str(error)))
    finally:
        current_after.reset(token)


def as_of(events: Iterable[Event], at: datetime) -> list[Event]:
    """Return the longest prefix of a stream whose every event occurred at or before a moment."""
    prefix: list[Event] = []
    for event in events:
        if event.occurred_at > at:
            break
        prefix.append(event)
    return prefix


def parse_order(projection: Projection[Any], order: str) -> Order:
    """Read `"revenue"` or `"-revenue"`. Raises `ValidationFailed`, as `check_order`."""
    column = order.removeprefix("-")
    check_order(projection, column)
    return Order(column, order.startswith("-"))


def check_order(projection: Projection[Any], column: str) -> None:
    """Refuse an unknown column, and personal data: sealed it has no order, and cursors show values.

    Raises `ValidationFailed`.
    """
    if column not in projection.ordering:
        known = ", ".join(projection.ordering)
        raise ValidationFailed(projection.name, (("order", f"{column!r} is none of {known}"),))


def write_cursor(projection: Projection[R], order: Order, key: str, row: R) -> str:
    """Return a cursor that stands after this row."""
    value = getattr(row, order.column)
    document = [
        _order_text(order),
        key,
        _column_type(projection, order).dump_python(value, mode="json"),
    ]
    return base64.urlsafe_b64encode(json.dumps(document).encode()).decode()


def read_cursor(projection: Projection[Any], order: Order, cursor: str) -> Seek:
    """Read a cursor. Raises `ValidationFailed` for one of another order, or a damaged one."""
    try:
        document = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        text, key, value = document
        if text != _order_text(order):
            raise ValueError(text)  # noqa: TRY301 - one way out for every fault
        return Seek(_storable(_column_type(projection, order).validate_python(value)), _text(key))
    except (ValueError, TypeError, RecursionError, binascii.Error, ValidationError):
        raise ValidationFailed(
            projection.name, (("cursor", "is not a cursor of this order"),)
        ) from None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    _storable(value)
    return value


def _storable(value: object) -> object:
    """Pass a value that databases can look for. Raises `ValueError`."""
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair cannot be
        if "\0" in value:
            raise ValueError(value)
    return value


def _order_text(order: Order) -> str:
    return f"-{order.column}" if order.descending else order.column


def _column_type(projection: Projection[Any], order: Order) -> TypeAdapter[Any]:
    return _adapter(projection.column_types[order.column])


@lru_cache
def _adapter(column_type: Any) -> TypeAdapter[Any]:
    return TypeAdapter(column_type)
