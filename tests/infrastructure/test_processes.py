"""Several runtimes on one store, in one process and in several."""

from __future__ import annotations

import asyncio
from collections import Counter
from threading import Barrier, Thread
from time import monotonic

import pytest

from leftfold.application.items import FindItems, GetItem, ItemHistory, item_model
from leftfold.domain.items import InsufficientStock
from leftfold.domain.result import Err
from leftfold.infrastructure import follower
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.stores import make_store

pytestmark = [pytest.mark.anyio, pytest.mark.timed]


def test_of_two_processes_that_register_one_sku_exactly_one_succeeds(shared_url, start):
    racer = """
        async def main():
            async with open_items(url) as shop:
                say("ready")
                for sku in hear().split():
                    outcome = await shop.commands.dispatch(register(sku))
                    say("Ok" if outcome.is_ok() else repr(outcome.error))
        asyncio.run(main())
    """
    skus = [f"S{n}" for n in range(10)]
    racers = [start(racer, shared_url) for _ in range(2)]
    for child in racers:
        assert child.says() == "ready"
    for child in racers:
        child.tell(" ".join(skus))
    for sku in skus:
        said = sorted(child.says() for child in racers)
        assert said == [f"ItemAlreadyRegistered(sku='{sku}')", "Ok"]


async def test_sales_from_two_processes_on_one_item_lose_no_update(shared_url, start, register):
    seller = """
        async def main():
            async with open_items(url) as shop:
                say("ready")
                hear()
                sales = [shop.commands.dispatch(sell("A", 1)) for _ in range(40)]
                outcomes = await asyncio.gather(*sales)
                say(sum(outcome.is_ok() for outcome in outcomes))
                say({type(o.error).__name__ for o in outcomes if not o.is_ok()})
        asyncio.run(main())
    """
    async with open_items(shared_url) as shop:
        await shop.commands.dispatch(register("A", 60))
        sellers = [start(seller, shared_url) for _ in range(2)]
        for child in sellers:
            assert child.says() == "ready"
        for child in sellers:
            child.tell()
        sold = sum(int(child.says()) for child in sellers)
        refused = {child.says() for child in sellers} - {"set()"}
        await shop.catch_up()
        row = (await shop.queries.dispatch(GetItem(sku="A"))).unwrap()
        told = (await shop.queries.dispatch(ItemHistory(sku="A"))).unwrap()
    assert (sold, refused) == (60, {"{'InsufficientStock'}"})
    assert (row.on_hand, row.units_sold, len(told)) == (0, 60, 61)


@pytest.fixture
def _only_hints(monkeypatch):
    """Let followers look at the log by themselves so rarely that only hints can wake them."""
    monkeypatch.setattr(follower, "IDLE", 60.0)


@pytest.mark.usefixtures("_only_hints")
async def test_what_another_process_writes_is_seen_within_half_a_second(
    shared_url, start, register
):
    seller = """
        async def main():
            async with open_items(url) as shop:
                say("ready")
                while hear():
                    receipt = (await shop.commands.dispatch(sell("A", 1))).unwrap()
                    say(receipt.position)
        asyncio.run(main())
    """
    async with open_items(shared_url) as shop:
        await shop.commands.dispatch(register("A", 10))
        child = start(seller, shared_url)
        child.says()
        delays = []
        for _ in range(5):
            await asyncio.sleep(0.13)  # the runtime is idle, and no look is just due
            child.tell("go")
            position = int(child.says())
            begun = monotonic()
            while shop.health().projections[0].position < position:
                assert monotonic() - begun < 5
                await asyncio.sleep(0.005)
            delays.append(monotonic() - begun)
        child.tell()
    assert sorted(delays)[2] < 0.5  # the median: the machine may be busy


@pytest.mark.usefixtures("_only_hints")
@pytest.mark.parametrize("name", ["a?b.db", "a%41.db", "a#b.db", "with blank.db"])
async def test_a_file_of_any_name_is_followed(tmp_path, register, name):
    url = f"sqlite:///{tmp_path / name}"
    async with open_items(url) as shop, open_items(url) as other:
        for n in range(3):
            await asyncio.sleep(0.13)
            receipt = (await other.commands.dispatch(register(f"S{n}"))).unwrap()
            begun = monotonic()
            while shop.health().projections[0].position < receipt.position:
                assert monotonic() - begun < 3
                await asyncio.sleep(0.005)
    assert (tmp_path / name).exists()


async def test_a_sale_is_not_refused_for_stock_that_another_process_received(
    shared_url, start, register, sell
):
    receiver = """
        async def main():
            async with open_items(url) as shop:
                hear()
                (await shop.commands.dispatch(ReceiveStock(sku="A", quantity=5))).unwrap()
                say("received")
        asyncio.run(main())
    """
    child = start(receiver, shared_url)
    async with open_items(shared_url) as shop:
        await shop.commands.dispatch(register("A", 1))
        assert await shop.commands.dispatch(sell("A", 2)) == Err(InsufficientStock("A", 2, 1))
        child.tell()
        assert child.says() == "received"
        assert (await shop.commands.dispatch(sell("A", 6))).is_ok()
        assert await shop.commands.dispatch(sell("A", 1)) == Err(InsufficientStock("A", 1, 0))


async def test_an_item_that_another_runtime_registers_is_known_at_once(shared_url, register, sell):
    async with open_items(shared_url) as shop, open_items(shared_url) as other:
        assert not (await shop.commands.dispatch(sell("A", 1))).is_ok()
        await other.commands.dispatch(register("A", 1))
        assert (await shop.commands.dispatch(sell("A", 1))).is_ok()


def test_eight_processes_that_start_at_once_on_a_new_store_all_start(shared_url, start):
    starter = """
        say("ready")
        hear()
        async def main():
            async with open_items(url) as shop:
                outcome = await shop.commands.dispatch(register(sys.argv[2]))
                (await shop.wait_for(outcome.unwrap())).unwrap()
                say("started")
        asyncio.run(main())
    """
    children = [start(starter, shared_url, f"S{n}") for n in range(8)]
    for child in children:
        child.says(60)
    for child in children:
        child.tell()
    assert [child.says() for child in children] == ["started"] * 8
    assert [child.ends() for child in children] == [0] * 8


def test_stores_that_are_opened_at_once_all_open(shared_url):
    urls = [f"{shared_url}{n}" for n in range(20)] if "sqlite" in shared_url else [shared_url]
    for url in urls:
        stores = [make_store(load_settings(store=url)) for _ in range(8)]
        barrier, opened = Barrier(len(stores)), []

        def opens(store, barrier=barrier, opened=opened):
            barrier.wait(10)
            store.open(item_model.projections, create_tables=True)
            opened.append(store)

        openers = [Thread(target=opens, args=(store,)) for store in stores]
        for opener in openers:
            opener.start()
        for opener in openers:
            opener.join(20)
        for store in opened:
            store.close()
        assert len(opened) == len(stores)


async def test_runtimes_that_follow_one_view_never_fold_an_event_twice(shared_url, register, sell):
    shops = [open_items(shared_url) for _ in range(3)]
    for shop in shops:
        await shop.__aenter__()
    for n in range(4):
        await shops[0].commands.dispatch(register(f"S{n}", 1_000))
    sales = [shops[n % 3].commands.dispatch(sell(f"S{n % 4}", 1)) for n in range(120)]
    assert all(outcome.is_ok() for outcome in await asyncio.gather(*sales))
    for shop in shops:
        (await shop.catch_up()).unwrap()
    for shop in shops:
        page = (await shop.queries.dispatch(FindItems())).unwrap()
        assert Counter(row.units_sold for row in page.rows) == {30: 4}
        await shop.close()
