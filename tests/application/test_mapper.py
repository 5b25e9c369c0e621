from __future__ import annotations

import json
import traceback
from datetime import UTC, datetime
from decimal import Decimal
from typing import ClassVar
from uuid import UUID

import pytest
from eventsourcing.compressor import ZlibCompressor
from eventsourcing.persistence import Cipher, StoredEvent
from eventsourcing.utils import Environment
from hypothesis import given
from hypothesis import strategies as st

from leftfold.application import (
    EventMapper,
    InvalidModelError,
    UnknownTopicError,
    UnreadableEventError,
)
from leftfold.domain import Aggregate, Created, Event, Personal
from leftfold.domain.items import (
    Item,
    ItemDiscontinued,
    ItemRegistered,
    ItemRenamed,
    ItemRepriced,
    StockReceived,
    StockReturned,
    StockSold,
    StockWrittenOff,
)

MAPPER = EventMapper.of(Item)(transcoder=None)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ID = Item.id_of("22423")

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
amounts = st.integers(1, 10**9)
prices = st.decimals(0, 10**9, places=3)
moments = st.datetimes(timezones=st.just(UTC))
movements = {
    "invoice": texts,
    "quantity": amounts,
    "unit_price": prices,
    "country": texts,
    "customer_id": st.none() | st.builds(Personal, texts),
    "occurred_at": moments,
}
STRATEGIES = {
    ItemRegistered: st.builds(
        ItemRegistered,
        sku=texts,
        name=texts,
        unit_price=prices,
        opening_stock=amounts,
        reorder_level=amounts,
        occurred_at=moments,
    ),
    ItemRenamed: st.builds(ItemRenamed, name=texts, occurred_at=moments),
    ItemRepriced: st.builds(ItemRepriced, unit_price=prices, occurred_at=moments),
    StockReceived: st.builds(StockReceived, quantity=amounts, occurred_at=moments),
    StockSold: st.builds(StockSold, **movements),
    StockReturned: st.builds(StockReturned, **movements),
    StockWrittenOff: st.builds(
        StockWrittenOff, quantity=amounts, reason=texts, occurred_at=moments
    ),
    ItemDiscontinued: st.builds(ItemDiscontinued, occurred_at=moments),
}
events = st.one_of(*STRATEGIES.values())


class Begun(Created, topic="test.thing.begun"):
    def apply(self, thing):
        thing.size = 0


class GrownV1(Event, topic="test.thing.grown"):
    by: int

    def apply(self, thing):
        thing.size += self.by


class Grown(Event, topic="test.thing.grown"):
    """Since version 2 it says how much in millimetres."""

    class_version: ClassVar[int] = 2

    millimetres: int

    def apply(self, thing):
        thing.size += self.millimetres

    @staticmethod
    def upcast_v1_v2(state):
        state["millimetres"] = state.pop("by") * 10


class ThingV1(Aggregate, topic="test.thing", events=(GrownV1,)):
    size: int


class Thing(Aggregate, topic="test.thing", events=(Begun, Grown)):
    size: int


class Scrambling(Cipher):
    """The library's interface for ciphers; its own ones need packages that we do not."""

    def __init__(self, environment):
        self.key = int(environment.get("CIPHER_KEY"))

    def encrypt(self, plaintext):
        return b"!" + bytes(byte ^ self.key for byte in plaintext)

    def decrypt(self, ciphertext):
        assert ciphertext[:1] == b"!"
        return bytes(byte ^ self.key for byte in ciphertext[1:])


OLD = EventMapper.of(ThingV1)(transcoder=None)
NEW = EventMapper.of(Thing)(transcoder=None)


def stamped(event, version=2):
    event.stamp(ID, version, NOON)
    return event


def stored(topic="leftfold.item.renamed", state=b"{}"):
    return StoredEvent(ID, 2, topic, state)


@given(events, st.integers(1, 10**6), moments)
def test_every_event_of_an_item_comes_back_as_it_was(event, version, recorded_at):
    event.stamp(ID, version, recorded_at)
    again = MAPPER.to_domain_event(MAPPER.to_stored_event(event))
    assert type(again) is type(event)
    assert again == event
    assert again.__dict__ == event.__dict__


def test_the_property_above_draws_every_event_of_an_item():
    assert set(STRATEGIES) == set(Item.EVENTS)


def test_the_stored_form_is_json_and_leaves_out_what_the_columns_hold():
    event = stamped(StockReceived(quantity=5))
    found = MAPPER.to_stored_event(event)
    assert (found.originator_id, found.originator_version) == (ID, 2)
    assert found.topic == "leftfold.item.stock_received"
    assert json.loads(found.state) == {
        "timestamp": "2026-01-01T12:00:00Z",
        "occurred_at": "2026-01-01T12:00:00Z",
        "quantity": 5,
    }


def test_a_stored_event_that_an_earlier_release_wrote_can_be_read():
    state = (
        b'{"timestamp":"2026-01-01T12:00:00Z","occurred_at":"2010-12-01T08:26:00Z",'
        b'"invoice":"536365","quantity":6,"unit_price":"2.55","country":"United Kingdom",'
        b'"customer_id":"17850"}'
    )
    sold = MAPPER.to_domain_event(stored("leftfold.item.stock_sold", state))
    assert sold.unit_price == Decimal("2.55")
    assert sold.customer_id == Personal("17850")
    assert sold.occurred_at == datetime(2010, 12, 1, 8, 26, tzinfo=UTC)


def test_a_price_keeps_its_digits():
    event = stamped(ItemRepriced(unit_price=Decimal("2.550")))
    assert str(MAPPER.to_domain_event(MAPPER.to_stored_event(event)).unit_price) == "2.550"


def test_an_aggregate_id_that_was_stored_as_text_is_read_as_uuid():
    found = MAPPER.to_stored_event(stamped(ItemDiscontinued()))
    text = StoredEvent(str(ID), 2, found.topic, found.state)
    assert MAPPER.to_domain_event(text).originator_id == ID


def test_the_first_class_version_is_not_written():
    assert b"class_version" not in OLD.to_stored_event(stamped(GrownV1(by=1))).state


def test_a_higher_class_version_is_written():
    assert (
        json.loads(NEW.to_stored_event(stamped(Grown(millimetres=1))).state)["class_version"] == 2
    )


def test_an_event_of_a_higher_class_version_comes_back():
    event = stamped(Grown(millimetres=1))
    assert NEW.to_domain_event(NEW.to_stored_event(event)) == event


def test_an_event_of_an_older_class_version_is_upcast():
    old = OLD.to_stored_event(stamped(GrownV1(by=3)))
    assert NEW.to_domain_event(old) == stamped(Grown(millimetres=30))


def test_an_event_of_a_newer_class_version_cannot_be_read():
    newer = stored("test.thing.grown", b'{"millimetres":1,"class_version":3}')
    with pytest.raises(UnreadableEventError, match="stored as version 3, known up to 2"):
        NEW.to_domain_event(newer)


def test_an_unknown_topic_cannot_be_read():
    with pytest.raises(UnknownTopicError) as raised:
        MAPPER.to_domain_event(stored("os:system"))
    assert raised.value == UnknownTopicError("os:system")


def test_an_event_of_another_model_is_not_written():
    with pytest.raises(UnknownTopicError, match=r"test\.thing\.grown"):
        MAPPER.to_stored_event(stamped(Grown(millimetres=1)))


def test_an_event_class_of_the_same_topic_is_not_written_for_another():
    with pytest.raises(UnknownTopicError):
        NEW.to_stored_event(stamped(GrownV1(by=1)))


@pytest.mark.parametrize(
    "state", [b"", b"{", b"[]", b"{}", b'{"name":"Cup","colour":"red"}', b'{"name":7}', b"\xff"]
)
def test_an_unreadable_event_is_named(state):
    with pytest.raises(UnreadableEventError) as raised:
        MAPPER.to_domain_event(stored(state=state))
    error = raised.value
    assert (error.topic, error.aggregate_id, error.version) == ("leftfold.item.renamed", str(ID), 2)


def test_what_is_said_of_an_unreadable_event_quotes_no_personal_data():
    state = b'{"invoice":"1","quantity":"many","unit_price":"1","country":"F","customer_id":"Jane"}'
    with pytest.raises(UnreadableEventError) as raised:
        MAPPER.to_domain_event(stored("leftfold.item.stock_sold", state))
    told = "".join(traceback.format_exception(raised.value))
    assert "quantity" in raised.value.reason
    assert "Jane" not in told
    assert "many" not in told


def test_a_snapshot_comes_back_with_its_types():
    item = Item.register("22423", "Cakestand", Decimal("12.75"), 5)
    item.collect_events()
    kept = MAPPER.to_stored_event(Item.Snapshot.take(item))
    again = MAPPER.to_domain_event(kept).mutate(None)
    assert kept.topic == "leftfold.item.snapshot"
    assert again == item
    assert isinstance(again.unit_price, Decimal)


@pytest.fixture(params=["compressor", "cipher", "both"])
def wrapping(request):
    environment = Environment("items", {"CIPHER_KEY": "90"})
    compressor = ZlibCompressor() if request.param != "cipher" else None
    cipher = Scrambling(environment) if request.param != "compressor" else None
    return EventMapper.of(Item)(transcoder=None, compressor=compressor, cipher=cipher)


def test_a_wrapped_event_comes_back(wrapping):
    event = stamped(ItemRenamed(name="Cakestand " * 9))
    found = wrapping.to_stored_event(event)
    assert b"Cakestand" not in found.state
    assert wrapping.to_domain_event(found) == event


def test_a_wrapped_snapshot_comes_back(wrapping):
    item = Item.register("22423", "Cakestand", Decimal("12.75"), 5)
    item.collect_events()
    kept = wrapping.to_stored_event(Item.Snapshot.take(item))
    assert b"Cakestand" not in kept.state
    assert wrapping.to_domain_event(kept).mutate(None) == item


def test_what_was_not_wrapped_is_unreadable_to_a_wrapping_mapper(wrapping):
    plain = MAPPER.to_stored_event(stamped(ItemRenamed(name="Cup")))
    with pytest.raises(UnreadableEventError):
        wrapping.to_domain_event(plain)


def test_a_mapper_knows_the_aggregates_topic_of_each_event():
    assert MAPPER.aggregate_topics["leftfold.item.stock_sold"] == "leftfold.item"


def test_event_topics_leave_out_snapshots():
    assert set(MAPPER.event_topics()) == {event.TOPIC for event in Item.EVENTS}


def test_mappers_of_two_models_do_not_share_topics():
    assert "leftfold.item.renamed" not in NEW.types


def test_two_types_of_one_topic_are_refused():
    with pytest.raises(InvalidModelError, match="taken"):
        EventMapper.of(Thing, ThingV1)


def test_an_event_without_a_topic_is_refused():
    class Nameless(Event):
        def apply(self, thing):
            """Nothing changes."""

    class Anything(Aggregate, topic="test.anything", events=(Nameless,)):
        pass

    with pytest.raises(InvalidModelError, match="Nameless: topic missing"):
        EventMapper.of(Anything)


def test_an_event_may_be_named_by_two_aggregates_of_one_model():
    assert EventMapper.of(Item, Item).types == EventMapper.of(Item).types


def test_ids_are_uuids():
    event = MAPPER.to_domain_event(MAPPER.to_stored_event(stamped(ItemDiscontinued())))
    assert isinstance(event.originator_id, UUID)


class Renamed(Event, topic="test.renamed", aliases=("test.old_name", "test.older_name")):
    size: int


class Holder(Aggregate, topic="test.holder", events=(Renamed,)):
    pass


@pytest.mark.parametrize("topic", ["test.renamed", "test.old_name", "test.older_name"])
def test_an_event_is_read_by_the_topics_it_had_before(topic):
    mapper = EventMapper.of(Holder)(transcoder=None)
    stored = mapper.encode(Renamed(size=3))
    assert stored.topic == "test.renamed"
    assert mapper.decode(ID, 1, topic, stored.state).size == 3


def test_an_alias_that_is_another_events_topic_is_refused():
    class Taker(Event, topic="test.taker", aliases=("test.renamed",)):
        pass

    class Both(Aggregate, topic="test.both", events=(Renamed, Taker)):
        pass

    with pytest.raises(InvalidModelError, match="Taker: topic missing or taken"):
        EventMapper.of(Both)


def test_a_gap_in_the_chain_of_upcasters_is_refused_at_start():
    class Gapped(Event, topic="test.gapped"):
        class_version = 3

        @staticmethod
        def upcast_v2_v3(state):
            return state

    class WithGap(Aggregate, topic="test.with_gap", events=(Gapped,)):
        pass

    with pytest.raises(InvalidModelError, match="Gapped: upcast_v1_v2 is missing"):
        EventMapper.of(WithGap)
