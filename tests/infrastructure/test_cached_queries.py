"""Answers of queries from caches: as new as asked for, and there while the store is not."""

from __future__ import annotations

import asyncio
from collections import Counter
from uuid import uuid4

import pytest

from leftfold.application import EventStoreUnavailable, cached
from leftfold.application.items import FindItems, GetItem, ItemHistory, ItemRow
from leftfold.application.projection import Page
from leftfold.domain import DomainEvent, Err
from leftfold.domain.items import ItemNotFound
from leftfold.infrastructure import InMemoryCache, RedisCache, Settings, TieredCache
from leftfold.infrastructure.items import open_items

pytestmark = [pytest.mark.anyio, pytest.mark.timed]


class Asked:
    """Counts what gets as far as the handlers."""

    def __init__(self):
        self.names = Counter()

    async def __call__(self, dispatch, call_next):
        self.names[dispatch.name] += 1
        return await call_next(dispatch)


@pytest.fixture(params=["memory", "redis", "tiered"])
async def make(request, valkey):
    made = []
    prefix = uuid4().hex

    def make(kind, **options):
        memory = InMemoryCache(kind, **options)
        if request.param == "memory":
            return memory
        redis = RedisCache(kind, valkey.url, prefix=f"{prefix}:{kind}", **options)
        made.append(redis)
        if request.param == "tiered":
            made.append(TieredCache(memory, redis))
        return made[-1]

    yield make
    for cache in reversed(made):
        await cache.close()


async def test_an_answer_is_kept_for_its_time(store_url, make, register):
    asked = Asked()
    middleware = [cached(GetItem, make(ItemRow), 60), asked]
    async with open_items(store_url, middleware=middleware) as shop:
        receipt = (await shop.commands.dispatch(register("A"))).unwrap()
        first = (await shop.queries.dispatch(GetItem(sku="A"), after=receipt)).unwrap()
        for _ in range(5):
            assert (await shop.queries.dispatch(GetItem(sku="A"))).unwrap() == first
        assert asked.names["GetItem"] == 1
        await shop.commands.dispatch(register("B"))
        await shop.catch_up()
        assert (await shop.queries.dispatch(GetItem(sku="B"))).unwrap().sku == "B"
        assert asked.names["GetItem"] == 2


async def test_after_holds_through_the_cache(store_url, make, register, sell):
    asked = Asked()
    middleware = [cached(GetItem, make(ItemRow), 60), asked]
    async with open_items(store_url, middleware=middleware) as shop:
        await shop.commands.dispatch(register("A", 1_000))
        for sold in range(1, 30):
            receipt = (await shop.commands.dispatch(sell("A"))).unwrap()
            row = (await shop.queries.dispatch(GetItem(sku="A"), after=receipt)).unwrap()
            assert row.units_sold >= sold
            again = (await shop.queries.dispatch(GetItem(sku="A"), after=receipt)).unwrap()
            assert again == row
        assert asked.names["GetItem"] <= 29


async def test_after_holds_for_histories_too(store_url, register, sell):
    cache = InMemoryCache(tuple[DomainEvent, ...])  # payloads are what JSON would not keep
    async with open_items(store_url, middleware=[cached(ItemHistory, cache, 60)]) as shop:
        await shop.commands.dispatch(register("A", 1_000))
        for sold in range(1, 10):
            receipt = (await shop.commands.dispatch(sell("A"))).unwrap()
            told = (await shop.queries.dispatch(ItemHistory(sku="A"), after=receipt)).unwrap()
            assert len(told) == sold + 1


async def test_keys_and_tags_are_the_programs_own(store_url, make, register, sell):
    cache = make(ItemRow)
    around = cached(
        GetItem, cache, None, key=lambda q: f"item:{q.sku}", tags=lambda q: ["items", q.sku]
    )
    async with open_items(store_url, middleware=[around]) as shop:
        receipt = (await shop.commands.dispatch(register("A"))).unwrap()
        await shop.queries.dispatch(GetItem(sku="A"), after=receipt)
        entry = await cache.entry("item:A")
        assert entry.tags == {"items", "A"}
        assert entry.position >= receipt.position
        receipt = (await shop.commands.dispatch(sell("A"))).unwrap()
        await shop.wait_for(receipt)
        assert await cache.invalidate_tag("items") == 1
        assert (await shop.queries.dispatch(GetItem(sku="A"))).unwrap().units_sold == 1


async def test_other_fields_are_another_answer(store_url, make, register):
    around = cached(FindItems, make(Page[ItemRow]), 60)
    async with open_items(store_url, middleware=[around]) as shop:
        await shop.commands.dispatch_all([register(f"S{n}") for n in range(3)])
        await shop.catch_up()
        sizes = []
        for limit in (1, 2, 1):
            page = (await shop.queries.dispatch(FindItems(limit=limit))).unwrap()
            sizes.append(len(page.rows))
        assert sizes == [1, 2, 1]


async def test_a_refusal_is_not_kept(store_url, make, register):
    async with open_items(store_url, middleware=[cached(GetItem, make(ItemRow), 60)]) as shop:
        assert await shop.queries.dispatch(GetItem(sku="A")) == Err(ItemNotFound("A"))
        receipt = (await shop.commands.dispatch(register("A"))).unwrap()
        await shop.wait_for(receipt)
        assert (await shop.queries.dispatch(GetItem(sku="A"))).is_ok()


async def test_many_callers_at_once_are_one_query(store_url, make, register):
    asked = Asked()
    middleware = [cached(GetItem, make(ItemRow), 60), asked]
    async with open_items(store_url, middleware=middleware) as shop:
        receipt = (await shop.commands.dispatch(register("A"))).unwrap()
        await shop.wait_for(receipt)
        answers = await asyncio.gather(
            *(shop.queries.dispatch(GetItem(sku="A")) for _ in range(200))
        )
        assert all(answer.is_ok() for answer in answers)
        assert asked.names["GetItem"] == 1


async def test_while_the_store_is_away_an_expired_answer_stands_in(start_postgres, make, register):
    server = start_postgres()
    cache = make(ItemRow, stale_for=60.0)
    settings = Settings(store=server.get_uri(), lock_timeout=1)
    async with open_items(
        settings=settings, middleware=[cached(GetItem, cache, 0.1)], watched=[cache]
    ) as shop:
        receipt = (await shop.commands.dispatch(register("A"))).unwrap()
        row = (await shop.queries.dispatch(GetItem(sku="A"), after=receipt)).unwrap()
        await asyncio.to_thread(server.stop)
        await asyncio.sleep(0.15)
        assert (await shop.queries.dispatch(GetItem(sku="A"))).unwrap() == row
        refused = await shop.queries.dispatch(GetItem(sku="B"))
        assert isinstance(refused.error, EventStoreUnavailable)
        health = {part.kind: part for part in shop.health().parts}
        assert health["cache"].counters["stale"] == 1
