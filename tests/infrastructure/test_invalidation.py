"""Views that change delete from caches what was made of the changed rows, and no more."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import sleep
from uuid import UUID, uuid4

import pytest
from proxy import Proxy
from waiting import until

from leftfold.application import Projection, cached, invalidating
from leftfold.application.checkpoints import Change, DeadLetter
from leftfold.application.items import GetItem, ItemRow, item_model, item_stock
from leftfold.domain.items import Item, ItemRegistered
from leftfold.infrastructure import (
    CacheUnavailableError,
    InMemoryCache,
    RedisCache,
    Runtime,
    Settings,
    TieredCache,
    follower,
)
from leftfold.infrastructure.items import open_items

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True)
class Named:
    name: str


def rows_of(cache, name="rows_of_items", **options):
    return invalidating(name, item_stock, cache, tags=lambda key: [f"item:{key}"], **options)


def by_item(query):
    return [f"item:{Item.id_of(query.sku).hex}"]


def opened(url, cache, **options):
    model = replace(item_model, subscribers=(rows_of(cache, **options),))
    around = [cached(GetItem, cache, 60, key=lambda q: q.sku, tags=by_item)]
    return Runtime(model, settings=Settings(store=url), middleware=around)


async def until_gone(*caches):
    for cache in caches:
        await until(lambda cache=cache: is_gone(cache))


async def is_gone(cache):
    return await cache.get("A") is None


async def test_a_page_deletes_what_was_made_of_its_rows_and_no_more(store_url, register, sell):
    cache = InMemoryCache(ItemRow, name="rows")
    async with opened(store_url, cache) as shop:
        for sku in ("A", "B"):
            written = (await shop.commands.dispatch(register(sku, 9))).unwrap()
        (await shop.catch_up()).unwrap()
        for sku in ("A", "B"):
            await shop.queries.dispatch(GetItem(sku=sku), after=written)
        await shop.commands.dispatch(sell("A"))

        await until_gone(cache)
        assert (await cache.get("B")).on_hand == 9
        assert (await shop.queries.dispatch(GetItem(sku="A"))).unwrap().on_hand == 8


async def test_each_process_sees_to_its_own_cache(shared_url, register, sell):
    mine, theirs = InMemoryCache(ItemRow, name="mine"), InMemoryCache(ItemRow, name="theirs")
    async with opened(shared_url, mine) as one, opened(shared_url, theirs) as two:
        written = (await one.commands.dispatch(register("A", 9))).unwrap()
        for shop in (one, two):
            (await shop.catch_up()).unwrap()
            assert (await shop.queries.dispatch(GetItem(sku="A"), after=written)).is_ok()
        assert await theirs.get("A") is not None
        await one.commands.dispatch(sell("A"))

        await until_gone(mine, theirs)


async def test_a_cache_that_processes_share_is_seen_to_after_a_crash(
    shared_url, valkey, register, sell
):
    cache = RedisCache(ItemRow, valkey.url, prefix=uuid4().hex)
    try:
        async with opened(shared_url, cache, everywhere=False) as shop:
            written = (await shop.commands.dispatch(register("A", 9))).unwrap()
            (await shop.catch_up()).unwrap()
            assert (await shop.queries.dispatch(GetItem(sku="A"), after=written)).is_ok()
        # The view gets on, and the process ends before the cache is told.
        async with Runtime(item_model, shared_url) as shop:
            await shop.commands.dispatch(sell("A"))
            (await shop.catch_up()).unwrap()
        assert (await cache.get("A")).on_hand == 9
        async with opened(shared_url, cache, everywhere=False) as shop:
            await until_gone(cache)
            assert (await shop.queries.dispatch(GetItem(sku="A"))).unwrap().on_hand == 8
    finally:
        await cache.close()


async def test_two_tiers_are_each_seen_to_though_a_process_ends_while_redis_is_away(
    shared_url, valkey, register, sell
):
    proxy, prefix = Proxy(valkey.address), uuid4().hex
    url = valkey.url.replace(str(valkey.port), str(proxy.port))

    @asynccontextmanager
    async def shop():
        redis = RedisCache(ItemRow, url, prefix=prefix)
        async with TieredCache(InMemoryCache(ItemRow), redis) as rows:
            both = rows_of(rows), rows_of(redis, name="shared_rows", everywhere=False)
            model = replace(item_model, subscribers=both)
            around = [cached(GetItem, rows, 60, key=lambda q: q.sku, tags=by_item)]
            async with Runtime(model, shared_url, middleware=around) as runtime:
                yield runtime

    async def says(runtime, on_hand):
        return (await runtime.queries.dispatch(GetItem(sku="A"))).unwrap().on_hand == on_hand

    async with open_items(shared_url):  # it holds the view all the while, and knows no cache
        async with shop() as runtime:
            written = (await runtime.commands.dispatch(register("A", 9))).unwrap()
            await asyncio.sleep(1.2)  # a look
            assert (await runtime.queries.dispatch(GetItem(sku="A"), after=written)).is_ok()
            proxy.refuses = True
            proxy.cut()
            await runtime.commands.dispatch(sell("A"))
            await until(lambda: says(runtime, 8))
        proxy.refuses = False
        async with shop() as runtime:
            await until(lambda: says(runtime, 8))
    proxy.close()


async def test_what_a_view_has_not_seen_when_the_process_begins_is_told_too(
    shared_url, register, sell
):
    async with Runtime(item_model, shared_url) as shop:
        await shop.commands.dispatch(register("A", 9))
        (await shop.catch_up()).unwrap()
    async with Runtime(item_model, settings=Settings(store=shared_url, follow=False)) as shop:
        (await shop.commands.dispatch(sell("A"))).unwrap()
    cache = InMemoryCache(ItemRow, name="rows")
    model = replace(item_model, subscribers=(rows_of(cache),))
    around = [cached(GetItem, cache, 60, key=lambda q: q.sku, tags=by_item)]
    settings = Settings(store=shared_url, follow=False)
    async with Runtime(model, settings=settings, middleware=around) as shop:
        assert (await shop.queries.dispatch(GetItem(sku="A"))).unwrap().on_hand == 9
        shop.follow()

        await until_gone(cache)


@pytest.mark.parametrize("mends", [Runtime.retry, Runtime.rebuild])
@pytest.mark.parametrize("is_another", [False, True])
async def test_what_changes_rows_without_an_event_clears_the_cache(
    shared_url, register, mends, is_another
):
    cache = InMemoryCache(ItemRow, name="rows")
    async with opened(shared_url, cache) as shop, open_items(shared_url) as other:
        written = (await shop.commands.dispatch(register("A", 9))).unwrap()
        (await shop.catch_up()).unwrap()
        row = (await shop.queries.dispatch(GetItem(sku="A"), after=written)).unwrap()
        await asyncio.sleep(0.2)
        assert await cache.get("A") == row  # to be looked at changes nothing
        await mends(other if is_another else shop, "item_stock")

        await until_gone(cache)


async def test_what_is_given_up_clears_the_cache(shared_url, register):
    cache = InMemoryCache(ItemRow, name="rows")
    async with opened(shared_url, cache) as shop:
        written = (await shop.commands.dispatch(register("A", 9))).unwrap()
        (await shop.catch_up()).unwrap()
        views = shop._store.views
        (at,) = views.checkpoints([item_stock])
        letter = DeadLetter(1, "k", UUID(int=1), 1, "sold", "ValueError", datetime.now(UTC))
        assert views.write([Change(item_stock, at, parked=[letter])], at.position)
        row = (await shop.queries.dispatch(GetItem(sku="A"), after=written)).unwrap()
        await asyncio.sleep(1.2)  # a look
        assert await cache.get("A") == row
        assert await shop.drop_dead_letters("item_stock") == 1

        await until_gone(cache)


async def test_a_cache_that_processes_share_is_cleared_too(shared_url, valkey, register):
    cache, cleared = RedisCache(ItemRow, valkey.url, prefix=uuid4().hex), []
    clear = cache.clear

    async def clearing():
        await clear()
        cleared.append(True)  # until it ends, what is loaded meanwhile is not kept

    cache.clear = clearing
    try:
        async with opened(shared_url, cache, everywhere=False) as shop:
            written = (await shop.commands.dispatch(register("A", 9))).unwrap()
            (await shop.catch_up()).unwrap()
            assert (await shop.queries.dispatch(GetItem(sku="A"), after=written)).is_ok()
            assert (await cache.get("A")).on_hand == 9
            assert len(cleared) == 1  # to begin with
            await shop.rebuild("item_stock")

            await until(lambda: len(cleared) == 2)
            assert await is_gone(cache)
            assert (await shop.queries.dispatch(GetItem(sku="A"))).is_ok()
            await asyncio.sleep(1.2)  # a look
            assert (await cache.get("A")).on_hand == 9
            assert len(cleared) == 2
    finally:
        await cache.close()


async def test_a_cache_that_is_away_when_a_view_was_built_anew_is_cleared_later(
    shared_url, register, monkeypatch
):
    cache, failures = InMemoryCache(ItemRow, name="rows"), []
    clear = cache.clear

    async def failing():
        if failures:
            raise failures.pop()
        await clear()

    monkeypatch.setattr(cache, "clear", failing)
    async with opened(shared_url, cache) as shop:
        written = (await shop.commands.dispatch(register("A", 9))).unwrap()
        (await shop.catch_up()).unwrap()
        assert (await shop.queries.dispatch(GetItem(sku="A"), after=written)).is_ok()
        failures += [CacheUnavailableError("x", "away")] * 3
        await shop.rebuild("item_stock")

        await until_gone(cache)
        assert failures == []


async def test_a_cache_that_cannot_be_cleared_is_seen_to_event_by_event_all_the_same(
    shared_url, register, sell, monkeypatch, caplog
):
    cache = InMemoryCache(ItemRow, name="rows")

    async def failing():
        raise ZeroDivisionError

    monkeypatch.setattr(cache, "clear", failing)
    async with opened(shared_url, cache) as shop:
        written = (await shop.commands.dispatch(register("A", 9))).unwrap()
        (await shop.catch_up()).unwrap()
        await shop.rebuild("item_stock")

        said = "rows_of_items does not begin anew: ZeroDivisionError"
        await until(lambda: said in caplog.text)
        assert (await shop.queries.dispatch(GetItem(sku="A"), after=written)).is_ok()
        await shop.commands.dispatch(sell("A"))

        await until_gone(cache)


async def test_what_comes_while_a_view_is_behind_is_not_forgotten_with_the_clearing(
    store_url, register, monkeypatch
):
    monkeypatch.setattr(follower, "IDLE", 60)  # no look makes it good
    slow = Projection("slow", version=1, row=Named)

    @slow.on(ItemRegistered)
    def registered(row, event):
        sleep(0.1)
        return Named(event.name)

    told, cache = [], InMemoryCache(Named, name="rows")
    rows = invalidating("rows", slow, cache, keys=lambda key: told.append(key) or [key])
    model = replace(item_model, projections=(slow,), queries=(), subscribers=(rows,))
    async with Runtime(model, settings=Settings(store=store_url)) as shop:
        (await shop.commands.dispatch(register("A", 9))).unwrap()
        (await shop.catch_up()).unwrap()
        await shop.commands.dispatch(register("B", 9))
        await shop.retry("slow")
        await until(lambda: told == [Item.id_of("A").hex, Item.id_of("B").hex])
