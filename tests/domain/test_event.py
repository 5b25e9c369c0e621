from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import ClassVar
from uuid import uuid4

import pytest
from eventsourcing.domain import OriginatorIDError, OriginatorVersionError
from pydantic import ValidationError

from leftfold.domain import Aggregate, Created, Event, clock
from leftfold.domain.event import upcast
from leftfold.domain.items import Item, ItemRegistered, StockReceived

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
MORNING = datetime(2025, 12, 31, 8, tzinfo=UTC)


class Opened(Created, topic="test.account.opened"):
    owner: str

    def apply(self, account: Account) -> None:
        account.owner = self.owner
        account.balance = 0


class Deposited(Event, topic="test.account.deposited"):
    """Version 1 had `sum` in cents, version 2 `amount` in cents, version 3 a currency."""

    class_version: ClassVar[int] = 3

    amount: int
    currency: str

    def apply(self, account: Account) -> None:
        account.balance += self.amount

    @staticmethod
    def upcast_v1_v2(state):
        state["amount"] = state.pop("sum")  # in place, as the library's casters do

    @staticmethod
    def upcast_v2_v3(state):
        return {**state, "currency": "EUR"}


class Closed(Event, topic="test.account.closed"):
    class_version: ClassVar[int] = 3

    def apply(self, account: Account) -> None:
        """Nothing changes."""

    @staticmethod
    def upcast_v1_v2(state):
        return state


class Account(Aggregate, topic="test.account", events=(Opened, Deposited, Closed)):
    owner: str
    balance: int


@pytest.fixture
def account():
    with clock.clock(lambda: NOON):
        return Account.begin(Opened(owner="Ada"), key="Ada")


def deposit(**given):
    return Deposited(amount=5, currency="EUR", **given)


def test_recording_stamps_whose_event_it_is_which_version_and_when(account):
    event = deposit()
    with clock.clock(lambda: NOON):
        account.record(event)
    assert event.originator_id == Account.id_of("Ada")
    assert event.originator_version == 2
    assert event.recorded_at == NOON


def test_an_event_occurred_when_it_was_recorded_if_nothing_else_is_said(account):
    event = deposit()
    with clock.clock(lambda: NOON):
        account.record(event)
    assert event.occurred_at == NOON


def test_an_event_occurred_when_it_is_said_to_have(account):
    event = deposit(occurred_at=MORNING)
    with clock.clock(lambda: NOON):
        account.record(event)
    assert (event.occurred_at, event.recorded_at) == (MORNING, NOON)


def test_the_time_of_recording_is_utc(account):
    account.record(event := deposit())
    assert event.recorded_at.utcoffset() == timedelta(0)


def test_a_time_without_a_zone_is_refused():
    with pytest.raises(ValidationError):
        deposit(occurred_at=datetime(2026, 1, 1))  # noqa: DTZ001 - the point of the test


def test_a_time_of_another_zone_is_kept():
    moment = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=5)))
    assert deposit(occurred_at=moment).occurred_at.utcoffset() == timedelta(hours=5)


def test_an_event_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        deposit().amount = 6


def test_an_event_takes_no_unknown_fields():
    with pytest.raises(ValidationError, match="extra"):
        Deposited(amount=5, currency="EUR", note="hi")


def test_facts_leave_out_the_envelope(account):
    account.record(event := deposit())
    assert event.facts() == {"amount": 5, "currency": "EUR"}


def test_equal_events_are_equal():
    assert deposit() == deposit()
    assert deposit() != Deposited(amount=6, currency="EUR")


def test_a_copy_is_equal(account):
    account.record(event := deposit())
    assert event.model_copy() == event


def test_one_event_object_is_recorded_only_once(account):
    account.record(event := deposit())
    with pytest.raises(Exception, match="recorded"):
        account.record(event)


def test_a_gap_is_refused(account):
    event = deposit()
    event.stamp(account.id, 3, NOON)
    with pytest.raises(OriginatorVersionError):
        event.mutate(account)


def test_an_event_of_the_past_is_refused(account):
    event = deposit()
    event.stamp(account.id, 1, NOON)
    with pytest.raises(OriginatorVersionError):
        event.mutate(account)


def test_the_event_of_another_aggregate_is_refused(account):
    event = deposit()
    event.stamp(uuid4(), 2, NOON)
    with pytest.raises(OriginatorIDError):
        event.mutate(account)


def test_a_refused_event_changes_nothing(account):
    event = deposit()
    event.stamp(account.id, 3, NOON)
    with pytest.raises(OriginatorVersionError):
        event.mutate(account)
    assert (account.balance, account.version) == (0, 1)


def test_a_first_event_is_refused_by_an_aggregate_that_exists(account):
    with pytest.raises(OriginatorVersionError):
        Opened(owner="Bob").mutate(account)


def test_upcasting_goes_through_every_step():
    assert upcast(Deposited, {"sum": 5}, 1) == {"amount": 5, "currency": "EUR"}


def test_upcasting_begins_at_the_stored_version():
    assert upcast(Deposited, {"amount": 5}, 2) == {"amount": 5, "currency": "EUR"}


def test_upcasting_leaves_the_present_version_alone():
    assert upcast(Deposited, {"amount": 5, "currency": "USD"}, 3) == {
        "amount": 5,
        "currency": "USD",
    }


def test_upcasting_does_not_touch_what_it_was_given():
    stored = {"sum": 5}
    upcast(Deposited, stored, 1)
    assert stored == {"sum": 5}


def test_a_missing_step_is_named():
    with pytest.raises(LookupError, match="upcast_v2_v3 is missing"):
        upcast(Closed, {}, 1)


def test_a_state_newer_than_the_class_is_refused():
    with pytest.raises(LookupError, match="stored as version 4, known up to 3"):
        upcast(Deposited, {}, 4)


def test_topics_of_the_items_events_are_a_promise_of_the_storage_format():
    assert [event.TOPIC for event in Item.EVENTS] == [
        "leftfold.item.registered",
        "leftfold.item.renamed",
        "leftfold.item.repriced",
        "leftfold.item.stock_received",
        "leftfold.item.stock_sold",
        "leftfold.item.stock_returned",
        "leftfold.item.stock_written_off",
        "leftfold.item.discontinued",
    ]


def test_an_aggregates_first_event_knows_its_class():
    assert ItemRegistered.aggregate_type is Item
    assert issubclass(StockReceived, Event)
