"""Reorders: what of an item they depend on, and the process that opens and closes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from leftfold.application.items.views import begun
from leftfold.application.process import Process
from leftfold.application.projection import Projection
from leftfold.domain import Event
from leftfold.domain.items import (
    ItemDiscontinued,
    ItemRegistered,
    NeedsReorder,
    Reorder,
    StockReceived,
    StockReturned,
    StockSold,
    StockWrittenOff,
)


@dataclass(frozen=True, slots=True)
class ReorderWatch:
    """An item's stock, in pieces, and how many reorders of it were opened; one at a time is open.

    A reorder is open whenever the item needs one, and from then on until stock is received.
    """

    sku: str
    on_hand: int
    reorder_level: int
    discontinued: bool
    number: int
    is_open: bool


reorder_watch = Projection("reorder_watch", version=1, row=ReorderWatch)

_NEEDS_REORDER = NeedsReorder()


@reorder_watch.on(ItemRegistered)
def _registered(_: ReorderWatch | None, event: ItemRegistered) -> ReorderWatch:
    return _watched(
        ReorderWatch(
            sku=event.sku,
            on_hand=event.opening_stock,
            reorder_level=event.reorder_level,
            discontinued=False,
            number=0,
            is_open=False,
        )
    )


@reorder_watch.on(StockReceived)
def _received(row: ReorderWatch | None, event: StockReceived) -> ReorderWatch:
    row = begun(row)
    # Too small a delivery opens the next reorder.
    return _watched(replace(row, on_hand=row.on_hand + event.quantity, is_open=False))


@reorder_watch.on(StockSold)
def _sold(row: ReorderWatch | None, event: StockSold) -> ReorderWatch:
    row = begun(row)
    return _watched(replace(row, on_hand=row.on_hand - event.quantity))


@reorder_watch.on(StockReturned)
def _returned(row: ReorderWatch | None, event: StockReturned) -> ReorderWatch:
    row = begun(row)
    return _watched(replace(row, on_hand=row.on_hand + event.quantity))


@reorder_watch.on(StockWrittenOff)
def _written_off(row: ReorderWatch | None, event: StockWrittenOff) -> ReorderWatch:
    row = begun(row)
    return _watched(replace(row, on_hand=row.on_hand - event.quantity))


@reorder_watch.on(ItemDiscontinued)
def _discontinued(row: ReorderWatch | None, _: ItemDiscontinued) -> ReorderWatch:
    return replace(begun(row), discontinued=True)


def _watched(row: ReorderWatch) -> ReorderWatch:
    """Open a reorder if the item needs one and none is open."""
    if row.is_open or not _NEEDS_REORDER.is_satisfied_by(row):
        return row
    return replace(row, number=row.number + 1, is_open=True)


class ReorderProcess(Process):
    """Opens reorders of items, and closes them when stock is received."""

    aggregates = (Reorder,)
    projection = reorder_watch

    def react(self, before: ReorderWatch | None, after: ReorderWatch | None, event: Event) -> None:
        row = begun(after)
        if before is not None and before.is_open and isinstance(event, StockReceived):
            key = Reorder.key_of(before.sku, before.number)
            reorder = self.repository.load(Reorder, Reorder.id_of(key))
            reorder.close(event.quantity, event.occurred_at)
            self.repository.save(reorder)
        if row.number > (before.number if before else 0):
            reorder = Reorder.open(
                row.sku, row.number, row.on_hand, row.reorder_level, event.occurred_at
            )
            self.repository.save(reorder)
