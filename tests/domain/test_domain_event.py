from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from pydantic import ValidationError

from leftfold.domain import DomainEvent, Personal, clock
from leftfold.domain.items import Item

EAST = datetime(2026, 1, 1, 15, tzinfo=timezone(timedelta(hours=3)))
SOLD_AT = datetime(2010, 12, 1, 8, 26, tzinfo=UTC)


@pytest.fixture
def events():
    with clock.clock(lambda: EAST):
        item = Item.register("22423", "Cakestand", Decimal("12.75"), opening_stock=10)
        item.sell(2, "536365", customer_id=Personal("17850"), occurred_at=SOLD_AT)
        return list(item.collect_events())


def shown(event):
    return DomainEvent.of(event, Item.TOPIC)


def test_a_domain_event_tells_what_happened_to_whom(events):
    told = shown(events[1])
    assert told.event_type == "leftfold.item.stock_sold"
    assert told.aggregate_type == "leftfold.item"
    assert told.aggregate_id == str(Item.id_of("22423"))
    assert told.version == 2


def test_the_event_id_is_the_same_at_every_reading(events):
    assert shown(events[1]).event_id == shown(events[1].model_copy()).event_id


def test_every_event_has_its_own_id(events):
    assert shown(events[0]).event_id != shown(events[1]).event_id


def test_the_event_id_is_a_promise_of_the_storage_format(events):
    assert shown(events[1]).event_id == "7655a786-ad6c-5482-9a94-2815182e7bab"


def test_the_timestamp_is_in_utc(events):
    assert shown(events[1]).timestamp == EAST
    assert shown(events[1]).timestamp.utcoffset() == timedelta(0)


def test_the_payload_holds_the_facts_and_when_it_occurred(events):
    assert shown(events[1]).payload == {
        "invoice": "536365",
        "quantity": 2,
        "unit_price": Decimal("12.75"),
        "country": "",
        "customer_id": "17850",
        "occurred_at": SOLD_AT,
    }


def test_a_domain_event_is_frozen(events):
    with pytest.raises(ValidationError, match="frozen"):
        shown(events[0]).version = 7


def test_a_domain_event_comes_back_from_json(events):
    told = shown(events[0])
    again = DomainEvent.model_validate_json(told.model_dump_json())
    assert (again.event_id, again.timestamp, again.version) == (
        told.event_id,
        told.timestamp,
        told.version,
    )
