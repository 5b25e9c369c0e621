"""Who of several processes folds a view, and how soon all of them see what one has written."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import median
from time import monotonic, sleep
from uuid import UUID

import psycopg
import pytest

from leftfold.application import Projection, ViewStopped
from leftfold.application.checkpoints import Change, DeadLetter
from leftfold.application.items import FindItems, GetItem, item_model, item_stock
from leftfold.domain.items import ItemRegistered, StockSold
from leftfold.infrastructure import Runtime, Settings
from leftfold.infrastructure.follower import LEASE
from leftfold.infrastructure.health import ReaderState
from leftfold.infrastructure.items import open_items

pytestmark = [pytest.mark.anyio, pytest.mark.timed]

SOON = 1.5
"""What takes about a second, on a machine that is busy."""
SAMPLES = 15

SHOP = """
    from threading import Lock

    def states(shop):
        return {projection.state.value for projection in shop.health().projections}

    holding = Lock()

    def holds_under_a_lock(shop):
        views = shop._store.views
        hold = views.hold

        def locked_hold(*args):
            with holding:
                return hold(*args)

        views.hold = locked_hold

    def stops():
        with holding:  # no transaction is open then: in one it would stop all others, too
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.1)

    def stops_in_the_next_page(shop):
        views = shop._store.views
        write = views.write

        def stop(*args, **options):
            views.write = write
            stops()
            written = write(*args, **options)
            say("written" if written else "refused")
            return written

        views.write = stop

    async def becomes_deaf(shop):
        store = shop._store
        if store.hints:
            while store._listener is None:
                await asyncio.sleep(0.01)
            store._listener.execute("UNLISTEN *")
        else:
            store.has_changed = lambda: False

    async def main():
        say("started")
        hear()
        async with open_items(url) as shop:
            holds_under_a_lock(shop)
            say("ready")
            while (line := await asyncio.to_thread(hear)) != "close":
                match line.split():
                    case ["states"]:
                        say(*states(shop))
                    case ["until", state]:
                        while states(shop) != {state}:
                            await asyncio.sleep(0.005)
                        say(time.monotonic())
                    case ["register"]:
                        say((await shop.commands.dispatch(register("A", 1_000))).unwrap().position)
                    case ["sell"]:
                        receipt = (await shop.commands.dispatch(sell())).unwrap()
                        say(receipt.position, time.monotonic())
                    case ["wait", position]:
                        receipt = Receipt(uuid4(), (), int(position))
                        (await shop.wait_for(receipt)).unwrap()
                        say(time.monotonic())
                    case ["sold"]:
                        say((await shop.queries.dispatch(GetItem(sku="A"))).unwrap().units_sold)
                    case ["until", "sold", wanted]:
                        sold = 0
                        while sold < int(wanted):
                            await asyncio.sleep(0.002)
                            row = (await shop.queries.dispatch(GetItem(sku="A"))).unwrap()
                            sold = row.units_sold
                        say(time.monotonic())
                    case ["until", "position", wanted]:
                        while shop.health().projections[0].position < int(wanted):
                            await asyncio.sleep(0.005)
                        say(time.monotonic())
                    case ["stop", "in", "the", "next", "page"]:
                        stops_in_the_next_page(shop)
                        say("ok")
                    case ["stop"]:
                        stops()
                        say("goes on")
                    case ["be", "deaf"]:
                        await becomes_deaf(shop)
                        say("ok")
        say(time.monotonic())

    from leftfold.application import Receipt
    asyncio.run(main())
"""


def asked(child, line):
    child.tell(line)
    return child.says()


def moment(child, line):
    return float(asked(child, line))


def sale(child):
    """Let a process sell one; return the position and the moment when that was committed."""
    position, at = asked(child, "sell").split()
    return position, float(at)


@pytest.fixture
def pair(shared_url, start):
    """Two processes: the first holds the views, the second watches."""
    owner, watcher = pair = [start(SHOP, shared_url) for _ in range(2)]
    for child in pair:
        assert child.says(60) == "started"
    assert asked(owner, "open") == "ready"
    asked(owner, "register")
    moment(owner, "until live")
    assert asked(watcher, "open") == "ready"
    moment(watcher, "until watched")
    return owner, watcher


def is_stopped(child):
    """Wait until a process has stopped."""
    pid, status = os.waitpid(child.process.pid, os.WUNTRACED)
    return pid == child.process.pid and os.WIFSTOPPED(status)


# Who folds ------------------------------------------------------------------------------------


def test_of_two_processes_exactly_one_folds_for_longer_than_a_lease(pair):
    owner, watcher = pair
    begun, sold = monotonic(), 0
    while monotonic() - begun < LEASE + 1.5:
        assert (asked(owner, "states"), asked(watcher, "states")) == ("live", "watched")
        for child in pair:
            position, _ = sale(child)
            sold += 1
            moment(watcher, f"wait {position}")
        assert asked(watcher, "sold") == str(sold)
        sleep(0.2)


def test_an_owner_that_has_nothing_to_do_stays_the_owner(pair):
    owner, watcher = pair
    begun = monotonic()
    while monotonic() - begun < LEASE + 1.5:
        assert (asked(owner, "states"), asked(watcher, "states")) == ("live", "watched")
        sleep(0.05)


def test_when_the_owner_is_killed_the_other_takes_over_within_five_seconds(pair):
    owner, watcher = pair
    sale(owner)
    owner.process.kill()
    owner.ends()
    begun = monotonic()
    position, _ = sale(watcher)
    assert moment(watcher, "until live") - begun < 5
    moment(watcher, f"wait {position}")
    assert asked(watcher, "sold") == "2"


def test_when_the_owner_closes_the_other_takes_over_within_about_a_second(pair):
    owner, watcher = pair
    sale(owner)
    closed = moment(owner, "close")
    position, _ = sale(watcher)
    assert moment(watcher, "until live") - closed < SOON
    assert moment(watcher, f"wait {position}") - closed < SOON + 0.5
    assert asked(watcher, "sold") == "2"


def test_an_owner_that_was_paused_does_not_write_over_its_successor(pair):
    owner, watcher = pair
    assert asked(owner, "stop in the next page") == "ok"
    sale(watcher)
    assert is_stopped(owner)
    begun = monotonic()
    assert moment(watcher, "until live") - begun < 5
    for _ in range(3):
        position, _ = sale(watcher)
    moment(watcher, f"wait {position}")
    os.kill(owner.process.pid, signal.SIGCONT)
    assert owner.says() == "refused"
    moment(owner, "until watched")
    for child in pair:
        position, _ = sale(child)
    for child in pair:
        moment(child, f"wait {position}")
        assert asked(child, "sold") == "6"
    assert (asked(owner, "states"), asked(watcher, "states")) == ("watched", "live")


def test_an_owner_that_was_paused_learns_that_it_is_none_any_more_though_nothing_happens(pair):
    owner, watcher = pair
    owner.tell("stop")
    assert is_stopped(owner)
    moment(watcher, "until live")
    os.kill(owner.process.pid, signal.SIGCONT)
    begun = monotonic()
    assert owner.says() == "goes on"
    assert moment(owner, "until watched") - begun < SOON
    assert asked(watcher, "states") == "live"


def test_an_owner_that_was_paused_for_a_moment_goes_on(pair):
    owner, watcher = pair
    assert asked(owner, "stop in the next page") == "ok"
    position, _ = sale(watcher)
    assert is_stopped(owner)
    sleep(0.5)
    os.kill(owner.process.pid, signal.SIGCONT)
    assert owner.says() == "written"
    moment(watcher, f"wait {position}")
    assert (asked(owner, "states"), asked(watcher, "states")) == ("live", "watched")
    assert asked(watcher, "sold") == "1"


async def test_a_runtime_that_does_not_follow_never_takes_a_lease(shared_url, register):
    settings = Settings(store=shared_url, follow=False)
    async with open_items(settings=settings) as watcher:
        async with open_items(shared_url) as shop:
            written = (await shop.commands.dispatch(register())).unwrap()
            (await watcher.wait_for(written)).unwrap()
        late = (await watcher.commands.dispatch(register("B"))).unwrap()
        assert not (await watcher.wait_for(late, timeout=1.5)).is_ok()
        found = watcher._store.views.checkpoints(item_model.projections)
        assert {at.owner for at in found} == {""}
        assert {p.state for p in watcher.health().projections} == {ReaderState.FREE}
        watcher.follow()
        (await watcher.wait_for(late)).unwrap()
        assert {p.state for p in watcher.health().projections} == {ReaderState.LIVE}


@dataclass(frozen=True, slots=True)
class Sales:
    number: int


def counting(name, *, fails=False):
    """A view that counts sales, or cannot."""
    counts = Projection(name, version=1, row=Sales, on_poison="halt")

    @counts.on(StockSold)
    def sold(row, event):
        if fails:
            raise ZeroDivisionError
        return Sales((row.number if row else 0) + 1)

    counts.on(ItemRegistered)(lambda row, event: Sales(0))
    return counts


def of(url, *projections):
    return Runtime(replace(item_model, projections=(item_stock, *projections)), url)


async def test_what_stops_in_one_process_goes_on_in_another_that_knows_how_to(
    shared_url, register, sell
):
    async with of(shared_url, counting("counts", fails=True)) as older:
        await older.commands.dispatch(register())
        sold = (await older.commands.dispatch(sell())).unwrap()
        assert not (await older.wait_for(sold)).is_ok()
        assert not older.health().is_healthy
        async with of(shared_url, counting("counts")) as newer:
            (await newer.wait_for(sold)).unwrap()
            begun = monotonic()
            while not older.health().is_healthy:
                assert monotonic() - begun < SOON
                await asyncio.sleep(0.01)
            states = {p.name: p.state for p in older.health().projections}
    assert states == {"item_stock": ReaderState.LIVE, "counts": ReaderState.WATCHED}


async def test_why_a_view_stopped_is_known_to_other_processes(shared_url, register, sell):
    async with of(shared_url, counting("counts", fails=True)) as shop:
        await shop.commands.dispatch(register())
        sold = (await shop.commands.dispatch(sell())).unwrap()
        stopped = (await shop.wait_for(sold)).error
    assert isinstance(stopped, ViewStopped)
    settings = Settings(store=shared_url, follow=False)
    model = replace(item_model, projections=(item_stock, counting("counts", fails=True)))
    async with Runtime(model, settings=settings) as watcher:
        (found,) = (p for p in watcher.health().projections if p.name == "counts")
        assert (found.state, found.failure) == (ReaderState.HALTED, stopped.reason)
        assert watcher.health().is_healthy  # nothing is wrong with this process
        told = (await watcher.wait_for(sold, timeout=0.1)).error
        assert (type(told), told.reason) == (ViewStopped, stopped.reason)
    async with of(shared_url, counting("counts")) as newer:
        (await newer.wait_for(sold)).unwrap()
        assert {p.failure for p in newer.health().projections} == {None}
    async with Runtime(model, settings=settings) as watcher:
        assert {p.state for p in watcher.health().projections} == {ReaderState.FREE}


async def test_what_is_tried_again_for_longer_than_a_lease_does_not_cost_it(shared_url, register):
    async with of(shared_url) as shop, of(shared_url) as other:
        (await other.wait_for((await shop.commands.dispatch(register())).unwrap())).unwrap()
        park(shop, item_stock)
        tried, begun = [], monotonic()
        while not shop.health().projections[0].dead_letters:
            assert monotonic() - begun < 5
            await asyncio.sleep(0.01)
        follower, renewed = shop._parts.follower, set()
        shop._parts.pages.retry_known = lambda fold: tried.append(sleep(LEASE + 1.5))
        follower.readers["item_stock_v1"].is_looked_through = False  # it is new to it
        while not tried:
            renewed.add(follower._renewed)
            assert monotonic() - begun < LEASE + 12
            await asyncio.sleep(0.05)
        assert len(renewed) > 2


def park(shop, view):
    """Put something aside."""
    views = shop._store.views
    (at,) = views.checkpoints([view])
    letter = DeadLetter(1, "k", UUID(int=1), 1, "sold", "ValueError", datetime.now(UTC))
    assert views.write([Change(view, at, parked=[letter])], at.position, is_fence=True)


async def test_those_that_hold_different_views_do_not_keep_each_other_busy(
    shared_url, register, monkeypatch
):
    """On SQLite each write of one is a hint to the others, and renewing a lease is one."""
    ours, theirs = counting("ours"), counting("theirs")
    async with of(shared_url, ours) as shop, of(shared_url, theirs) as other:
        for each in (shop, other):
            written = (await each.commands.dispatch(register(str(id(each))))).unwrap()
            (await each.wait_for(written)).unwrap()
        held = []
        for each in (shop, other):
            views = each._store.views
            monkeypatch.setattr(
                views, "hold", lambda *args, hold=views.hold: held.append(1) or hold(*args)
            )
        await asyncio.sleep(3)
        states = [each.health().projections[1].state for each in (shop, other)]
    assert states == [ReaderState.LIVE] * 2
    assert 2 <= len(held) <= 14


# How soon events are seen ---------------------------------------------------------------------


async def test_an_event_is_seen_within_50_ms_in_the_process_that_wrote_it(
    store_url, register, sell
):
    async with open_items(store_url) as shop:
        (await shop.wait_for((await shop.commands.dispatch(register("A", 100))).unwrap())).unwrap()

        async def batch():
            delays = []
            for _ in range(2 * SAMPLES):
                await asyncio.sleep(0.013)
                receipt = (await shop.commands.dispatch(sell())).unwrap()
                begun = monotonic()
                (await shop.queries.dispatch(GetItem(sku="A"), after=receipt)).unwrap()
                delays.append(monotonic() - begun)
            return median(delays)

        assert min([await batch() for _ in range(2)]) < 0.05


@pytest.mark.parametrize("who_holds", ["the writer", "the reader"])
def test_an_event_is_seen_soon_in_another_process(shared_url, pair, who_holds):
    writer, reader = pair if who_holds == "the writer" else reversed(pair)
    limit = 0.3 if shared_url.startswith("sqlite") else 0.05
    sold = 0

    def batch():
        nonlocal sold
        waited, asked_for = [], []
        for n in range(SAMPLES):
            sleep(0.037 * (1 + n % 3))  # all are idle by then, and no look is just due
            position, committed = sale(writer)
            waited.append(moment(reader, f"wait {position}") - committed)
            sleep(0.037 * (1 + n % 3))
            sold += 2
            reader.tell(f"until sold {sold}")
            _, committed = sale(writer)
            asked_for.append(float(reader.says()) - committed)
        return max(median(waited), median(asked_for))

    # The machine may be busy for a while.
    assert batch() < limit or batch() < limit or batch() < limit


@pytest.mark.parametrize("who_holds", ["the writer", "the reader"])
def test_a_lost_hint_is_made_good_within_about_a_second(pair, who_holds):
    writer, reader = pair if who_holds == "the writer" else reversed(pair)
    assert asked(reader, "be deaf") == "ok"
    delays = []
    for n in range(4):
        sleep(0.23 * n)
        position, committed = sale(writer)
        delays.append(moment(reader, f"until position {position}") - committed)
    assert max(delays) < SOON


# What passes ----------------------------------------------------------------------------------


async def seen(watcher, receipt, seconds=12.0):
    """Wait, without hints from here, until a runtime's own follower has seen a position."""
    begun = monotonic()
    while min(p.position for p in watcher.health().projections) < receipt.position:
        assert monotonic() - begun < seconds
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("fault", ["cut", "half_close", "refuses", "swallows"])
async def test_following_goes_on_whatever_the_network_does(
    postgres_url, proxy, register, sell, fault
):
    settings = Settings(store=proxy.url, store_timeout=1, lock_timeout=1)
    beside = Settings(store=postgres_url, follow=False)
    async with open_items(settings=settings) as shop, open_items(settings=beside) as writer:
        await seen(shop, (await writer.commands.dispatch(register("A", 100))).unwrap())
        for n in (1, 2):
            if fault in {"refuses", "swallows"}:
                setattr(proxy, fault, True)
                proxy.cut()
                await asyncio.sleep(LEASE / 2 * n)
            else:
                getattr(proxy, fault)()
            sold = (await writer.commands.dispatch(sell())).unwrap()
            proxy.refuses = proxy.swallows = False
            await seen(shop, sold)
            row = (await writer.queries.dispatch(GetItem(sku="A"))).unwrap()
            assert row.units_sold == n
        begun = monotonic()
        while not shop.health().is_healthy:
            assert monotonic() - begun < 5
            await asyncio.sleep(0.01)
        assert {p.state for p in shop.health().projections} == {ReaderState.LIVE}


async def test_following_goes_on_after_the_server_was_started_anew(start_postgres, register, sell):
    server = start_postgres()
    shops = [open_items(server.get_uri()) for _ in range(2)]
    async with shops[0] as shop, shops[1] as other:
        (await shop.wait_for((await shop.commands.dispatch(register("A", 100))).unwrap())).unwrap()
        for _ in range(2):
            await asyncio.to_thread(server.stop)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(server.ensure_postgres_running)
        begun, sold = monotonic(), await shop.commands.dispatch(sell())
        while not sold.is_ok():
            assert monotonic() - begun < 15
            await asyncio.sleep(0.05)
            sold = await shop.commands.dispatch(sell())
        for each in shops:
            await seen(each, sold.unwrap())
        states = [{p.state for p in each.health().projections} for each in shops]
        found = (await other.queries.dispatch(GetItem(sku="A"))).unwrap()
    assert sorted(states, key=str) == [{ReaderState.LIVE}, {ReaderState.WATCHED}]
    assert found.units_sold >= 1


async def test_following_goes_on_after_a_lock_that_outlasted_the_lease(shared_url, register, sell):
    settings = Settings(store=shared_url, lock_timeout=1)
    async with open_items(settings=settings) as shop, open_items(settings=settings) as other:
        await shop.commands.dispatch(register("A", 100))
        (await other.wait_for((await shop.commands.dispatch(sell())).unwrap())).unwrap()
        await asyncio.to_thread(lock, shared_url, LEASE + 1.5)
        sold = (await shop.commands.dispatch(sell())).unwrap()
        for each in (shop, other):
            (await each.wait_for(sold)).unwrap()
            page = (await each.queries.dispatch(FindItems())).unwrap()
            assert [row.units_sold for row in page.rows] == [2]


def lock(url, seconds):
    """Let nobody write for a while."""
    if url.startswith("sqlite"):
        path = url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            sleep(seconds)
            connection.rollback()
    else:
        with psycopg.connect(url) as connection:
            connection.execute("LOCK TABLE leftfold_checkpoints IN EXCLUSIVE MODE")
            sleep(seconds)
            connection.rollback()
