"""The life of a runtime: what open and close leave behind when something is in their way."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time

import pytest
from eventsourcing.persistence import OperationalError

from leftfold.application import (
    AlreadyHandledError,
    Command,
    EventStoreUnavailable,
    Model,
    Query,
    Service,
    ShuttingDown,
)
from leftfold.application.items import GetItem, Items, SellStock
from leftfold.domain import Err, Ok
from leftfold.domain.items import Item, ItemError
from leftfold.infrastructure import NotRunningError, Runtime, Settings, StoreUnavailableError
from leftfold.infrastructure.follower import Follower
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.platform import OWN_THREADS, SystemPlatform

pytestmark = pytest.mark.anyio


class Waits(Command[int, ItemError]):
    pass


class Asks(Query[object, ItemError]):
    pass


class Blocker:
    """Handlers that begin, and go on when told."""

    def __init__(self):
        self.has_begun = asyncio.Event()
        self.may_end = asyncio.Event()

    async def handle(self, _message):
        self.has_begun.set()
        await self.may_end.wait()
        return Ok(1)


@pytest.fixture
def blocker():
    return Blocker()


@pytest.fixture
async def longest_freeze():
    """How long the event loop stood still at most, in seconds, as a function."""
    gaps = [0.0]

    async def tick():
        while True:
            last = time.monotonic()
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic() - last)

    ticking = asyncio.create_task(tick())
    yield lambda: max(gaps)
    ticking.cancel()


def threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("leftfold")]


async def test_a_close_that_is_given_up_goes_on_and_another_waits_for_it(sqlite_url, blocker):
    shop = await open_items(sqlite_url).open()
    shop.commands.add(Waits.handled_by(blocker.handle))
    working = asyncio.create_task(shop.commands.dispatch(Waits()))
    await blocker.has_begun.wait()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(shop.close(), 0.05)
    assert await shop.commands.dispatch(Waits()) == Err(ShuttingDown())
    blocker.may_end.set()
    await shop.close()
    assert await working == Ok(1)
    assert threads() == []
    with pytest.raises(NotRunningError):
        _ = shop.commands


async def test_a_close_that_is_given_up_during_a_page_goes_on(sqlite_url, register, monkeypatch):
    shop = await open_items(sqlite_url).open()
    ends, head = threading.Event(), shop._store.log.head
    monkeypatch.setattr(shop._store.log, "head", lambda: ends.wait() and head())
    (await shop.commands.dispatch(register())).unwrap()
    await asyncio.sleep(0.05)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(shop.close(), 0.05)
    ends.set()
    await shop.close()
    assert threads() == []
    assert shop._store._file is None


async def test_a_closed_runtime_can_be_opened_again(sqlite_url, register):
    shop = open_items(sqlite_url)
    async with shop:
        (await shop.commands.dispatch(register())).unwrap()
    async with shop:
        assert await shop.catch_up() == Ok(None)


async def test_closing_twice_at_once_closes_once(sqlite_url):
    shop = await open_items(sqlite_url).open()
    assert await asyncio.gather(shop.close(), shop.close()) == [None, None]


async def test_a_store_that_fails_to_close_is_said_and_the_runtime_is_closed(
    sqlite_url, monkeypatch
):
    def fails():
        raise OSError("no")

    shop = await open_items(sqlite_url).open()
    with monkeypatch.context() as patched:
        patched.setattr(shop._store, "close", fails)
        with pytest.raises(OSError, match="no"):
            await shop.close()
    with pytest.raises(NotRunningError):
        shop.health()
    assert threads() == []
    shop._store.close()


async def test_closing_waits_for_the_queries_under_way(sqlite_url, blocker, register):
    shop = await open_items(sqlite_url).open()
    receipt = (await shop.commands.dispatch(register())).unwrap()
    queries = shop.queries

    async def asks(query):
        await blocker.handle(query)
        return await queries._handlings[GetItem].handler(GetItem(sku="A"))

    queries.add(Asks.handled_by(asks))
    asking = asyncio.create_task(queries.dispatch(Asks(), after=receipt))
    await blocker.has_begun.wait()
    closing = asyncio.create_task(shop.close())
    await asyncio.sleep(0.05)
    assert await queries.dispatch(GetItem(sku="A")) == Err(ShuttingDown())
    blocker.may_end.set()
    assert (await asking).unwrap().sku == "A"
    await closing


async def test_a_bus_held_over_closing_answers_that_it_is_shut_down(store_url, register):
    async with open_items(store_url) as shop:
        commands, queries = shop.commands, shop.queries
    assert await commands.dispatch(register()) == Err(ShuttingDown())
    assert await queries.dispatch(GetItem(sku="A")) == Err(ShuttingDown())


async def test_a_query_that_never_ends_does_not_keep_a_runtime_from_closing(
    sqlite_url, blocker, monkeypatch
):
    monkeypatch.setattr("leftfold.infrastructure.runtime.PATIENCE", 0.1)
    shop = await open_items(settings=Settings(store=sqlite_url, command_timeout=0.1)).open()
    shop.queries.add(Asks.handled_by(blocker.handle))
    asking = asyncio.create_task(shop.queries.dispatch(Asks()))
    await blocker.has_begun.wait()
    async with asyncio.timeout(5):
        await shop.close()
    blocker.may_end.set()
    await asking


async def test_an_open_that_fails_after_the_store_was_opened_leaves_nothing(sqlite_url):
    class SellsToo(Service):
        aggregates = (Item,)

        def handlers(self):
            yield SellStock.handled_by(lambda _: Ok(None))

    shop = Runtime(Model(aggregates=(Item,), services=(Items, SellsToo)), sqlite_url)
    with pytest.raises(AlreadyHandledError):
        await shop.open()
    assert threads() == []
    assert shop._store._file is None
    await shop.close()


async def test_an_open_that_fails_leaves_no_task(sqlite_url, monkeypatch):
    shop = open_items(sqlite_url)
    before = asyncio.all_tasks()

    async def fails(_follower):
        raise OperationalError

    monkeypatch.setattr(Follower, "begin", fails)
    with pytest.raises(StoreUnavailableError):
        await shop.open()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_a_cancelled_open_leaves_nothing_and_does_not_freeze_the_loop(
    sqlite_url, longest_freeze
):
    async with open_items(sqlite_url):
        pass
    locked = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    locked.execute("BEGIN IMMEDIATE")
    shop = open_items(sqlite_url)
    opening = asyncio.create_task(shop.open())
    await asyncio.sleep(0.2)
    opening.cancel()
    await asyncio.sleep(0.2)
    locked.close()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert threads() == []
    assert shop._store._file is None
    assert longest_freeze() < 1
    async with shop:
        assert shop.health().is_healthy


async def test_one_that_is_yet_being_opened_is_not_closed(sqlite_url, register):
    for pause in range(10):
        shop = open_items(sqlite_url)
        opening = asyncio.create_task(shop.open())
        await asyncio.sleep(pause / 1_000)
        was_open = opening.done()
        await shop.close()
        await opening
        if not was_open:
            (await shop.commands.dispatch(register(f"S{pause}"))).unwrap()
        await shop.close()


async def test_closing_does_not_freeze_the_loop_while_a_thread_is_at_work(
    sqlite_url, longest_freeze
):
    async with open_items(sqlite_url) as shop:
        working = asyncio.create_task(shop._platform.in_thread(time.sleep, 1.0))
        await asyncio.sleep(0.05)
    await working
    assert longest_freeze() < 0.5


async def test_closing_leaves_a_thread_behind_that_never_ends(sqlite_url, monkeypatch):
    monkeypatch.setattr("leftfold.infrastructure.platform.PATIENCE", 0.1)
    ends = threading.Event()
    shop = await open_items(sqlite_url).open()
    working = asyncio.create_task(shop._platform.in_thread(ends.wait))
    await asyncio.sleep(0.05)
    async with asyncio.timeout(5):
        await shop.close()
    ends.set()
    await working


async def test_handlers_that_block_leave_the_runtimes_own_threads_alone():
    platform, ends = SystemPlatform(), threading.Event()
    blocking = [
        asyncio.create_task(platform.in_own_thread(ends.wait)) for _ in range(OWN_THREADS + 1)
    ]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        assert await platform.in_thread(len, "four") == 4
        await platform.close_then(lambda: None)
    ends.set()
    await asyncio.gather(*blocking)


async def test_catching_up_without_the_database_is_an_answer(sqlite_url, monkeypatch):
    def fails():
        raise OperationalError("the server is away")

    async with open_items(sqlite_url) as shop:
        with monkeypatch.context() as patched:
            patched.setattr(shop._store.log, "head", fails)
            assert await shop.catch_up() == Err(EventStoreUnavailable("the server is away"))
