"""When reorders open and close, by the row that their process folds."""

from __future__ import annotations

from contextlib import suppress
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leftfold.application.items import ReorderWatch, reorder_watch
from leftfold.domain import DomainError
from leftfold.domain.items import (
    Item,
    ItemDiscontinued,
    ItemRegistered,
    ItemRenamed,
    StockReceived,
    StockReturned,
    StockSold,
    StockWrittenOff,
)

LEVEL = 4


def registered(stock):
    return ItemRegistered(
        sku="22423", name="Cup", unit_price=Decimal(1), opening_stock=stock, reorder_level=LEVEL
    )


def sold(quantity, event_type=StockSold):
    return event_type(
        quantity=quantity, invoice="536365", unit_price=Decimal(1), country="", customer_id=None
    )


def returned(quantity):
    return sold(quantity, StockReturned)


def received(quantity):
    return StockReceived(quantity=quantity)


def lost(quantity):
    return StockWrittenOff(quantity=quantity, reason="broken")


def rows_after(events):
    """Return the row after each of the events."""
    rows, row = [], None
    for event in events:
        row = reorder_watch.evolve(row, event)
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("events", "numbers", "is_open"),
    [
        ([registered(5)], [0], [False]),
        ([registered(4)], [1], [True]),
        ([registered(6), sold(1), sold(1)], [0, 0, 1], [False, False, True]),
        ([registered(6), lost(2)], [0, 1], [False, True]),
        ([registered(5), sold(1), sold(1), lost(1)], [0, 1, 1, 1], [False, True, True, True]),
        ([registered(4), received(1)], [1, 1], [True, False]),
        ([registered(2), received(2)], [1, 2], [True, True]),
        ([registered(2), received(1), received(2)], [1, 2, 2], [True, True, False]),
        ([registered(5), received(1)], [0, 0], [False, False]),
        ([registered(4), received(1), sold(1)], [1, 1, 2], [True, False, True]),
        ([registered(4), returned(9)], [1, 1], [True, True]),
        ([registered(4), returned(9), sold(9)], [1, 1, 1], [True, True, True]),
        ([registered(4), returned(9), received(1)], [1, 1, 1], [True, True, False]),
        ([registered(4), ItemDiscontinued()], [1, 1], [True, True]),
        ([registered(5), ItemDiscontinued(), lost(3)], [0, 0, 0], [False, False, False]),
    ],
    ids=[
        "none above the level",
        "one at the level, when it is registered",
        "one when a sale reaches the level",
        "one when a loss reaches the level",
        "one at a time",
        "closed by a delivery",
        "the next one when a delivery is too small",
        "closed by the second delivery",
        "a delivery without a reorder opens none",
        "the next one when the level is reached again",
        "a return closes none",
        "none beside one that stayed open",
        "closed by a delivery that was no longer needed",
        "a discontinued item's stays open",
        "none for a discontinued item",
    ],
)
def test_reorders_open_and_close(events, numbers, is_open):
    rows = rows_after(events)
    assert [row.number for row in rows] == numbers
    assert [row.is_open for row in rows] == is_open


def test_the_row_tells_the_items_stock():
    assert rows_after([registered(9), sold(3), returned(1), ItemDiscontinued()])[-1] == (
        ReorderWatch("22423", 7, LEVEL, discontinued=True, number=0, is_open=False)
    )


def test_other_events_are_not_read():
    assert ItemRenamed not in reorder_watch.event_types


quantities = st.integers(1, 9)
moves = st.one_of(
    st.tuples(st.just("sell"), quantities, st.just("536365")),
    st.tuples(st.just("take_back"), quantities, st.just("536365")),
    st.tuples(st.just("receive"), quantities),
    st.tuples(st.just("write_off"), quantities, st.just("broken")),
    st.tuples(st.just("discontinue")),
)


@given(st.integers(0, 12), st.lists(moves, max_size=25))
def test_a_reorder_opens_when_it_comes_to_be_needed_or_a_delivery_was_too_small(stock, moves):
    item = Item.register("22423", "Cup", Decimal(1), stock, LEVEL)
    for name, *arguments in moves:
        with suppress(DomainError):
            getattr(item, name)(*arguments)
    events = item.collect_events()

    item, number, was_needed, is_open = None, 0, False, False
    for event, row in zip(events, rows_after(events), strict=True):
        item = event.mutate(item)
        is_closed_now = is_open and type(event) is StockReceived
        is_open = is_open and not is_closed_now
        is_needed = item.on_hand <= item.reorder_level and not item.discontinued
        if is_needed and not is_open and (is_closed_now or not was_needed):
            number, is_open = number + 1, True
        was_needed = is_needed
        assert row == ReorderWatch(
            item.sku, item.on_hand, LEVEL, item.discontinued, number, is_open
        )
