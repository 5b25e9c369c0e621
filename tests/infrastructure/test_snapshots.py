"""Replays that begin at a snapshot."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import closing
from decimal import Decimal

import pytest

from leftfold.application import (
    Command,
    InvalidModelError,
    Model,
    Receipt,
    Service,
    SnapshotPolicy,
)
from leftfold.application.items import Items, SellStock, item_stock
from leftfold.application.snapshots import shape_of
from leftfold.domain import Aggregate, Created, DomainError, Event, Ok, Personal
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


class Do(Command[Receipt, DomainError]):
    """Do what a model does."""


def model_that(aggregate_type, do):
    """Return a model that saves what a function makes of a repository, and keeps every version."""

    class Doing(Service):
        aggregates = (aggregate_type,)

        def handlers(self):
            yield Do.handled_by(lambda _: Ok(self.repository.save(do(self.repository))))

    return Model((aggregate_type,), (Doing,), snapshots={aggregate_type: SnapshotPolicy(every=1)})


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


async def test_what_a_task_records_after_its_command_is_in_no_snapshot(shared_url, register, kept):
    """A handler leaves a task behind, which goes on with the aggregate while it is committed."""
    late = []

    class Careless(Items):
        def handlers(self):
            yield from (h for h in super().handlers() if h.message_type is not SellStock)
            yield SellStock.handled_by(self.sell_and_go_on)

        async def sell_and_go_on(self, command):
            answer = self.sell(command)
            item = self._item(command.sku)

            async def go_on():
                while item.version < 30:
                    item.receive(1)
                    await asyncio.sleep(0)

            late.append(asyncio.ensure_future(go_on()))
            return answer

    careless = Model((Item,), (Careless,), (item_stock,), snapshots=model(every=1).snapshots)
    async with Runtime(careless, shared_url) as shop:
        (await shop.commands.dispatch(register("A"))).unwrap()
        await sells(shop, 1)
        await asyncio.wait(late)
    async with Runtime(model(every=1), shared_url) as shop:
        assert await version_after_a_sale(shop) == 3


async def test_a_snapshot_that_is_ahead_of_its_stream_is_left_aside(shared_url, register, kept):
    async with Runtime(model(every=1), shared_url) as shop:
        (await shop.commands.dispatch(register("A"))).unwrap()
        await sells(shop, 2)
    (snapshot,) = kept()
    with closing(make_store(Settings(store=shared_url))) as store:
        store.open((), create_tables=False)
        store.log.keep_snapshots([snapshot._replace(version=9)])
    async with Runtime(model(every=1), shared_url) as shop:
        assert await version_after_a_sale(shop) == 4


async def test_a_state_that_cannot_be_taken_or_made_again_does_not_stop_its_aggregate(
    shared_url, caplog
):
    class Begun(Created, topic="test.begun"):
        def apply(self, thing):
            thing.weight, thing.colour = float("inf"), "red"  # JSON has no such number

    class Grown(Event, topic="test.grown"):
        def apply(self, thing):
            thing.secret = 1

    class Thing(Aggregate, topic="test.thing", events=(Begun, Grown)):
        weight: float
        colour: str

    def grow(repository):
        thing = repository.find(Thing, Thing.id_of("A"))
        if thing is None:
            return Thing.begin(Begun(), "A")
        thing.record(Grown())
        return thing

    for _ in range(3):
        async with Runtime(model_that(Thing, grow), shared_url) as shop:
            (await shop.commands.dispatch(Do())).unwrap()
    assert "no snapshot of Thing" in caplog.text


async def test_personal_data_that_no_event_holds_is_in_no_snapshot(shared_url, caplog):
    class Joined(Created, topic="test.joined"):
        name: Personal[str]

        def apply(self, guest):
            guest.initial = Personal(str(self.name.reveal_or("?"))[:1])

    class Guest(Aggregate, topic="test.guest", events=(Joined,)):
        initial: Personal[str]

    def join(_):
        return Guest.begin(Joined(name=Personal("Ada")), "ada")

    async with Runtime(model_that(Guest, join), shared_url) as house:
        (await house.commands.dispatch(Do())).unwrap()
    assert "personal data that no event holds" in caplog.text
    with closing(make_store(Settings(store=shared_url))) as store:
        store.open((), create_tables=False)
        assert store.log.snapshots([Guest.id_of("ada")]) == []


async def test_keeping_a_snapshot_is_in_no_commands_way(shared_url, register):
    settings = Settings(store=shared_url, max_commands=1)
    async with Runtime(model(every=1), settings=settings) as shop:
        (await shop.commands.dispatch(register("A", 100))).unwrap()
        await sells(shop, 20)


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


def test_the_shape_changes_with_defaults_upcasters_and_what_a_function_holds():
    def shape(default=1, step=1, held=1, argument=1):
        def upcast_v1_v2(state):
            return {**state, "size": step}

        def apply(self, thing, by=argument):
            thing.size = self.size + held + by

        class Begun(Created, topic="test.begun"):
            size: int = default
            class_version = 2

        Begun.apply, Begun.upcast_v1_v2 = apply, staticmethod(upcast_v1_v2)

        class Thing(Aggregate, topic="test.thing", events=(Begun,)):
            size: int

        return shape_of(Thing)

    same = shape()
    assert shape() == same
    others = {shape(default=2), shape(held=2), shape(argument=2)}
    assert len(others) == 3
    assert same not in others


COLOURS = """
from typing import Annotated
from pydantic import AfterValidator
from leftfold.application.snapshots import shape_of
from leftfold.domain import Aggregate, Created

class Begun(Created, topic="test.begun"):
    size: Annotated[int, AfterValidator(lambda size: size)]
    def apply(self, thing):
        thing.is_bright = self.topic in {"red", "green", "blue", "white", "yellow"}

class Thing(Aggregate, topic="test.thing", events=(Begun,)):
    is_bright: bool

print(shape_of(Thing))
"""


def test_all_processes_see_the_same_shape():
    shapes = {
        subprocess.check_output(
            [sys.executable, "-c", COLOURS], env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2", "3")
    }
    assert len(shapes) == 1


@pytest.mark.parametrize("policy", [{}, {"every": 0}, {"seconds": -1.0}])
def test_a_policy_that_says_nothing_is_refused(policy):
    with pytest.raises(InvalidModelError, match="numbers above 0"):
        SnapshotPolicy(**policy)


def test_snapshots_of_an_aggregate_that_the_model_lacks_are_refused():
    class Other(Aggregate, topic="test.other", events=(Event,)):
        pass

    with pytest.raises(InvalidModelError, match="Other, which is missing"):
        Model((Item,), snapshots={Other: SnapshotPolicy(every=10)})


def test_an_aggregate_whose_annotations_cannot_be_read_is_refused():
    class Begun(Created, topic="test.nameless.begun"):
        pass

    class Nameless(Aggregate, topic="test.nameless", events=(Begun,)):
        pass

    Nameless.__annotations__ = {"price": "Missing"}  # as of what is imported for type checkers
    policies = {Nameless: SnapshotPolicy(every=3)}
    with pytest.raises(InvalidModelError, match="snapshots of Nameless: name 'Missing'"):
        Model((Nameless,), snapshots=policies)
