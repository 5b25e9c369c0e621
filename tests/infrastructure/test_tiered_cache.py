"""Memory before Redis: what other processes change, and what an outage leaves behind."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from statistics import median
from threading import Thread
from time import monotonic

import pytest
from proxy import Proxy
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from waiting import until

from leftfold.infrastructure import Resilience
from leftfold.infrastructure.caches import InMemoryCache, RedisCache, TieredCache, tiered
from leftfold.infrastructure.caches import redis as redis_tier

pytestmark = [pytest.mark.anyio, pytest.mark.timed]


@asynccontextmanager
async def opened(*urls):
    """Open a cache for each address, as processes would."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                TieredCache(InMemoryCache(int), RedisCache(int, url, prefix="t"))
            )
            for url in urls
        ]


def source(value):
    async def load():
        await asyncio.sleep(0)
        return value

    return load


@pytest.fixture
def proxy(own_valkey):
    proxy = Proxy(own_valkey.address)
    proxy.url = own_valkey.url.replace(str(own_valkey.port), str(proxy.port))
    yield proxy
    proxy.close()


async def test_what_one_process_keeps_another_finds(own_valkey):
    async with opened(*[own_valkey.url] * 2) as (one, other):
        await one.set("a", 1, tags=["t"])
        assert await other.get("a") == 1
        assert (await other.entry("a")).tags == {"t"}
        client = Redis.from_url(own_valkey.url)
        client.delete("t:v:a")
        assert await other.get("a") == 1  # from its memory
        client.close()


WAYS = {
    "key": lambda cache: cache.delete("a"),
    "set": lambda cache: cache.set("a", 2),
    "pattern": lambda cache: cache.invalidate_pattern("a*"),
    "tag": lambda cache: cache.invalidate_tag("t"),
    "all": lambda cache: cache.clear(),
}


@pytest.mark.parametrize("way", WAYS)
async def test_what_one_process_changes_leaves_the_memory_of_another_within_50_ms(own_valkey, way):
    async with opened(*[own_valkey.url] * 2) as (one, other):
        took = []
        for _ in range(15):
            await one.set("a", 1, tags=["t"])
            await until(lambda: other._look("a") is None)
            assert await other.get("a") == 1
            await WAYS[way](one)
            took.append(await until(lambda: other._look("a") is None))
            assert await other.get("a") == (2 if way == "set" else None)
        assert median(took) < 0.05, took


@pytest.mark.parametrize("way", WAYS)
async def test_what_is_changed_in_its_redis_directly_leaves_memory_too(own_valkey, way):
    redis = RedisCache(int, own_valkey.url, prefix="t")
    async with TieredCache(InMemoryCache(int), redis) as cache:
        await cache.set("a", 1, tags=["t"])
        await WAYS[way](redis)
        await until(lambda: cache._look("a") is None)
        assert await cache.get("a") == (2 if way == "set" else None)


async def test_waiting_for_a_connection_takes_no_time_of_a_command(proxy, monkeypatch):
    monkeypatch.setattr(redis_tier, "TIMEOUT", 1.5)
    cache = RedisCache(int, proxy.url, prefix="t")
    await cache.set("a", 1)
    proxy.delay, begun = 0.02, monotonic()
    assert await asyncio.gather(*(cache.get("a") for _ in range(800))) == [1] * 800
    assert monotonic() - begun > redis_tier.TIMEOUT  # which each of them may take
    await cache.close()


async def test_a_value_on_its_way_is_not_kept_if_it_is_changed_meanwhile(own_valkey, monkeypatch):
    async with opened(*[own_valkey.url] * 2) as (one, other):
        await one.set("a", 1)
        await asyncio.sleep(0.2)  # its message was heard
        fetch, heard = other._tier.fetch, []
        tell = other._tier.heard
        monkeypatch.setattr(other._tier, "heard", lambda told: heard.append(told) or tell(told))

        async def fetch_late(key):
            kept = await fetch(key)
            before = len(heard)
            await one.set("a", 2)
            await until(lambda: len(heard) > before)
            return kept

        monkeypatch.setattr(other._tier, "fetch", fetch_late)
        assert await other.get("a") == 1
        monkeypatch.setattr(other._tier, "fetch", fetch)
        assert await other.get("a") == 2


def slowed(work):
    """Return the work with its answer held up, when it was done, and what lets the answer pass."""
    is_done, may_pass = asyncio.Event(), asyncio.Event()

    async def slowly(*args):
        answer = await work(*args)
        is_done.set()
        await may_pass.wait()
        return answer

    return slowly, is_done, may_pass


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["fetch", "put"])
async def test_a_change_heard_of_while_a_value_travels_keeps_it_out_of_memory(
    own_valkey, what, way
):
    async with opened(*[own_valkey.url] * 2) as (one, other):
        await one.set("a", 1, tags=["t"])
        await asyncio.sleep(0.1)  # the other has heard of it
        slowly, is_done, may_pass = slowed(getattr(other._tier, what))
        setattr(other._tier, what, slowly)
        work = other.get("a") if what == "fetch" else other.set("a", 1, tags=["t"])
        travelling = asyncio.ensure_future(work)
        await asyncio.wait_for(is_done.wait(), 10)
        await WAYS[way](one)
        await asyncio.sleep(0.1)
        may_pass.set()
        await travelling
        assert await other.get("a") == (2 if way == "set" else None)


async def test_a_message_that_is_none_empties_the_memory(own_valkey):
    async with opened(own_valkey.url) as (cache,):
        await cache.set("a", 1)
        client = Redis.from_url(own_valkey.url)
        client.publish("t:changed", "nonsense")
        await until(lambda: cache._look("a") is None)
        client.close()
        assert await cache.get("a") == 1
        assert cache.is_connected


async def test_without_redis_it_works_with_memory_alone():
    async with opened("redis://127.0.0.1:1") as (cache,):
        assert not cache.is_connected
        await cache.set("a", 1, tags=["t"])
        assert await cache.get("a") == 1
        assert await cache.get_or_load("b", source(2)) == 2
        assert await cache.invalidate_pattern("b") == 1
        assert await cache.invalidate_tag("t") == 1
        await cache.delete("a")
        await cache.clear()
        assert await cache.get("a") is None
        assert cache.health().state == "memory only"


@pytest.mark.parametrize("way", ["key", "set", "pattern", "tag", "all"])
async def test_what_is_changed_during_an_outage_is_not_read_from_redis_after_it(
    own_valkey, proxy, way
):
    async with opened(own_valkey.url, proxy.url) as (one, cut_off):
        await one.set("a", 1, tags=["t"])
        assert await cut_off.get("a") == 1
        proxy.close()
        await until(lambda: not cut_off.is_connected)
        await WAYS[way](cut_off)
        again = Proxy(own_valkey.address, proxy.port)
        await until(lambda: cut_off.is_connected)
        assert await cut_off.get("a") is None
        await until(lambda: one._look("a") is None, 1)
        assert await one.get("a") is None
        again.close()


async def test_what_is_changed_again_while_redis_is_told_of_it_is_told_again(own_valkey):
    async with opened(own_valkey.url) as (cache,):
        far = RedisCache(int, own_valkey.url, prefix="t")
        cache._tier.remove, told, may_go_on = slowed(cache._tier.remove)
        cache._lose()
        await cache.delete("a")
        await asyncio.wait_for(told.wait(), 10)
        await far.set("a", 1)  # as was read before what comes next
        await cache.delete("a")
        may_go_on.set()
        await until(lambda: cache.is_connected)
        assert await cache.get("a") is None
        await far.close()


async def test_what_could_not_be_told_is_told_at_the_next_recovery(own_valkey):
    async with opened(own_valkey.url) as (cache,):
        await cache.set("a", 1)
        remove, calls = cache._tier.remove, []

        async def failing_once(change):
            calls.append(change)
            if len(calls) == 1:
                raise ConnectionError
            return await remove(change)

        cache._tier.remove = failing_once
        cache._lose()
        await cache.delete("a")
        await until(lambda: cache.is_connected)
        assert calls == calls[:1] * 2
        assert await cache.get("a") is None


async def test_a_listener_that_fails_in_any_way_begins_anew(own_valkey, monkeypatch, caplog):
    async with opened(*[own_valkey.url] * 2) as (one, other):
        await one.set("a", 1)
        assert await other.get("a") == 1
        with monkeypatch.context() as patch:
            patch.setattr(other._tier, "heard", lambda _: 1 / 0)
            await one.set("a", 2)
            await until(lambda: not other.is_connected)
        await until(lambda: other.is_connected)
        assert await other.get("a") == 2
        assert "ZeroDivisionError" in caplog.text


async def test_a_client_that_connects_anew_by_itself_is_noticed(own_valkey, proxy):
    client = AsyncRedis.from_url(proxy.url, retry=Retry(ConstantBackoff(0.01), 3))
    async with opened(own_valkey.url, client) as (one, other):
        await one.set("a", 1)
        assert await other.get("a") == 1
        proxy.cut()
        await until(lambda: not other.is_connected, 5)
        assert other._look("a") is None
    await client.aclose()


async def test_it_can_be_closed_at_any_step_of_connecting(own_valkey):
    for steps in range(40):
        cache = TieredCache(InMemoryCache(int), RedisCache(int, own_valkey.url, prefix="t"))
        asked = asyncio.ensure_future(cache.get("a"))
        for _ in range(steps):
            await asyncio.sleep(0)
        await asyncio.wait_for(cache.close(), 5)
        assert await asyncio.wait_for(asked, 5) is None


async def test_a_load_under_way_does_not_open_it_again(own_valkey):
    for steps in range(20):
        cache = TieredCache(InMemoryCache(int), RedisCache(int, own_valkey.url, prefix="t"))
        asked = asyncio.ensure_future(cache.get_or_load("a", source(1)))
        for _ in range(steps):
            await asyncio.sleep(0)
        await cache.close()
        assert await asyncio.wait_for(asked, 5) == 1
        assert await cache.get("b") is None
        assert not cache.is_connected
        assert cache._listening is None or cache._listening.done()
    await cache.open()
    assert cache.is_connected
    await cache.close()


async def test_after_a_closing_that_was_given_up_it_can_be_closed_or_opened(own_valkey):
    for steps in range(20):
        cache = TieredCache(InMemoryCache(int), RedisCache(int, own_valkey.url, prefix="t"))
        opening = asyncio.ensure_future(cache.open())
        for _ in range(steps):
            await asyncio.sleep(0)
        closing = asyncio.ensure_future(cache.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        if steps % 2:
            await asyncio.wait_for(cache.open(), 5)
            assert cache.is_connected
        await asyncio.wait_for(cache.close(), 5)
        assert cache._listening is None or cache._listening.done()
        await asyncio.wait_for(opening, 5)


def test_one_that_was_not_closed_does_not_keep_its_loop_from_ending(own_valkey):
    async def use(steps):
        cache = TieredCache(InMemoryCache(int), RedisCache(int, own_valkey.url, prefix="t"))
        opening = asyncio.ensure_future(cache.open())
        for _ in range(steps):
            await asyncio.sleep(0)
        opening.cancel()

    for steps in range(26):
        thread = Thread(target=lambda n=steps: asyncio.run(use(n)), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), steps


async def test_closing_that_was_given_up_leaves_room_for_commands(own_valkey):
    cache = RedisCache(int, own_valkey.url, prefix="t")
    await cache.set("a", 1)
    for steps in range(4):
        closing = asyncio.ensure_future(cache.close())
        for _ in range(steps):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        assert await asyncio.wait_for(cache.get("a"), 5) == 1
    await cache.close()


async def test_a_command_that_hangs_does_not_hold_up_closing(proxy):
    client = AsyncRedis.from_url(proxy.url, socket_timeout=None)
    cache = RedisCache(int, client, prefix="t", guard=Resilience("patient"))
    await cache.set("a", 1)
    proxy.swallows = True
    asked = asyncio.ensure_future(cache.get("a"))
    await asyncio.sleep(0.02)
    await asyncio.wait_for(cache.close(), 2)
    asked.cancel()


async def test_an_address_that_swallows_all_does_not_hold_up_the_first_use():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        client = AsyncRedis(
            port=silent.getsockname()[1], socket_timeout=None, socket_connect_timeout=None
        )
        async with asyncio.timeout(5), opened(client) as (cache,):
            await cache.set("a", 1)
            assert await cache.get("a") == 1
            assert not cache.is_connected
        await client.aclose()


async def test_memory_is_dropped_whole_after_a_lost_connection(own_valkey, proxy):
    async with opened(own_valkey.url, proxy.url) as (one, other):
        await one.set("a", 1)
        await asyncio.sleep(0.1)  # the other has heard of it
        assert await other.get("a") == 1
        assert other._look("a") is not None
        proxy.close()
        await one.set("a", 2)  # of which the other does not hear
        await until(lambda: not other.is_connected)
        assert other._look("a") is None
        again = Proxy(own_valkey.address, proxy.port)
        await until(lambda: other.is_connected)
        assert await other.get("a") == 2
        again.close()


async def test_more_changes_than_are_remembered_clear_all(own_valkey, proxy, monkeypatch):
    monkeypatch.setattr(tiered, "JOURNAL", 10)
    async with opened(own_valkey.url, proxy.url) as (one, other):
        await one.set("far", 1)
        proxy.close()
        await until(lambda: not other.is_connected)
        for number in range(50):
            await other.delete(str(number))
        assert len(other._journal) == 1
        again = Proxy(own_valkey.address, proxy.port)
        await until(lambda: other.is_connected)
        assert await one.get("far") is None
        again.close()


class Shop:
    """A number that changes, and callers who read it through caches, at any time rightly."""

    def __init__(self, one, other, record):
        self.one, self.other, self.record = one, other, record
        self.number = 0
        self.answers = Counter()
        self.slowest = 0.0
        self._is_over = False

    async def __aenter__(self):
        self._tasks = [
            asyncio.ensure_future(work)
            for work in (self._changes(), *map(self._reads, ["one", "other"]))
        ]
        await asyncio.sleep(0.2)
        return self

    async def __aexit__(self, *_):
        await until(lambda: self.one.is_connected and self.other.is_connected)
        self._is_over = True
        await asyncio.gather(*self._tasks)
        await asyncio.sleep(0.2)
        for cache in (self.one, self.other):
            assert await cache.get_or_load("a", self._load, 60) == self.number
        self.record("outage", f"{dict(self.answers)}, slowest answer {self.slowest:.2f} s")

    async def _load(self):
        number = self.number
        await asyncio.sleep(0.001)
        return number

    async def _changes(self):
        """Change the number, tell the cache, and read what was written."""
        while not self._is_over:
            self.number += 1
            await self._timed(self.one.delete("a"))
            assert await self._timed(self.one.get_or_load("a", self._load, 60)) == self.number
            self.answers["changed"] += 1
            await asyncio.sleep(0.005)

    async def _reads(self, name):
        """Read: in the process of the writer never less than was told the cache before."""
        cache = getattr(self, name)
        while not self._is_over:
            told = self.answers["changed"]
            number = await self._timed(cache.get_or_load("a", self._load, 60))
            assert number >= told or name == "other"
            self.answers[f"{name} connected" if cache.is_connected else f"{name} alone"] += 1
            await asyncio.sleep(0.002)

    async def _timed(self, work):
        begun = monotonic()
        try:
            return await work
        finally:
            self.slowest = max(self.slowest, monotonic() - begun)


async def outage(shop):
    await until(lambda: not shop.one.is_connected and not shop.other.is_connected)
    before = shop.answers["changed"]
    await until(lambda: shop.answers["changed"] > before + 20)


async def test_a_killed_server_and_its_return_under_load(own_valkey, record_property):
    async with opened(*[own_valkey.url] * 2) as caches, Shop(*caches, record_property) as shop:
        for _ in range(2):
            own_valkey.kill()
            await outage(shop)
            await asyncio.to_thread(own_valkey.start)
            await until(lambda: shop.one.is_connected and shop.other.is_connected)
    assert shop.slowest < 2


async def test_a_paused_server_under_load(own_valkey, record_property):
    async with opened(*[own_valkey.url] * 2) as caches, Shop(*caches, record_property) as shop:
        for _ in range(2):
            own_valkey.signal(signal.SIGSTOP)
            await outage(shop)
            own_valkey.signal(signal.SIGCONT)
            await until(lambda: shop.one.is_connected and shop.other.is_connected)
    assert shop.slowest < 3


async def test_a_network_that_cuts_half_closes_swallows_and_delays_under_load(
    own_valkey, proxy, record_property
):
    async with opened(*[proxy.url] * 2) as caches, Shop(*caches, record_property) as shop:
        for harm in (proxy.cut, proxy.half_close, proxy.cut):
            harm()
            await until(lambda: shop.one.is_connected and shop.other.is_connected)
            await asyncio.sleep(0.1)
        proxy.swallows = True
        await outage(shop)
        proxy.swallows = False
        proxy.cut()
        await until(lambda: shop.one.is_connected and shop.other.is_connected)
        proxy.delay = 0.01
        await asyncio.sleep(0.3)
        proxy.delay = 0
    assert shop.slowest < 3


@pytest.mark.parametrize("is_tiered", [False, True])
async def test_whatever_interleaves_nobody_is_served_what_was_removed(own_valkey, is_tiered):
    chance = Random(7)
    numbers = dict.fromkeys("abcd", 0)
    is_over = False

    async def load(key):
        number = numbers[key]
        await asyncio.sleep(chance.random() * 0.003)
        return number

    async def ask(cache, key):
        return await cache.get_or_load(key, lambda: load(key), 60, tags=[f"t{key}"])

    async def change(cache):
        while not is_over:
            key = chance.choice("abcd")
            numbers[key] += 1
            least = numbers[key]
            remove = chance.choice(
                [
                    lambda key=key: cache.delete(key),
                    lambda key=key: cache.invalidate_pattern(f"{key}*"),
                    lambda key=key: cache.invalidate_tag(f"t{key}"),
                    cache.clear,
                ]
            )
            await remove()
            assert await ask(cache, key) >= least
            await asyncio.sleep(chance.random() * 0.004)

    async def read(cache):
        while not is_over:
            await ask(cache, chance.choice("abcd"))
            await asyncio.sleep(0)

    redis = [RedisCache(int, own_valkey.url, prefix="t") for _ in range(3)]
    caches = [TieredCache(InMemoryCache(int), each) if is_tiered else each for each in redis]
    work = [change(each) for each in caches[:2]] + [read(each) for each in caches]
    tasks = [asyncio.ensure_future(each) for each in work]
    await asyncio.sleep(3)
    is_over = True
    await asyncio.gather(*tasks)
    await asyncio.sleep(0.1)
    for cache in caches:
        assert {key: await ask(cache, key) for key in "abcd"} == numbers
        assert not cache._flights
        assert not getattr(cache, "_travels", ())
        await cache.close()
