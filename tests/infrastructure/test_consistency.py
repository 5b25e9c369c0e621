"""Commands that answer when views have seen them, and answers from views that have not."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from time import monotonic, sleep

import pytest

from leftfold.application import Answer, Command, InvalidModelError, Projection, ViewBehind
from leftfold.application.items import GetItem, ItemRow, Items, item_model, item_stock, low_stock
from leftfold.domain import Err, Ok
from leftfold.domain.items import ItemError, ItemRegistered, StockSold
from leftfold.infrastructure import InMemoryCache, Runtime, Settings
from leftfold.infrastructure.items import open_items

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True)
class Seen:
    times: int


def halting():
    """A view that stops at the first sale."""
    view = Projection("halting", version=1, row=Seen, on_poison="halt")
    view.on(ItemRegistered)(lambda row, event: Seen(0))

    @view.on(StockSold)
    def sold(row, event):
        raise ZeroDivisionError

    return view


async def test_a_command_answers_when_the_named_views_have_seen_it(store_url, register, sell):
    async with open_items(store_url) as shop:
        await shop.commands.dispatch(register("A", 9))
        for _ in range(5):
            sold = await shop.commands.dispatch(sell("A"), consistency=["item_stock"])
            assert sold.unwrap().behind == ()
            position = next(p.position for p in shop.health().projections if p.name == "item_stock")
            assert position >= sold.unwrap().position


async def test_commands_of_one_transaction_answer_together(store_url, register):
    async with open_items(store_url) as shop:
        both = [register("A", 9), register("B", 9)]
        answers = (
            await shop.commands.dispatch_all(both, consistency=["item_stock", "low_stock"])
        ).unwrap()
        assert [answer.behind for answer in answers] == [(), ()]
        assert (await shop.queries.dispatch(GetItem(sku="B"))).is_ok()


async def test_a_view_that_is_not_there_in_time_is_named_and_the_command_is_done(
    store_url, register, sell
):
    model = replace(item_model, projections=(item_stock, halting()))
    settings = Settings(store=store_url, view_timeout=0.2)
    async with Runtime(model, settings=settings) as shop:
        await shop.commands.dispatch(register("A", 9))
        names = ["halting", "item_stock"]
        sold = (await shop.commands.dispatch(sell("A"), consistency=names)).unwrap()
        assert sold.behind == ("halting",)
        assert (await shop.queries.dispatch(GetItem(sku="A"))).unwrap().on_hand == 8


async def test_a_refusal_is_answered_without_waiting(store_url, register, sell):
    async with open_items(store_url) as shop:
        await shop.commands.dispatch(register("A", 1))
        assert not (await shop.commands.dispatch(sell("A", 2), consistency=["item_stock"])).is_ok()


async def test_an_unknown_view_is_refused_before_anything_is_written(store_url, register):
    async with open_items(store_url) as shop:
        with pytest.raises(InvalidModelError, match="nothing_such"):
            await shop.commands.dispatch(register("A", 1), consistency=["nothing_such"])
        assert shop._store.log.head() == 0


async def test_a_late_view_gives_an_older_answer_if_that_is_asked_for(store_url, register, sell):
    async with open_items(settings=Settings(store=store_url, follow=False)) as shop:
        registered = (await shop.commands.dispatch(register("A", 9))).unwrap()
        shop.follow()
        fresh = await shop.queries.answer(GetItem(sku="A"), after=registered)
        assert isinstance(fresh.unwrap(), Answer)
        assert not fresh.unwrap().is_stale
        ahead = replace(registered, position=registered.position + 3)
        begun = monotonic()
        stale = (await shop.queries.answer(GetItem(sku="A"), after=ahead, timeout=0.1)).unwrap()
        assert monotonic() - begun < 2
        assert (stale.is_stale, stale.lag, stale.value.on_hand) == (True, 3, 9)
        behind = await shop.queries.dispatch(GetItem(sku="A"), after=registered)
        assert behind.is_ok()


async def test_a_view_that_is_behind_says_by_how_much(store_url, register):
    settings = Settings(store=store_url, view_timeout=0.1)
    async with open_items(settings=settings) as shop:
        registered = (await shop.commands.dispatch(register("A", 9))).unwrap()
        await shop.catch_up()
        ahead = replace(registered, position=registered.position + 7)
        answer = await shop.queries.dispatch(GetItem(sku="A"), after=ahead)
        assert isinstance(answer, Err)
        assert isinstance(answer.error, ViewBehind)
        assert answer.error.lag == 7


def test_threads_ask_the_same(store_url, register, sell):
    with open_items(store_url).blocking() as shop:
        shop.commands.dispatch(register("A", 9), consistency=["item_stock"]).unwrap()
        sold = shop.commands.dispatch(sell("A"), consistency=["item_stock"]).unwrap()
        assert shop.queries.answer(GetItem(sku="A"), after=sold).unwrap().value.on_hand == 8
        assert shop.dead_letters("item_stock") == ()
        assert shop.retry("item_stock").released == 0
        assert shop.drop_dead_letters("item_stock") == 0
        assert shop.rebuild("item_stock").same == 1


async def test_an_older_answer_is_not_kept_as_a_newer_one(store_url, register, sell):
    from leftfold.application import cached

    cache = InMemoryCache(ItemRow, name="rows")
    settings = Settings(store=store_url, view_timeout=0.1)
    async with open_items(settings=settings, middleware=[cached(GetItem, cache, 60)]) as shop:
        registered = (await shop.commands.dispatch(register("A", 9))).unwrap()
        await shop.catch_up()
        ahead = replace(registered, position=registered.position + 1)
        stale = (await shop.queries.answer(GetItem(sku="A"), after=ahead)).unwrap()
        assert stale.value.on_hand == 9
        sold = (await shop.commands.dispatch(sell("A"))).unwrap()
        fresh = await shop.queries.dispatch(GetItem(sku="A"), after=sold)
        assert fresh.unwrap().on_hand == 8


async def test_waits_for_many_views_end_together(store_url, register):
    async with open_items(store_url) as shop:
        receipts = await asyncio.gather(
            *(
                shop.commands.dispatch(register(f"S{n}", 1), consistency=["item_stock"])
                for n in range(30)
            )
        )
        assert all(receipt.unwrap().behind == () for receipt in receipts)
        assert len(shop._store.views.select(low_stock, None, None)) == 0


async def test_a_command_that_answers_an_empty_list_is_waited_for_too(sqlite_url, register):
    class Register(Command[list[str], ItemError]):
        pass

    class ListingItems(Items):
        def handlers(self):
            yield Register.handled_by(self.register_one)

        def register_one(self, command):
            self.register(register("A", 9)).unwrap()
            return Ok([])

    slow = Projection("slow", version=1, row=Seen)

    @slow.on(ItemRegistered)
    def registered(row, event):
        sleep(0.1)
        return Seen(0)

    model = replace(item_model, services=(ListingItems,), projections=(slow,))
    async with Runtime(model, sqlite_url) as shop:
        assert await shop.commands.dispatch(Register(), consistency=["slow"]) == Ok([])
        assert shop.health().projections[0].position == 1
