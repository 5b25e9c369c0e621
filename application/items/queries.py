"""The queries about items, and the service that answers them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import Field

from leftfold.application.items.commands import Moment, Sku
from leftfold.application.items.views import ItemRow, item_stock
from leftfold.application.messages import Handling, Query
from leftfold.application.projection import Page
from leftfold.application.reading import QueryService, as_of
from leftfold.domain import ALWAYS, DomainEvent, Err, Ok, Result, Specification
from leftfold.domain.items import Item, ItemError, ItemNotFound


class GetItem(Query[ItemRow, ItemNotFound]):
    """The row of one item."""

    sku: Sku


class FindItems(Query[Page[ItemRow], ItemError]):
    """A page of items. `order` is a column's name, `-` before it for descending.

    From outside, `where` is a sentence (`"on_hand < 10"`) or a JSON document.
    """

    where: Specification[ItemRow] = ALWAYS
    order: str = "sku"
    limit: Annotated[int, Field(ge=1, le=10_000)] = 50
    """Rows a page."""
    cursor: str | None = None
    """`next` of the page before."""


class Count(Query[int, ItemError]):
    """How many items there are that satisfy a specification."""

    where: Specification[ItemRow] = ALWAYS


class ItemHistory(Query[tuple[DomainEvent, ...], ItemNotFound]):
    """All that happened to one item, in order."""

    sku: Sku


@dataclass(frozen=True, slots=True)
class ItemState:
    """An item as it was at some version."""

    sku: str
    name: str
    unit_price: Decimal
    on_hand: int
    reorder_level: int
    discontinued: bool
    version: int


class ItemAsOf(Query[ItemState, ItemNotFound]):
    """An item as it was: after the longest prefix of its history with `occurred_at <= at`, or at a
    version, or both; as it is, if neither is given.
    """

    sku: Sku
    at: Moment | None = None
    version: Annotated[int, Field(ge=1)] | None = None


class ItemQueries(QueryService):
    """Answers the queries."""

    def handlers(self) -> Iterable[Handling]:
        yield GetItem.handled_by(self.get)
        yield FindItems.handled_by(self.find)
        yield Count.handled_by(self.count)
        yield ItemHistory.handled_by(self.history)
        yield ItemAsOf.handled_by(self.as_of)

    async def get(self, query: GetItem) -> Result[ItemRow, ItemNotFound]:
        row = await self.views.get(item_stock, Item.id_of(query.sku).hex)
        return Err(ItemNotFound(query.sku)) if row is None else Ok(row)

    async def find(self, query: FindItems) -> Result[Page[ItemRow], ItemError]:
        page = self.views.page(item_stock, query.order, query.limit, query.cursor, query.where)
        return Ok(await page)

    async def count(self, query: Count) -> Result[int, ItemError]:
        return Ok(await self.views.count(item_stock, query.where))

    async def history(self, query: ItemHistory) -> Result[tuple[DomainEvent, ...], ItemNotFound]:
        events = await self.histories.history(Item, Item.id_of(query.sku))
        return Ok(events) if events else Err(ItemNotFound(query.sku))

    async def as_of(self, query: ItemAsOf) -> Result[ItemState, ItemNotFound]:
        events: Any = await self.histories.events(Item.id_of(query.sku))
        if query.version is not None:
            events = events[: query.version]
        item = Item.fold(events if query.at is None else as_of(events, query.at))
        if item is None:
            return Err(ItemNotFound(query.sku))
        return Ok(
            ItemState(
                item.sku,
                item.name,
                item.unit_price,
                item.on_hand,
                item.reorder_level,
                item.discontinued,
                item.version,
            )
        )
