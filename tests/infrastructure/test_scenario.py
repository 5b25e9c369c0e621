"""Scenarios pass when they should, and fail when they should."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from leftfold.domain.items import (
    InsufficientStock,
    Item,
    ItemError,
    ItemRegistered,
    ItemRenamed,
    StockReceived,
    StockWrittenOff,
)
from leftfold.infrastructure.testing import FIRST_MOMENT, scenario

REGISTERED = ItemRegistered(
    sku="A", name="LANTERN", unit_price=Decimal(1), opening_stock=5, reorder_level=0
)
LOST = StockWrittenOff(quantity=2, reason="damaged")


def test_the_expected_events_pass():
    scenario(Item).given(REGISTERED).when(lambda item: item.write_off(2, "damaged")).then(LOST)


@pytest.mark.parametrize(
    "expected",
    [(), (StockWrittenOff(quantity=3, reason="damaged"),), (ItemRenamed(name="x"),), (LOST, LOST)],
)
def test_other_events_fail(expected):
    done = scenario(Item).given(REGISTERED).when(lambda item: item.write_off(2, "damaged"))
    with pytest.raises(AssertionError, match="expected"):
        done.then(*expected)


def test_a_new_aggregate_is_what_the_action_returns():
    made = scenario(Item).when(lambda _: Item.register("A", "LANTERN", Decimal(1), 5))
    made.then(REGISTERED).then_state(on_hand=5, discontinued=False)


def test_the_expected_refusal_passes_by_facts_or_by_class():
    done = scenario(Item).given(REGISTERED).when(lambda item: item.write_off(6, "damaged"))
    done.then_refused(InsufficientStock("A", 6, 5)).then_refused(ItemError)


def test_another_refusal_fails():
    done = scenario(Item).given(REGISTERED).when(lambda item: item.write_off(6, "damaged"))
    with pytest.raises(AssertionError):
        done.then_refused(InsufficientStock("A", 6, 4))
    with pytest.raises(AssertionError, match="refused"):
        done.then(LOST)


def test_no_refusal_fails_where_one_is_expected():
    done = scenario(Item).given(REGISTERED).when(lambda item: item.write_off(1, "damaged"))
    with pytest.raises(AssertionError):
        done.then_refused(InsufficientStock)


def test_another_state_fails():
    with pytest.raises(AssertionError, match="on_hand"):
        scenario(Item).given(REGISTERED).then_state(on_hand=6)


def test_the_time_of_an_event_counts_where_it_is_given():
    at = datetime(2020, 2, 2, tzinfo=UTC)
    done = scenario(Item).given(REGISTERED).when(lambda item: item.receive(1, at))
    done.then(StockReceived(quantity=1)).then(StockReceived(quantity=1, occurred_at=at))
    with pytest.raises(AssertionError):
        done.then(StockReceived(quantity=1, occurred_at=FIRST_MOMENT))


def test_an_example_serves_in_several_scenarios():
    for key in ("one", "two"):
        scenario(Item, key).given(REGISTERED, LOST).then_state(on_hand=3)
    assert REGISTERED.originator_version == 0


def test_events_that_begin_nothing_are_no_beginning():
    with pytest.raises(AssertionError, match="StockWrittenOff begins no Item: give that first"):
        scenario(Item).given(LOST)


def test_an_action_on_an_aggregate_that_is_not_there_says_so():
    with pytest.raises(AssertionError, match="there is no Item yet"):
        scenario(Item).when(lambda item: item.write_off(2, "damaged"))
    with pytest.raises(AttributeError, match="'int' object"):
        scenario(Item).when(lambda _: (1).nothing)


def test_a_refusal_that_is_not_there_is_told_by_its_name():
    done = scenario(Item).given(REGISTERED).when(lambda item: item.write_off(2, "damaged"))
    with pytest.raises(AssertionError, match="expected InsufficientStock, got StockWrittenOff"):
        done.then_refused(InsufficientStock)
