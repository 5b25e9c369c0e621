"""Replays that begin at a snapshot."""

from __future__ import annotations

from contextlib import closing
from decimal import Decimal

import pytest

from leftfold.application import InvalidModelError, Model, SnapshotPolicy
from leftfold.application.items import Items, SellStock, item_stock
from leftfold.application.snapshots import shape_of
from leftfold.domain import Aggregate, Created, Event
from leftfold.domain.items import Item
from leftfold.infrastructure import Runtime, Settings
from leftfold.infrastructure.stores import make_store

pytestmark = pytest.mark.anyio


def model(**policy):
    policies = {Item: SnapshotPolicy(**policy)} if policy else {}
    return Model((Item,), (Items,), (item_stock,), snapshots=policies)


def sale():
    return SellStock(sku="A", quantity=1, invoice="1", unit_price=Decimal("2.55"), country="F")


async def sells(runtime, times):
    for _ in range(times):
        (await runtime.commands.dispatch(sale())).unwrap()


@pytest.fixture
def kept(shared_url):
    def kept():
        with closing(make_store(Settings(store=shared_url))) as store:
            store.open((), create_tables=False)
            return store.log.snapshots([Item.id_of("A")])

    return kept


@pytest.fixture
def lie(shared_url, kept):
    """Keep a false snapshot in place of the true one."""

    def lie(was, now, **changes):
        (snapshot,) = kept()
        assert was in snapshot.state
        false = snapshot._replace(state=snapshot.state.replace(was, now, 1), **changes)
        with closing(make_store(Settings(store=shared_url))) as store:
            store.open((), create_tables=False)
            store.log.keep_snapshots([snapshot._replace(shape="in between")])
            store.log.keep_snapshots([false])

    return lie


async def version_after_a_sale(runtime):
    receipt = (await runtime.commands.dispatch(sale())).unwrap()
    ((_, version),) = receipt.aggregates
    return version


async def test_an_aggregate_is_kept_each_time_it_has_grown_by_so_many_events(
    shared_url, register, kept
):
    async with Runtime(model(every=5), shared_url) as runtime:
        await runtime.commands.dispatch(register("A", 100))
        await sells(runtime, 3)
    assert kept() == []
    async with Runtime(model(every=5), shared_url) as runtime:
        await sells(runtime, 8)
    assert [s.version for s in kept()] == [10]


async def test_a_replay_begins_at_the_snapshot(shared_url, register, lie):
    async with Runtime(model(every=2), shared_url) as runtime:
        await runtime.commands.dispatch(register("A", 3))
        await sells(runtime, 3)
    lie(b'"on_hand":0', b'"on_hand":50')
    async with Runtime(model(every=1000), shared_url) as runtime:
        await sells(runtime, 1)  # by its stream there would be nothing left


async def test_a_long_replay_leaves_a_snapshot(shared_url, register, kept):
    async with Runtime(model(), shared_url) as runtime:
        await runtime.commands.dispatch(register("A", 100))
        await sells(runtime, 11)
    assert kept() == []
    async with Runtime(model(every=10), shared_url) as runtime:
        await sells(runtime, 1)
    assert [s.version for s in kept()] == [12]


async def test_a_dear_replay_leaves_a_snapshot(shared_url, register, kept):
    async with Runtime(model(), shared_url) as runtime:
        await runtime.commands.dispatch(register("A", 100))
        await sells(runtime, 2)
    async with Runtime(model(seconds=60.0), shared_url) as runtime:
        await sells(runtime, 1)
    assert kept() == []
    async with Runtime(model(seconds=1e-9), shared_url) as runtime:
        await sells(runtime, 1)
    assert [s.version for s in kept()] == [4]


async def test_a_snapshot_of_another_shape_is_left_aside(shared_url, register, lie):
    async with Runtime(model(every=2), shared_url) as runtime:
        await runtime.commands.dispatch(register("A", 3))
        await sells(runtime, 3)
    lie(b'"on_hand":0', b'"on_hand":50', shape="another")
    async with Runtime(model(every=1000), shared_url) as runtime:
        assert not (await runtime.commands.dispatch(sale())).is_ok()  # there is nothing left


async def test_a_damaged_snapshot_is_left_aside(shared_url, register, lie):
    async with Runtime(model(every=2), shared_url) as runtime:
        await runtime.commands.dispatch(register("A", 4))
        await sells(runtime, 3)
    lie(b'{"', b"{", version=99)
    async with Runtime(model(every=1000), shared_url) as runtime:
        assert await version_after_a_sale(runtime) == 5


async def test_what_cannot_be_kept_does_not_spoil_the_answer(
    shared_url, register, kept, monkeypatch, caplog
):
    monkeypatch.delitem(Item.__annotations__, "on_hand")
    monkeypatch.setattr("leftfold.domain.aggregate._state_hints", lambda _: {"sku": str})
    async with Runtime(model(every=2), shared_url) as runtime:
        await runtime.commands.dispatch(register("A", 4))
        await sells(runtime, 3)
    assert kept() == []
    assert "no snapshot of Item" in caplog.text


def test_the_shape_changes_with_attributes_events_and_what_they_do():
    def shape(annotation=int, fact=int, step=1, version=1):
        class Begun(Created, topic="test.begun"):
            size: fact  # type: ignore[valid-type]
            class_version = version

            def apply(self, thing):
                thing.size = self.size

        if step == 2:
            Begun.apply = lambda self, thing: setattr(thing, "size", self.size + 1)

        class Thing(Aggregate, topic="test.thing", events=(Begun,)):
            pass

        Thing.__annotations__ = {"size": annotation}
        return shape_of(Thing)

    same = shape()
    assert shape() == same
    others = {shape(annotation=str), shape(fact=str), shape(step=2), shape(version=2)}
    assert len(others) == 4
    assert same not in others


@pytest.mark.parametrize("policy", [{}, {"every": 0}, {"seconds": -1.0}])
def test_a_policy_that_says_nothing_is_refused(policy):
    with pytest.raises(InvalidModelError, match="numbers above 0"):
        SnapshotPolicy(**policy)


def test_snapshots_of_an_aggregate_that_the_model_lacks_are_refused():
    class Other(Aggregate, topic="test.other", events=(Event,)):
        pass

    with pytest.raises(InvalidModelError, match="Other, which is missing"):
        Model((Item,), snapshots={Other: SnapshotPolicy(every=10)})
