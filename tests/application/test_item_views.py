"""The views beside the one of items, against that one."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leftfold.application import InvalidModelError
from leftfold.application.items import (
    DailySales,
    best_sellers,
    daily_sales,
    item_stock,
    low_stock,
)
from leftfold.domain import ALWAYS, DomainError
from leftfold.domain.items import (
    BestSeller,
    Item,
    ItemDiscontinued,
    ItemRegistered,
    NeedsReorder,
    StockSold,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
SKUS = ["22423", "85123A", "POST"]

quantities = st.integers(1, 9)
prices = st.decimals(0, 5_000, places=3)
moments = st.integers(0, 99).map(lambda hours: START + timedelta(hours=hours))
countries = st.sampled_from(["", "France", "United Kingdom"])
kinds = st.sampled_from(["sell", "sell", "take_back", "receive", "write_off", "discontinue"])
movements = st.tuples(st.sampled_from(SKUS), kinds, quantities, prices, countries, moments)
histories = st.lists(movements, max_size=25)


def move(item, kind, quantity, price, country, at):
    match kind:
        case "sell" | "take_back":
            getattr(item, kind)(quantity, "536365", price, country, occurred_at=at)
        case "receive":
            item.receive(quantity, at)
        case "write_off":
            item.write_off(quantity, "broken", at)
        case _:
            item.discontinue(at)


def events_of(history):
    items = {sku: Item.register(sku, "Cup", Decimal(1), 10, 4) for sku in SKUS}
    events = [event for item in items.values() for event in item.collect_events()]
    for sku, *movement in history:
        with suppress(DomainError):
            move(items[sku], *movement)
        events += items[sku].collect_events()
    return events


def fold(projection, events):
    return projection.fold(events, lambda _: {})


def shown(projection, events):
    return {key: row for key, row in fold(projection, events).items() if projection.shows(row)}


# Views of the same rows


@given(histories)
def test_low_stock_shows_the_items_that_need_a_reorder(history):
    events = events_of(history)
    rows = fold(item_stock, events)
    needed = {key: row for key, row in rows.items() if NeedsReorder().is_satisfied_by(row)}
    assert shown(low_stock, events) == needed
    assert all(row.on_hand <= 4 and not row.discontinued for row in needed.values())


@given(histories)
def test_best_sellers_shows_the_items_that_earned_ten_thousand(history):
    events = events_of(history)
    rows = fold(item_stock, events)
    best = {key: row for key, row in rows.items() if row.revenue >= 10_000}
    assert shown(best_sellers, events) == best


def test_a_derived_view_differs_in_name_version_specification_and_indexes():
    derived = item_stock.derive(
        "cheap", version=3, specification=BestSeller(Decimal(0)), indexes=["revenue"]
    )
    assert (derived.table, derived.indexes) == ("cheap_v3", (("revenue",),))
    assert derived.specification == BestSeller(Decimal(0))
    assert derived.row is item_stock.row
    assert derived.event_types == item_stock.event_types
    assert item_stock.specification is ALWAYS


def test_a_derived_view_has_the_key_of_its_origin():
    derived = daily_sales.derive("sales", version=1, specification=ALWAYS)
    events = events_of([("POST", "sell", 1, Decimal(1), "France", START)])
    assert set(fold(derived, events)) == {"2026-01-01 France"}


def test_what_is_said_later_is_of_one_view_alone():
    first = daily_sales.derive("first", version=1, specification=ALWAYS)
    second = first.derive("second", version=1, specification=ALWAYS)
    first.on(ItemRegistered)(lambda row, _: row)
    second.on(ItemDiscontinued)(lambda row, _: row)
    assert set(first.event_types) ^ set(second.event_types) == {ItemRegistered, ItemDiscontinued}
    assert len(daily_sales.event_types) == 2


@pytest.mark.parametrize("changes", [{"name": "Low"}, {"version": 0}, {"indexes": ["size"]}])
def test_a_bad_derived_view_is_refused(changes):
    arguments = {"name": "low", "version": 1, "specification": ALWAYS, **changes}
    with pytest.raises(InvalidModelError):
        item_stock.derive(**arguments)


# Sales by day and country


@given(histories)
def test_the_days_earn_what_the_items_earn(history):
    events = events_of(history)
    days, items = fold(daily_sales, events).values(), fold(item_stock, events).values()
    assert sum(day.revenue for day in days) == sum(item.revenue for item in items)
    assert sum(day.units for day in days) == sum(
        item.units_sold - item.units_returned for item in items
    )
    assert sum(day.sales for day in days) == sum(type(event) is StockSold for event in events)


@given(histories)
def test_each_day_and_country_has_one_row(history):
    rows = fold(daily_sales, events_of(history))
    assert rows.keys() == {f"{row.day} {row.country}" for row in rows.values()}


def test_a_row_has_the_sales_less_the_returns_of_its_day_and_country():
    next_day = START + timedelta(days=1)
    history = [
        ("22423", "sell", 3, Decimal(2), "France", START),
        ("POST", "sell", 1, Decimal("0.5"), "France", START + timedelta(hours=23)),
        ("22423", "take_back", 1, Decimal(2), "France", START),
        ("22423", "sell", 1, Decimal(2), "", START),
        ("22423", "take_back", 1, Decimal(2), "France", next_day),
    ]
    day = START.date()
    assert fold(daily_sales, events_of(history)) == {
        "2026-01-01 France": DailySales(day, "France", 2, 1, 3, Decimal("4.5")),
        "2026-01-01 ": DailySales(day, "", 1, 0, 1, Decimal(2)),
        "2026-01-02 France": DailySales(next_day.date(), "France", 0, 1, -1, Decimal(-2)),
    }


def test_a_day_is_that_of_utc():
    in_tokyo = datetime(2026, 1, 2, 8, tzinfo=timezone(timedelta(hours=9)))
    events = events_of([("POST", "sell", 1, Decimal(1), "Japan", in_tokyo)])
    (row,) = fold(daily_sales, events).values()
    assert row.day == date(2026, 1, 1)
