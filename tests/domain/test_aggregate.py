from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from types import new_class
from typing import ClassVar
from uuid import UUID

import pytest

from leftfold.domain import (
    Aggregate,
    Created,
    Event,
    InvalidAggregateError,
    Personal,
    Snapshot,
    clock,
    project,
)
from leftfold.domain.items import Item

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class TripBegun(Created, topic="test.trip.begun"):
    start: date
    fare: Decimal
    guest: Personal[str] | None
    legs: dict[str, Decimal]

    def apply(self, trip: Trip) -> None:
        trip.start = self.start
        trip.fare = self.fare
        trip.guest = self.guest
        trip.legs = self.legs
        trip.tags = frozenset({"new"})


class TripMoved(Event, topic="test.trip.moved"):
    days: int

    def apply(self, trip: Trip) -> None:
        trip.start += timedelta(days=self.days)


class Trip(Aggregate, topic="test.trip", events=(TripBegun, TripMoved)):
    start: date
    fare: Decimal
    guest: Personal[str] | None
    legs: dict[str, Decimal]
    tags: frozenset[str]


class NoteBegun(Created, topic="test.note.begun"):
    def apply(self, note: Note) -> None:
        note.text = ""


class Note(Aggregate, topic="test.note", events=(NoteBegun,)):
    LONGEST: ClassVar[int] = 80

    text: str


class SlipBegun(Created, topic="test.slip.begun"):
    def apply(self, slip: Slip) -> None:
        slip.text = ""
        slip.forgotten = "not annotated"


class Slip(Aggregate, topic="test.slip", events=(SlipBegun,)):
    text: str


@pytest.fixture
def trip():
    begun = TripBegun(
        start=date(2026, 5, 1),
        fare=Decimal("12.50"),
        guest=Personal("Ada"),
        legs={"train": Decimal("0.10")},
    )
    with clock.clock(lambda: NOON):
        trip = Trip.begin(begun, key="T1")
        trip.record(TripMoved(days=1))
    return trip


def test_the_id_of_a_key_is_a_promise_of_the_storage_format():
    assert Item.id_of("22423") == UUID("b0f63b28-1e72-587b-932a-7dfd5a06ee1a")


def test_keys_are_case_sensitive():
    assert Item.id_of("85123A") != Item.id_of("85123a")


def test_one_key_has_another_id_for_another_kind_of_aggregate():
    assert Item.id_of("A") != Trip.id_of("A")


def test_an_aggregate_begins_at_version_one():
    note = Note.begin(NoteBegun(), key="N")
    assert (note.id, note.version) == (Note.id_of("N"), 1)


def test_each_event_raises_the_version_by_one(trip):
    assert trip.version == 2


def test_unsaved_counts_what_was_not_collected(trip):
    assert trip.unsaved == 2
    trip.collect_events()
    assert trip.unsaved == 0


def test_an_aggregate_knows_when_it_was_begun_and_changed(trip):
    with clock.clock(lambda: NOON + timedelta(hours=1)):
        trip.record(TripMoved(days=1))
    assert (trip.created_on, trip.modified_on) == (NOON, NOON + timedelta(hours=1))


def test_folding_its_events_gives_the_aggregate_again(trip):
    assert Trip.fold(trip.collect_events()) == trip


def test_a_fold_goes_on_from_an_aggregate(trip):
    begun, moved = trip.collect_events()
    assert Trip.fold([moved], Trip.fold([begun])) == trip


def test_a_fold_of_nothing_is_nothing():
    assert Trip.fold([]) is None


def test_project_is_the_fold_that_the_library_calls(trip):
    assert project(None, trip.collect_events()) == trip


def test_an_aggregate_does_not_show_its_personal_attributes(trip):
    assert "Ada" not in repr(trip)


def test_a_snapshot_gives_the_aggregate_again(trip):
    trip.collect_events()
    assert Trip.Snapshot.take(trip).mutate(None) == trip


def test_a_snapshot_keeps_types_through_json(trip):
    trip.collect_events()
    document = Trip.Snapshot.take(trip).model_dump_json()
    again = Trip.Snapshot.model_validate_json(document).mutate(None)
    assert again == trip
    assert isinstance(again.fare, Decimal)
    assert isinstance(again.legs["train"], Decimal)
    assert isinstance(again.start, date)
    assert isinstance(again.guest, Personal)
    assert isinstance(again.tags, frozenset)


def test_a_snapshot_carries_version_topic_and_time(trip):
    trip.collect_events()
    with clock.clock(lambda: NOON):
        snapshot = Trip.Snapshot.take(trip)
    assert isinstance(snapshot, Snapshot)
    assert (snapshot.originator_id, snapshot.originator_version) == (trip.id, 2)
    assert (snapshot.topic, snapshot.timestamp) == ("test.trip.snapshot", NOON)


def test_an_aggregate_goes_on_after_its_snapshot(trip):
    trip.collect_events()
    again = Trip.Snapshot.take(trip).mutate(None)
    again.record(TripMoved(days=1))
    assert (again.version, again.start) == (3, date(2026, 5, 3))


def test_a_snapshot_leaves_class_variables_alone():
    note = Note.begin(NoteBegun(), key="N")
    assert Note.Snapshot.take(note).mutate(None).text == ""


def test_an_attribute_without_an_annotation_is_not_lost_silently_in_a_snapshot():
    slip = Slip.begin(SlipBegun(), key="S")
    with pytest.raises(Exception, match="forgotten"):
        Slip.Snapshot.take(slip)


def begun_by(event, name):
    """Define a class of aggregates."""
    return new_class(name, (Aggregate,), {"topic": f"test.{name}", "events": (event,)})


class Opened(Created, topic="test.opened"):
    pass


class SavingsOpened(Opened, topic="test.savings.opened"):
    pass


def test_an_event_begins_aggregates_of_one_class_only():
    account = begun_by(Opened, "account")
    with pytest.raises(InvalidAggregateError, match="savings: Opened begins account already"):
        begun_by(Opened, "savings")
    assert type(account.begin(Opened(), "1")) is account


def test_a_first_event_may_be_of_the_kind_of_anothers():
    account, savings = begun_by(Opened, "account"), begun_by(SavingsOpened, "savings")
    assert type(account.begin(Opened(), "1")) is account
    assert type(savings.begin(SavingsOpened(), "1")) is savings


def test_a_class_may_be_defined_again_with_the_same_events():
    begun_by(Opened, "account")
    again = begun_by(Opened, "account")
    assert type(again.begin(Opened(), "1")) is again


def test_an_event_that_the_aggregate_does_not_name_is_not_recorded():
    class Unnamed(Event, topic="test.unnamed"):
        pass

    class Begun(Created, topic="test.begun"):
        pass

    item = Item.register("A", "Cup", Decimal(1))
    with pytest.raises(InvalidAggregateError, match="Item: Unnamed is not among its events"):
        item.record(Unnamed())
    with pytest.raises(InvalidAggregateError, match="Item: Begun is not among its events"):
        Item.begin(Begun(), "B")
    assert item.version == 1
