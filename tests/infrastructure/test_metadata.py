"""Who wanted what an event records, and what caused it."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest
from waiting import until

from leftfold.application import Overloaded, described
from leftfold.application.items import ItemHistory
from leftfold.domain import Err, InvalidMetadataError, Metadata
from leftfold.infrastructure import Settings
from leftfold.infrastructure.items import open_items

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shop(store_url):
    async with open_items(store_url) as shop:
        yield shop


async def last_of(shop, sku="A"):
    return (await shop.queries.dispatch(ItemHistory(sku=sku))).unwrap()[-1].metadata


async def test_an_event_names_the_command_that_caused_it(shop, register):
    command_id = uuid4()
    await shop.commands.dispatch(register("A"), command_id=command_id)
    assert await last_of(shop) == Metadata(causation_id=command_id.hex)


async def test_what_is_said_around_a_dispatch_is_on_every_event(shop, register, sell):
    with described(user="ann", correlation_id="request-7"):
        await shop.commands.dispatch(register("A"))
        first = await last_of(shop)
        await shop.commands.dispatch(sell("A"))
        second = await last_of(shop)
    for told in (first, second):
        assert (told.user, told.correlation_id) == ("ann", "request-7")
    assert first.causation_id != second.causation_id


async def test_an_inner_block_keeps_what_it_does_not_say(shop, register):
    with described(user="ann", correlation_id="request-7"), described(causation_id="mail-1"):
        await shop.commands.dispatch(register("A"))
    assert await last_of(shop) == Metadata("request-7", "mail-1", "ann")


async def test_what_is_given_to_the_dispatch_counts_more(shop, register):
    with described(user="ann"):
        await shop.commands.dispatch(register("A"), metadata=Metadata(causation_id="x"))
    assert await last_of(shop) == Metadata(causation_id="x")


async def test_the_commands_of_a_batch_have_each_its_own_cause(shop, register):
    ids = [uuid4(), uuid4()]
    with described(user='a "quoted" ☃ name'):
        await shop.commands.dispatch_all([register("A"), register("B")], command_ids=ids)
    for sku, command_id in zip("AB", ids, strict=True):
        assert await last_of(shop, sku) == Metadata("", command_id.hex, 'a "quoted" ☃ name')


async def test_tasks_at_the_same_time_keep_their_own(shop, register):
    async def registers(sku):
        with described(user=sku):
            await asyncio.sleep(0)
            await shop.commands.dispatch(register(sku))

    skus = [f"S{n}" for n in range(10)]
    await asyncio.gather(*map(registers, skus))
    assert [(await last_of(shop, sku)).user for sku in skus] == skus


@pytest.mark.parametrize("user", [42, "\ud800", "a\0b"])
async def test_metadata_that_could_not_be_read_again_is_refused(shop, register, user):
    with pytest.raises(InvalidMetadataError, match="user"), described(user=user):
        pass
    with pytest.raises(InvalidMetadataError, match="user"):
        await shop.commands.dispatch(register("B"), metadata=Metadata(user=user))
    assert not (await shop.queries.dispatch(ItemHistory(sku="B"))).is_ok()


async def test_what_those_who_went_away_left_to_be_written_takes_room_too(shared_url, register):
    settings = Settings(store=shared_url, max_commands=5)
    async with open_items(settings=settings) as shop:
        may_commit = asyncio.Event()
        access = shop._opened.access
        genuine = access._commit

        async def commit(groups):
            await may_commit.wait()
            return await genuine(groups)

        access._commit = commit
        waiting = shop._opened._execution.waiting
        for number in range(5):
            caller = asyncio.ensure_future(shop.commands.dispatch(register(f"S{number}")))
            await until(lambda last=number: waiting() > last)
            caller.cancel()
            await asyncio.wait([caller])
        assert await shop.commands.dispatch(register("S5")) == Err(Overloaded(5))
        assert waiting() == 5
        may_commit.set()
        await asyncio.sleep(0.2)
        assert (await shop.commands.dispatch(register("B"))).is_ok()


async def test_an_open_runtime_purges_receipts_by_itself(shared_url, register):
    settings = Settings(store=shared_url, receipts_kept=0.3)
    async with open_items(settings=settings) as shop:
        command_id = uuid4()
        (await shop.commands.dispatch(register("A"), command_id=command_id)).unwrap()
        log = shop._store.log
        assert log.commands([command_id])
        for _ in range(100):
            if not log.commands([command_id]):
                break
            await asyncio.sleep(0.05)
        else:
            pytest.fail("the receipt is still there")
        assert (await shop.queries.dispatch(ItemHistory(sku="A"))).is_ok()


async def test_beyond_the_limit_commands_are_refused_and_nothing_is_written(shared_url, register):
    settings = Settings(store=shared_url, max_commands=3)
    async with open_items(settings=settings) as shop:
        skus = [f"S{n}" for n in range(10)]
        outcomes = await asyncio.gather(*(shop.commands.dispatch(register(s)) for s in skus))
        refused = [s for s, o in zip(skus, outcomes, strict=True) if o == Err(Overloaded(3))]
        assert len(refused) == 7
        for sku in refused:
            assert not (await shop.queries.dispatch(ItemHistory(sku=sku))).is_ok()
        assert (await shop.commands.dispatch(register(refused[0]))).is_ok()
