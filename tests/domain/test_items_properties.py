"""What holds for any history of an item."""

from __future__ import annotations

from contextlib import suppress
from decimal import Decimal
from typing import ClassVar

from eventsourcing.application import Application
from hypothesis import given
from hypothesis import strategies as st

from leftfold.application import EventMapper
from leftfold.domain import DomainError, project
from leftfold.domain.items import (
    Item,
    ItemRegistered,
    StockReceived,
    StockReturned,
    StockSold,
    StockWrittenOff,
)

quantities = st.integers(-1, 12)
operations = st.one_of(
    st.tuples(st.just(Item.receive), quantities),
    st.tuples(st.just(Item.sell), quantities, st.just("536365")),
    st.tuples(st.just(Item.take_back), quantities, st.just("C536365")),
    st.tuples(st.just(Item.write_off), quantities, st.just("broken")),
    st.tuples(st.just(Item.rename), st.sampled_from(["Cup", " "])),
    st.tuples(st.just(Item.reprice), st.sampled_from([Decimal(1), Decimal(-1)])),
    st.tuples(st.just(Item.discontinue)),
)


class Shop(Application):
    """A plain application of the library, with nothing of ours but the mapper."""

    env: ClassVar[dict[str, str]] = {}

    def construct_mapper(self):
        return self.factory.mapper(
            transcoder=self.construct_transcoder(), mapper_class=EventMapper.of(Item)
        )


@st.composite
def items(draw):
    """Draw an item with a random history, some of it refused."""
    item = Item.register("22423", "Cakestand", Decimal(2), draw(st.integers(0, 12)))
    for operation, *arguments in draw(st.lists(operations, max_size=15)):
        with suppress(DomainError):
            operation(item, *arguments)
        assert item.on_hand >= 0
    return item


def change(event):
    """Say what an event does to the stock, without asking its `apply`."""
    match event:
        case ItemRegistered():
            return event.opening_stock
        case StockReceived() | StockReturned():
            return event.quantity
        case StockSold() | StockWrittenOff():
            return -event.quantity
    return 0


@given(items())
def test_stock_never_falls_below_zero_and_is_the_sum_of_its_movements(item):
    stock = 0
    for event in item.collect_events():
        stock += change(event)
        assert stock >= 0
    assert item.on_hand == stock


@given(items())
def test_an_item_is_the_fold_of_its_events(item):
    assert Item.fold(item.collect_events()) == item


@given(items(), st.lists(operations, max_size=5))
def test_event_order_by_version(item, more):
    """Property 4 of the design card, before and after the events are stored."""
    recorded = item.collect_events()
    assert [event.originator_version for event in recorded] == list(range(1, len(recorded) + 1))
    shop = Shop()
    shop.events.put(recorded)
    again = shop.repository.get(item.id, projector_func=project)
    for operation, *arguments in more:
        with suppress(DomainError):
            operation(again, *arguments)
    shop.save(again)
    stored = list(shop.events.get(item.id))
    assert [event.originator_version for event in stored] == list(range(1, again.version + 1))
    assert stored[: len(recorded)] == recorded
    shop.close()
