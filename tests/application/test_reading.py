from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leftfold.application import ValidationFailed
from leftfold.application.items import ItemRow, item_stock
from leftfold.application.ports import Order, Seek
from leftfold.application.reading import as_of, parse_order, read_cursor, write_cursor
from leftfold.domain.items import StockReceived

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ROW = ItemRow(
    sku="22423",
    name="Cakestand “Régence”",
    unit_price=Decimal("12.75"),
    reorder_level=1,
    opening_stock=10,
    on_hand=9,
    units_sold=1,
    units_returned=0,
    units_written_off=0,
    units_received=0,
    revenue=Decimal("12.750"),
    first_sale=NOON,
    last_sale=None,
    discontinued=False,
)
ORDERS = [Order(column, descending) for column in item_stock.columns for descending in (0, 1)]


def received(hours):
    return StockReceived(quantity=1, occurred_at=NOON + timedelta(hours=hours))


def history(*hours):
    return [received(hour) for hour in hours]


def encoded(document: str) -> str:
    return base64.urlsafe_b64encode(document.encode()).decode()


# The state at a moment


def test_events_at_the_moment_itself_belong_to_it():
    events = history(0, 1, 2)
    assert as_of(events, NOON + timedelta(hours=1)) == events[:2]


def test_before_the_first_event_there_is_nothing():
    assert as_of(history(1, 2), NOON) == []


def test_the_prefix_ends_at_the_first_event_that_is_later():
    """An event recorded after a later one is left out, though it occurred before."""
    events = history(0, 5, 1)
    assert as_of(events, NOON + timedelta(hours=2)) == events[:1]


@given(st.lists(st.integers(-3, 3), max_size=8), st.integers(-3, 3))
def test_the_prefix_is_the_longest_of_which_every_event_had_occurred(hours, hour):
    events, at = history(*hours), NOON + timedelta(hours=hour)
    prefixes = [events[:n] for n in range(len(events) + 1)]
    fitting = [p for p in prefixes if all(event.occurred_at <= at for event in p)]
    assert as_of(events, at) == max(fitting, key=len)


# Orders


def test_an_order_is_a_column():
    assert parse_order(item_stock, "revenue") == Order("revenue")


def test_a_minus_means_descending():
    assert parse_order(item_stock, "-revenue") == Order("revenue", descending=True)


@pytest.mark.parametrize("order", ["", "-", "--sku", "colour", "sku; drop", "SKU"])
def test_an_unknown_order_is_refused(order):
    with pytest.raises(ValidationFailed) as raised:
        parse_order(item_stock, order)
    assert raised.value.reasons[0][0] == "order"


# Cursors


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_cursor_says_after_which_row_to_go_on(order):
    cursor = write_cursor(item_stock, order, "k1", ROW)
    assert read_cursor(item_stock, order, cursor) == Seek(getattr(ROW, order.column), "k1")


@pytest.mark.parametrize("key", ["", "a\u00a0b", "\u200b", "\x1b", "\U0010ffff"])
def test_a_cursor_goes_on_after_any_key_that_a_row_may_have(key):
    cursor = write_cursor(item_stock, Order("sku"), key, ROW)
    assert read_cursor(item_stock, Order("sku"), cursor).key == key


@pytest.mark.parametrize("order", [Order("name"), Order("sku", descending=True)])
def test_a_cursor_of_another_order_is_refused(order):
    cursor = write_cursor(item_stock, Order("sku"), "k1", ROW)
    with pytest.raises(ValidationFailed):
        read_cursor(item_stock, order, cursor)


DAMAGED = {
    "empty": "",
    "not base64": "?",
    "not ascii": "é",
    "no unicode": "\ud800",
    "not json": encoded("{"),
    "not utf-8": base64.urlsafe_b64encode(b"\xff\xfe\xfd").decode(),
    "a number": encoded("17"),
    "null": encoded("null"),
    "an object": encoded('{"a":1,"b":2,"c":3}'),
    "too short": encoded('["on_hand","k1"]'),
    "too long": encoded('["on_hand","k1",9,9]'),
    "a wrong value": encoded('["on_hand","k1","many"]'),
    "a wrong key": encoded('["on_hand",7,9]'),
    "a NUL in the key": encoded('["on_hand","a\\u0000b",9]'),
    "half a pair in the key": encoded('["on_hand","\\ud800",9]'),
}


@pytest.mark.parametrize("cursor", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_cursor_is_refused(cursor):
    with pytest.raises(ValidationFailed) as raised:
        read_cursor(item_stock, Order("on_hand"), cursor)
    assert raised.value.reasons == (("cursor", "is not a cursor of this order"),)


def test_a_cursor_that_nests_deeply_is_refused():
    with pytest.raises(ValidationFailed):
        read_cursor(item_stock, Order("sku"), encoded("[" * 100_000))


@given(st.text(max_size=40))
def test_any_text_is_a_cursor_or_refused(text):
    try:
        read_cursor(item_stock, Order("sku"), text)
    except ValidationFailed as refusal:
        assert refusal.name == "item_stock"  # noqa: PT017 - either outcome is right
