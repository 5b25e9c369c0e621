"""What query services read: views that have seen enough, and streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from uuid import UUID

from leftfold.application import EventMapper, InvalidModelError, Page, Projection, ValidationFailed
from leftfold.application.bus import current_patience
from leftfold.application.errors import ViewBuilding
from leftfold.application.planning import Plan, plan
from leftfold.application.ports import Access, Order, Seek, Store
from leftfold.application.reading import (
    ViewOf,
    check_order,
    current_after,
    current_read,
    parse_order,
    read_cursor,
    write_cursor,
)
from leftfold.domain import (
    ALWAYS,
    Aggregate,
    DomainEvent,
    Event,
    LeftfoldError,
    Specification,
)
from leftfold.domain.specification.values import MAX_INTEGER
from leftfold.infrastructure.follower import Follower

CHUNK = 1_000
"""Rows read at a time where Python has to look at each."""
EVERYTHING = Plan(ALWAYS, ALWAYS)

T = TypeVar("T")
R = TypeVar("R")


class FollowedViews:
    """Views of a store, each kept up to date by a follower of this runtime."""

    def __init__(
        self,
        store: Store,
        follower: Follower,
        access: Access,
        timeout: float,
    ) -> None:
        """Wait up to `timeout` seconds for a view to see what a query asks for."""
        self._store = store
        self._follower = follower
        self._access = access
        self._timeout = timeout

    async def get(self, projection: ViewOf[R], key: str) -> R | None:
        assert isinstance(projection, Projection)  # noqa: S101 - there is nothing else
        return await self._read(projection, self._store.views.get, projection, key)

    async def rows(
        self,
        projection: Projection[R],
        order: Order | None = None,
        limit: int | None = None,
        where: Specification[R] = ALWAYS,
    ) -> tuple[R, ...]:
        _check_limit(projection, limit)
        if order is not None:
            check_order(projection, order.column)
        planned = _planned(projection, where)
        found = await self._find(projection, order, limit, None, planned)
        return tuple(row for _, row in found)

    async def page(
        self,
        projection: Projection[R],
        order: str,
        limit: int,
        cursor: str | None = None,
        where: Specification[R] = ALWAYS,
    ) -> Page[R]:
        _check_limit(projection, limit)
        by = parse_order(projection, order)
        seek = read_cursor(projection, by, cursor) if cursor is not None else None
        planned = _planned(projection, where)
        found = await self._find(projection, by, limit + 1, seek, planned)
        shown, is_last = found[:limit], len(found) <= limit
        after = None if is_last else write_cursor(projection, by, *shown[-1])
        return Page(tuple(row for _, row in shown), after)

    async def count(self, projection: Projection[R], where: Specification[R] = ALWAYS) -> int:
        planned = _planned(projection, where)
        if planned.rest != ALWAYS:
            return len(await self._find(projection, None, None, None, planned))
        counted: int = await self._read(
            projection, self._store.views.count, projection, planned.sql
        )
        return counted

    async def _find(
        self,
        projection: Projection[R],
        order: Order | None,
        limit: int | None,
        seek: Seek | None,
        planned: Plan,
    ) -> list[tuple[str, R]]:
        """Find rows: what the database could not tell is asked of each row that it gave."""
        select = self._store.views.select
        if planned.rest == ALWAYS:
            return await self._read(projection, select, projection, order, limit, seek, planned.sql)
        found: list[tuple[str, R]] = []
        while limit is None or len(found) < limit:
            wanted = None if order is None else CHUNK
            rows = await self._read(
                projection, select, projection, order, wanted, seek, planned.sql
            )
            found += [(key, row) for key, row in rows if planned.rest.is_satisfied_by(row)]
            if order is None or len(rows) < CHUNK:
                break
            key, row = rows[-1]
            seek = Seek(getattr(row, order.column), key)
        return found[:limit]

    async def _read(self, projection: Projection[Any], function: Callable[..., T], *args: Any) -> T:
        reader = self._follower.readers.get(projection.table)
        if reader is None:
            raise InvalidModelError(f"{projection.table} is no projection of this model")
        if not reader.checkpoint.is_built:
            raise ViewBuilding(projection.name, reader.position, reader.head)
        after = current_after.get()
        if after is not None:
            patience = current_patience.get()
            seconds = self._timeout
            if patience is not None and patience.timeout is not None:
                seconds = patience.timeout
            follower, read = self._follower, self._access.read
            behind = await follower.wait_for([reader], after.position, seconds)
            behind = behind or await follower.put_aside([reader], [after], read)
            if behind is not None and patience is None:
                raise behind
            if behind is not None and patience is not None:
                patience.lag = max(patience.lag, behind.lag)
        read_at = current_read.get()
        if read_at is not None:
            read_at.note(reader.position)
        return await self._access.read(function, *args)


def _check_limit(projection: Projection[Any], limit: int | None) -> None:
    if limit is not None and not 0 < limit < MAX_INTEGER:
        reason = "is below 1" if limit < 1 else "is more than a database can count"
        raise ValidationFailed(projection.name, (("limit", reason),))


def _planned(projection: Projection[Any], where: Specification[Any]) -> Plan:
    if where is ALWAYS:
        return EVERYTHING
    try:
        return plan(where.bind(projection.row))
    except LeftfoldError as error:
        raise ValidationFailed(projection.name, (("where", str(error)),)) from None


class StoredHistories:
    """Streams of a store."""

    def __init__(self, store: Store, mapper: EventMapper, access: Access) -> None:
        """Read streams and decode them."""
        self._store = store
        self._mapper = mapper
        self._access = access

    async def events(self, aggregate_id: UUID) -> tuple[Event, ...]:
        def read() -> tuple[Event, ...]:
            streams = self._store.log.streams([aggregate_id])
            return tuple(self._mapper.decode_all(streams.get(aggregate_id, ())))

        read_at = current_read.get()
        if read_at is not None:
            read_at.note(await self._access.read(self._store.log.head))
        return await self._access.read(read)

    async def history(
        self, aggregate_type: type[Aggregate], aggregate_id: UUID
    ) -> tuple[DomainEvent, ...]:
        events = await self.events(aggregate_id)
        return tuple(DomainEvent.of(event, aggregate_type.TOPIC) for event in events)
