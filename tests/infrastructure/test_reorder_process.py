"""Processes in runtimes: each event is reacted to exactly once, whatever comes in between."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections import Counter, defaultdict
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from threading import Event as Signal
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leftfold.application import Command, Process, Projection, Receipt, Service
from leftfold.application.items import (
    DiscontinueItem,
    ReceiveStock,
    RegisterItem,
    ReorderProcess,
    SellStock,
    TakeBackStock,
    WriteOffStock,
    item_model,
    reorder_watch,
    shop_model,
)
from leftfold.application.ports import Group, Save
from leftfold.domain import (
    ALWAYS,
    Aggregate,
    Created,
    DomainError,
    DomainEvent,
    Event,
    Metadata,
    Ok,
)
from leftfold.domain.items import (
    Item,
    ItemRegistered,
    NeedsReorder,
    Reorder,
    ReorderClosed,
    ReorderOpened,
    StockReceived,
    StockSold,
)
from leftfold.infrastructure import Runtime, Settings

pytestmark = pytest.mark.anyio
ALL = 1_000_000


@pytest.fixture
def register():
    def register(sku="A", stock=5, level=4):
        return RegisterItem(
            sku=sku, name="Cup", unit_price=Decimal(1), opening_stock=stock, reorder_level=level
        )

    return register


def opened(url, *processes, model=shop_model, **options):
    if processes:
        model = replace(model, processes=processes)
    return Runtime(model, settings=Settings(store=url, **options))


def events_of(shop):
    """Return all events of the log, with their positions."""
    mapper = shop._parts.mapper
    return [(at, mapper.decode(*logged)) for at, *logged in shop._store.log.read(0, ALL)]


def follows(history):
    """Return what follows from an item's events by a plain fold: types and facts, by reorder."""
    item, found, is_open = None, [], False
    for event in history:
        item = event.mutate(item)
        if is_open and isinstance(event, StockReceived):
            found[-1].append((ReorderClosed, {"received": event.quantity}))
            is_open = False
        if not is_open and NeedsReorder().is_satisfied_by(item):
            facts = {
                "sku": item.sku,
                "number": len(found) + 1,
                "on_hand": item.on_hand,
                "reorder_level": item.reorder_level,
            }
            found.append([(ReorderOpened, facts)])
            is_open = True
    return found


def check(shop):
    """Each item has just the reorders that follow from its history; return how many there are."""
    streams = defaultdict(list)
    for _, event in events_of(shop):
        streams[event.originator_id].append(event)
    wanted, found = {}, {}
    for aggregate_id, stream in streams.items():
        assert [event.originator_version for event in stream] == [*range(1, len(stream) + 1)]
        if isinstance(stream[0], ItemRegistered):
            for number, reorder in enumerate(follows(stream), 1):
                wanted[Reorder.id_of(Reorder.key_of(stream[0].sku, number))] = reorder
        if isinstance(stream[0], ReorderOpened):
            found[aggregate_id] = [(type(event), event.facts()) for event in stream]
    assert found == wanted
    return len(found)


async def done(shop, *commands):
    for command in commands:
        (await shop.commands.dispatch(command)).unwrap()
    (await shop.catch_up()).unwrap()


# What it records ------------------------------------------------------------------------------


async def test_a_reorder_is_opened_when_it_is_needed_and_closed_by_a_delivery(
    store_url, register, sell, receive
):
    async with opened(store_url) as shop:
        await done(shop, register("A", 6, 4), sell("A"))
        assert check(shop) == 0
        await done(shop, sell("A"), sell("A"))
        assert check(shop) == 1
        await done(shop, receive("A", 9))
        reorder_id = Reorder.id_of("A/1")
        stream = shop._parts.mapper.decode_all(shop._store.log.streams([reorder_id])[reorder_id])
    assert [(type(event), event.facts()) for event in stream] == [
        (ReorderOpened, {"sku": "A", "number": 1, "on_hand": 4, "reorder_level": 4}),
        (ReorderClosed, {"received": 9}),
    ]


async def test_what_it_records_names_the_event_that_caused_it(store_url, register, receive):
    said = Metadata("monday", "", "ada")
    async with opened(store_url) as shop:
        (await shop.commands.dispatch(register("A", 4), metadata=said)).unwrap()
        (await shop.commands.dispatch(receive("A", 9))).unwrap()
        (await shop.catch_up()).unwrap()
        found = {type(event).__name__: event for _, event in events_of(shop)}
    registered, received, opened_, closed = (
        DomainEvent.of(found[name], "")
        for name in ("ItemRegistered", "StockReceived", "ReorderOpened", "ReorderClosed")
    )
    assert opened_.metadata == Metadata("monday", registered.event_id, "ada")
    assert closed.metadata == Metadata(received.event_id, received.event_id)
    assert found["ReorderOpened"].occurred_at == found["ItemRegistered"].occurred_at


MOMENT = """
    SELECT (SELECT coalesce(sum(number), 0) FROM reorder_watch_v1),
        (SELECT count(*) FROM stored_events WHERE topic = 'leftfold.reorder.opened'),
        (SELECT coalesce(sum(on_hand), 0) FROM reorder_watch_v1),
        (SELECT {position} FROM leftfold_checkpoints WHERE name = 'reorder_watch')
"""


async def test_rows_checkpoint_and_events_are_never_seen_apart(shared_url, register, sell, receive):
    """One statement sees one moment of the database."""
    moments = []

    async def looks(ask):
        while True:
            moments.append(await asyncio.to_thread(ask, MOMENT.format(position="position")))
            await asyncio.sleep(0.002)

    def ask(statement):
        if shared_url.startswith("sqlite"):
            with closing(sqlite3.connect(shared_url.removeprefix("sqlite:///"))) as connection:
                return connection.execute(statement).fetchone()
        with psycopg.connect(shared_url) as connection:
            return connection.execute(statement).fetchone()

    async with opened(shared_url, page_size=3) as shop:
        looking = asyncio.ensure_future(looks(ask))
        await shop.commands.dispatch_all([register(f"S{n}", 9, 8) for n in range(5)])
        for n in range(40):
            await shop.commands.dispatch(sell(f"S{n % 5}"))
            await shop.commands.dispatch(receive(f"S{n % 5}"))
        (await shop.catch_up()).unwrap()
        looking.cancel()
        check(shop)
        on_hand_at = {0: 0}
        for at, event in events_of(shop):
            on_hand_at[at] = on_hand_at[max(on_hand_at)] + {
                "ItemRegistered": 9,
                "StockSold": -1,
                "StockReceived": 1,
            }.get(type(event).__name__, 0)
    assert len(set(moments)) > 3
    for numbers, opened_, on_hand, position in moments:
        assert numbers == opened_
        assert on_hand == on_hand_at[position]


skus = st.sampled_from(["A", "B", "C"])
quantities = st.integers(1, 6)
moves = st.lists(
    st.lists(
        st.one_of(
            st.tuples(st.just("sell"), skus, quantities),
            st.tuples(st.just("receive"), skus, quantities),
            st.tuples(st.just("take_back"), skus, quantities),
            st.tuples(st.just("write_off"), skus, quantities),
            st.tuples(st.just("discontinue"), skus, quantities),
        ),
        max_size=8,
    ),
    max_size=6,
)
MAKE = {
    "sell": lambda sku, n: SellStock(sku=sku, quantity=n, invoice="536365"),
    "receive": lambda sku, n: ReceiveStock(sku=sku, quantity=n),
    "take_back": lambda sku, n: TakeBackStock(sku=sku, quantity=n, invoice="536365"),
    "write_off": lambda sku, n: WriteOffStock(sku=sku, quantity=n, reason="lost"),
    "discontinue": lambda sku, _: DiscontinueItem(sku=sku),
}


@given(moves, st.integers(1, 6))
@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_whatever_happens_each_item_has_the_reorders_that_follow(
    store_url, register, bursts, page_size
):
    async def happens():
        prefix = uuid4().hex[:12]
        async with opened(store_url, page_size=page_size) as shop:
            await shop.commands.dispatch_all([register(f"{prefix}{sku}") for sku in "ABC"])
            for burst in bursts:
                dispatched = [
                    shop.commands.dispatch(MAKE[kind](f"{prefix}{sku}", n))
                    for kind, sku, n in burst
                ]
                await asyncio.gather(*dispatched)
            (await shop.catch_up()).unwrap()
            check(shop)

    asyncio.run(happens())


async def test_a_process_that_is_new_to_a_log_reacts_to_all_that_is_in_it(
    shared_url, register, sell, receive
):
    async with opened(shared_url, model=item_model) as shop:
        await done(shop, register("A", 5), register("B", 9), sell("A"), receive("A"), sell("B", 6))
    async with opened(shared_url, page_size=2) as shop:
        (await shop.catch_up()).unwrap()
        assert check(shop) == 2
        await done(shop, receive("B", 9))
        check(shop)


async def test_an_event_with_no_reaction_is_passed(store_url, register):
    async with opened(store_url) as shop:
        await done(shop, register("A", 9, 0))
        (watch,) = (p for p in shop.health().projections if p.name == "reorder_watch")
    assert (watch.position, watch.lag, watch.state) == (1, 0, "live")


# Several of them ------------------------------------------------------------------------------


async def test_of_two_runtimes_that_follow_one_reacts(shared_url, register, sell, receive):
    async with opened(shared_url) as one, opened(shared_url) as other:
        await one.commands.dispatch_all([register(f"S{n}", 9, 8) for n in range(4)])
        shops = (one, other)
        dispatched = []
        for n in range(60):
            sku = f"S{n % 4}"
            dispatched.append(shops[n % 2].commands.dispatch(sell(sku)))
            dispatched.append(shops[n // 2 % 2].commands.dispatch(receive(sku)))
        await asyncio.gather(*dispatched)
        for shop in shops:
            (await shop.catch_up()).unwrap()
        assert check(one) > 4
        states = [
            next(p.state for p in shop.health().projections if p.name == "reorder_watch")
            for shop in shops
        ]
        assert sorted(states) == ["live", "watched"]


RUNS = """
    import random
    from leftfold.infrastructure import follower

    follower.LEASE, follower.IDLE = 0.4, 0.1
    chance = random.Random(int(sys.argv[2]))

    def dies():
        if chance.random() < 0.15:
            os.kill(os.getpid(), signal.SIGKILL)

    async def main():
        settings = Settings(store=url, page_size=chance.randint(1, 9))
        async with Runtime(shop_model, settings=settings) as shop:
            views, pages = shop._store.views, 0
            genuine = views.write

            def write(changes, position, **options):
                dies()
                is_written = genuine(changes, position, **options)
                dies()
                say("page")
                return is_written

            views.write = write
            say("ready")
            await asyncio.sleep(600)

    asyncio.run(main())
"""
WRITES = """
    import random
    chance = random.Random(7)

    async def main():
        async with Runtime(item_model, settings=Settings(store=url, follow=False)) as shop:
            say("ready")
            while True:
                sku = f"S{chance.randint(0, 5)}"
                n = chance.randint(1, 5)
                command = chance.choice([
                    sell(sku, n), sell(sku, n), ReceiveStock(sku=sku, quantity=n),
                    TakeBackStock(sku=sku, quantity=n, invoice="1"),
                    WriteOffStock(sku=sku, quantity=n, reason="lost"),
                ])
                await shop.commands.dispatch(command)
                await asyncio.sleep(0.003)

    asyncio.run(main())
"""


@pytest.mark.long
def test_processes_that_are_killed_again_and_again_react_exactly_once(shared_url, start, register):
    async def begin():
        async with opened(shared_url, follow=False) as shop:
            await shop.commands.dispatch_all([register(f"S{n}", 9, 7) for n in range(6)])

    asyncio.run(begin())
    writer = start(WRITES, shared_url)
    writer.says()
    chance = random.Random(3)
    for n in range(8):
        runner = start(RUNS, shared_url, str(n))
        assert runner.says() in ("ready", "page")
        with suppress(TimeoutError):
            end = time.monotonic() + chance.random()
            while runner.process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
        runner.process.kill()
        assert runner.ends() == -9, runner.errors
    writer.process.kill()

    async def end():
        async with opened(shared_url) as shop:
            (await shop.catch_up(timeout=30)).unwrap()
            return check(shop), shop._store.log.head()

    reorders, head = asyncio.run(end())
    assert reorders > 20
    assert head > 200


# Other aggregates than its own ----------------------------------------------------------------


class TallyBegun(Created, topic="test.sales_tally.begun"):
    def apply(self, tally):
        tally.sold = 0


class TallyRaised(Event, topic="test.sales_tally.raised"):
    by: int

    def apply(self, tally):
        tally.sold += self.by


class Tally(Aggregate, topic="test.sales_tally", events=(TallyBegun, TallyRaised)):
    """How many pieces were sold in all; others write it, too."""

    sold: int

    @classmethod
    def raised(cls, repository, by):
        tally = repository.find(cls, cls.id_of("all"))
        if tally is None:
            tally = cls.begin(TallyBegun(), key="all")
        tally.record(TallyRaised(by=by))
        return repository.save(tally)


class RaiseTally(Command[Receipt, DomainError]):
    by: int


class Tallies(Service):
    aggregates = (Tally,)

    def handlers(self):
        yield RaiseTally.handled_by(self.raised)

    def raised(self, command):
        return Ok(Tally.raised(self.repository, command.by))


@dataclass(frozen=True, slots=True)
class Seen:
    sales: int


def sales_watch(version=1, name="sales_watch"):
    watch = Projection(name, version=version, row=Seen)
    watch.on(StockSold)(lambda row, _: Seen(row.sales + 1 if row else 1))
    return watch


class TallyProcess(Process):
    aggregates = (Tally,)
    projection = sales_watch()

    def react(self, before, after, event):
        Tally.raised(self.repository, event.quantity)


tally_model = replace(
    shop_model,
    aggregates=(Item, Reorder, Tally),
    services=(*shop_model.services, Tallies),
    processes=(ReorderProcess, TallyProcess),
)


async def tallied(shop):
    """Return the quantities that the tally has been raised by."""
    (await shop.catch_up()).unwrap()
    tally_id = Tally.id_of("all")
    _, *raised = shop._parts.mapper.decode_all(shop._store.log.streams([tally_id])[tally_id])
    return [event.by for event in raised]


async def test_two_processes_of_one_service_both_see_everything(store_url, register, sell):
    """The library's own lose events of one another in one file: see its defects."""
    async with opened(store_url, model=tally_model, page_size=3) as shop:
        await shop.commands.dispatch_all([register(f"S{n}", 9, 8) for n in range(3)])
        for n in range(24):
            await shop.commands.dispatch(sell(f"S{n % 3}"))
        assert await tallied(shop) == [1] * 24
        assert check(shop) == 3


async def test_a_page_is_folded_again_if_another_writer_was_first(store_url, register, sell):
    """The other writes the aggregate between the reaction's reading and its writing."""
    has_read, may_write = Signal(), Signal()

    class SlowTallyProcess(TallyProcess):
        def react(self, before, after, event):
            Tally.raised(self.repository, event.quantity)
            has_read.set()
            assert may_write.wait(10)

    async with opened(store_url, SlowTallyProcess, model=tally_model) as shop:
        await shop.commands.dispatch_all([register("A", 100), RaiseTally(by=1)])
        await shop.commands.dispatch(sell("A", 20))
        assert await asyncio.to_thread(has_read.wait, 10)
        await shop.commands.dispatch(RaiseTally(by=300))
        may_write.set()
        assert await tallied(shop) == [1, 300, 20]
        assert all(p.failure is None for p in shop.health().projections)
        assert await shop.dead_letters("sales_watch") == ()


async def test_reactions_and_commands_to_one_aggregate_lose_nothing(store_url, register, sell):
    async with opened(store_url, TallyProcess, model=tally_model, page_size=5) as shop:
        await shop.commands.dispatch(register("A", 1_000))
        for _ in range(12):
            both = [shop.commands.dispatch(sell("A")) for _ in range(3)]
            both += [shop.commands.dispatch(RaiseTally(by=100))]
            assert all(outcome.is_ok() for outcome in await asyncio.gather(*both))
        assert Counter(await tallied(shop)) == {1: 36, 100: 12}


# What goes wrong ------------------------------------------------------------------------------


class Fault:
    """What a process cannot react to, until it is mended."""

    def __init__(self, *quantities):
        self.quantities = set(quantities)


def faulty(fault):
    class FaultyProcess(ReorderProcess):
        def react(self, before, after, event):
            super().react(before, after, event)
            if isinstance(event, StockSold) and event.quantity in fault.quantities:
                raise ZeroDivisionError

    return FaultyProcess


async def test_an_event_that_cannot_be_reacted_to_is_parked_with_what_follows_of_its_item(
    store_url, register, sell, receive
):
    fault = Fault(3)
    async with opened(store_url, faulty(fault)) as shop:
        await done(shop, register("A", 5), register("B", 5))
        await done(shop, sell("A", 3), receive("A", 1), sell("B", 2), sell("A", 1))
        letters = await shop.dead_letters("reorder_watch")
        assert [letter.version for letter in letters] == [2, 3, 4]
        assert "ZeroDivisionError in react" in letters[0].error
        opened_ = [event.sku for _, event in events_of(shop) if isinstance(event, ReorderOpened)]
        assert opened_ == ["B"]
        fault.quantities.clear()
        tried = await shop.retry("reorder_watch")
        assert (tried.released, tried.kept) == (3, 0)
        assert check(shop) == 3
        await done(shop, receive("A", 9), receive("B", 9))
        assert check(shop) == 3


async def test_a_retry_that_fails_again_records_nothing(store_url, register, sell):
    async with opened(store_url, faulty(Fault(3))) as shop:
        await done(shop, register("A", 5), sell("A", 3))
        head = shop._store.log.head()
        tried = await shop.retry("reorder_watch")
        assert (tried.released, tried.kept) == (0, 1)
        assert shop._store.log.head() == head


async def test_a_reaction_that_forgets_to_save_parks_its_event(store_url, register, sell):
    class ForgetfulProcess(TallyProcess):
        def react(self, before, after, event):
            self.repository.load(Tally, Tally.id_of("all")).record(TallyRaised(by=1))

    async with opened(store_url, ForgetfulProcess, model=tally_model) as shop:
        await shop.commands.dispatch(RaiseTally(by=5))
        await done(shop, register("A", 9), sell("A"))
        (letter,) = await shop.dead_letters("sales_watch")
        assert "did not save" in letter.error
        assert await tallied(shop) == [5]


# Versions -------------------------------------------------------------------------------------


class NextReorderProcess(ReorderProcess):
    """The same with a new version of its rows."""

    projection = reorder_watch.derive("reorder_watch", version=2, specification=ALWAYS)


async def test_a_new_version_does_not_react_again(shared_url, register, sell, receive):
    async with opened(shared_url) as shop:
        await done(shop, register("A", 5), sell("A"), receive("A", 1), sell("A"))
        assert check(shop) == 2
        head = shop._store.log.head()
    async with opened(shared_url, NextReorderProcess, page_size=2) as shop:
        (await shop.catch_up()).unwrap()
        assert shop._store.log.head() == head
        await done(shop, receive("A", 9), sell("A", 9))
        assert check(shop) == 3


async def test_a_new_version_reacts_to_what_the_old_one_has_not_seen(shared_url, register, sell):
    async with opened(shared_url) as shop:
        await done(shop, register("A", 4))
    async with opened(shared_url, model=item_model) as shop:
        await done(shop, register("B", 4))
    async with opened(shared_url, NextReorderProcess) as shop:
        (await shop.catch_up()).unwrap()
        assert check(shop) == 2


async def test_two_versions_that_run_side_by_side_react_once(shared_url, register, sell, receive):
    """So it is while new programs take the place of old ones."""
    async with opened(shared_url) as old, opened(shared_url, NextReorderProcess) as new:
        await old.commands.dispatch_all([register(f"S{n}", 5) for n in range(4)])
        for n in range(12):
            await (old, new)[n % 2].commands.dispatch(sell(f"S{n % 4}"))
            await (old, new)[n // 2 % 2].commands.dispatch(receive(f"S{n % 4}"))
        for shop in (old, new):
            (await shop.catch_up()).unwrap()
            assert await shop.dead_letters("reorder_watch") == ()
        assert check(old) > 4


async def test_a_reaction_that_others_contradict_for_good_is_parked(store_url, register, sell):
    async with Runtime(shop_model, store_url) as shop:
        mapper = shop._parts.mapper
        taken = Reorder.open("A", 1, 0, 0)  # by somebody who is not the process
        (event,) = taken.collect_events()
        stored = mapper.encode(event)
        save = Save(uuid4(), "Other", [stored], ((stored.aggregate_id, 1),), None)
        shop._store.log.commit([Group([save])])
        (await shop.commands.dispatch(register("A", 0))).unwrap()
        (await shop.commands.dispatch(register("B", 5))).unwrap()
        (await shop.catch_up(20)).unwrap()
        (letter,) = await shop.dead_letters("reorder_watch")
        assert letter.key == Item.id_of("A").hex
        assert "ReactionConflictError" in letter.error
        tried = await shop.retry("reorder_watch")
        assert (tried.released, tried.kept) == (0, 1)
