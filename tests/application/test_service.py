"""A service stands alone as a plain eventsourcing application, and aggregates in plain ones."""

from __future__ import annotations

from decimal import Decimal
from typing import ClassVar

import pytest
from eventsourcing.application import Application
from eventsourcing.persistence import IntegrityError
from eventsourcing.system import ProcessApplication, SingleThreadedRunner, System

from leftfold.application import EventMapper
from leftfold.application.items import Items, RegisterItem, SellStock
from leftfold.domain import Aggregate, AggregateNotFound, Created, Event, project
from leftfold.domain.items import Item, StockSold


class TallyBegun(Created, topic="test.tally.begun"):
    def apply(self, tally):
        tally.sold = 0


class TallyRaised(Event, topic="test.tally.raised"):
    by: int

    def apply(self, tally):
        tally.sold += self.by


class Tally(Aggregate, topic="test.tally", events=(TallyBegun, TallyRaised)):
    """How many pieces were sold of an item."""

    sold: int


class Tallies(ProcessApplication):
    """Follows the items, with nothing of ours but the mapper; the library uses it for both logs."""

    env: ClassVar[dict[str, str]] = {}

    def construct_mapper(self):
        return self.factory.mapper(
            transcoder=self.construct_transcoder(), mapper_class=EventMapper.of(Item, Tally)
        )

    def policy(self, domain_event, processing_event):
        if isinstance(domain_event, StockSold):
            tally = self.of(domain_event.originator_id)
            tally.record(TallyRaised(by=domain_event.quantity))
            processing_event.collect_events(tally)

    def of(self, item_id):
        tally_id = Tally.id_of(item_id.hex)
        if tally_id in self.repository:
            return self.repository.get(tally_id)
        return Tally.begin(TallyBegun(), key=item_id.hex)


class Shop(Application):
    """A plain application of the library."""

    env: ClassVar[dict[str, str]] = {}
    is_snapshotting_enabled = True
    snapshotting_intervals: ClassVar = {Item: 3}
    snapshotting_projectors: ClassVar = {Item: project}

    def construct_mapper(self):
        return self.factory.mapper(
            transcoder=self.construct_transcoder(), mapper_class=EventMapper.of(Item)
        )


class SnapshottingItems(Items):
    is_snapshotting_enabled = True


def register(stock=10):
    return RegisterItem(sku="A", name="Cup", unit_price=Decimal("2.55"), opening_stock=stock)


def sell(quantity=1):
    return SellStock(sku="A", quantity=quantity, invoice="536365")


def new_item():
    return Item.register("A", "Cup", Decimal("2.55"), 10)


@pytest.fixture
def items():
    with Items() as items:
        yield items


@pytest.fixture
def shop():
    with Shop() as shop:
        yield shop


def test_a_service_alone_writes_at_once(items):
    receipt = items.register(register()).unwrap()
    assert receipt.aggregates == ((Item.id_of("A"), 1),)
    assert receipt.position == 1


def test_a_service_alone_reads_what_it_wrote(items):
    items.register(register())
    items.sell(sell(4))
    assert items.repository.load(Item, Item.id_of("A")).on_hand == 6


def test_a_saved_aggregate_has_nothing_unsaved(items):
    item = new_item()
    items.repository.save(item)
    assert item.unsaved == 0


def test_loading_what_is_not_there_is_refused(items):
    with pytest.raises(AggregateNotFound) as raised:
        items.repository.load(Item, Item.id_of("A"))
    assert raised.value == AggregateNotFound("Item", str(Item.id_of("A")))


def test_finding_what_is_not_there_is_none(items):
    assert items.repository.find(Item, Item.id_of("A")) is None


def test_find_all_answers_in_the_order_asked(items):
    items.register(register())
    found = items.repository.find_all(Item, [Item.id_of("B"), Item.id_of("A")])
    assert found[0] is None
    assert found[1].sku == "A"


def test_several_aggregates_are_saved_all_or_none(items):
    items.register(register())
    fresh = Item.register("B", "Mug", Decimal(1))
    with pytest.raises(IntegrityError):
        items.repository.save(fresh, new_item())
    assert items.repository.find(Item, fresh.id) is None


def test_of_two_changes_to_one_version_the_second_is_refused(items):
    items.register(register())
    one, other = (items.repository.load(Item, Item.id_of("A")) for _ in range(2))
    one.receive(1)
    other.receive(2)
    items.repository.save(one)
    with pytest.raises(IntegrityError):
        items.repository.save(other)


def test_a_service_does_not_read_the_hosts_environment(monkeypatch):
    monkeypatch.setenv("PERSISTENCE_MODULE", "no.such.module")
    monkeypatch.setenv("ITEMS_PERSISTENCE_MODULE", "no.such.module")
    with Items() as items:
        assert items.register(register()).is_ok()


def test_a_service_reads_the_settings_it_is_given():
    with Items({"COMPRESSOR_TOPIC": "eventsourcing.compressor:ZlibCompressor"}) as items:
        items.register(register())
        (kept,) = items.recorder.select_events(Item.id_of("A"))
        assert b"Cup" not in kept.state
        assert items.repository.load(Item, Item.id_of("A")).name == "Cup"


def test_a_service_takes_snapshots_if_its_settings_say_so():
    with Items({"IS_SNAPSHOTTING_ENABLED": "y"}) as items:
        items.register(register())
        items.take_snapshot(Item.id_of("A"), projector_func=project)
        (snapshot,) = items.snapshots.get(Item.id_of("A"))
        assert snapshot.originator_version == 1


def test_a_service_takes_snapshots_if_its_class_says_so():
    with SnapshottingItems() as items:
        assert items.snapshots is not None


def test_the_librarys_repository_reads_with_our_projector(items):
    items.register(register())
    assert items.repository.get(Item.id_of("A"), projector_func=project).on_hand == 10


def test_the_librarys_own_projector_reads_too(items):
    items.register(register())
    items.sell(sell(4))
    assert items.repository.get(Item.id_of("A")).on_hand == 6


def test_the_notification_log_shows_what_a_service_wrote(items):
    items.register(register())
    items.sell(sell())
    topics = [n.topic for n in items.notification_log.select(1, 10)]
    assert topics == ["leftfold.item.registered", "leftfold.item.stock_sold"]


def test_a_plain_application_saves_and_reads_an_item(shop):
    item = new_item()
    item.sell(4, "536365")
    shop.save(item)
    again = shop.repository.get(item.id)
    assert again == item
    assert again.on_hand == 6


def test_a_plain_application_takes_snapshots_by_itself(shop):
    item = new_item()
    for _ in range(3):
        item.sell(1, "536365")
    shop.save(item)
    assert [snapshot.originator_version for snapshot in shop.snapshots.get(item.id)] == [3]


def test_a_plain_application_reads_on_from_a_snapshot(shop):
    item = new_item()
    shop.save(item)
    shop.take_snapshot(item.id, projector_func=project)
    item.sell(4, "536365")
    shop.save(item)
    reads = []

    def noting(aggregate, events):
        events = list(events)
        reads.append([type(event).__name__ for event in events])
        return project(aggregate, events)

    again = shop.repository.get(item.id, projector_func=noting)
    assert reads == [["Snapshot", "StockSold"]]
    assert again == item
    assert isinstance(again.unit_price, Decimal)


def test_a_snapshot_of_an_older_version_can_be_taken(shop):
    item = new_item()
    item.sell(4, "536365")
    shop.save(item)
    shop.take_snapshot(item.id, version=1, projector_func=project)
    (snapshot,) = shop.snapshots.get(item.id)
    assert (snapshot.originator_version, snapshot.state["on_hand"]) == (1, 10)


def test_a_process_application_follows_the_items():
    with SingleThreadedRunner(System(pipes=[[Items, Tallies]])) as runner:
        items, tallies = runner.get(Items), runner.get(Tallies)
        item = new_item()
        items.save(item)
        for quantity in (2, 3):
            item.sell(quantity, "536365")
            items.save(item)
        assert tallies.of(item.id).sold == 5


def test_a_process_application_follows_the_handlers_of_the_service():
    with SingleThreadedRunner(System(pipes=[[Items, Tallies]])) as runner:
        runner.get(Items).register(register())
        runner.get(Items).sell(sell(2))
        assert runner.get(Tallies).of(Item.id_of("A")).sold == 2
