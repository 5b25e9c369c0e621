"""The whole way of the data, on every store."""

from __future__ import annotations

import asyncio
from base64 import urlsafe_b64encode
from dataclasses import replace
from decimal import Decimal
from time import monotonic
from uuid import uuid4

import pytest

from leftfold.application import (
    Query,
    QueryService,
    Receipt,
    ShuttingDown,
    ValidationFailed,
    ViewBehind,
)
from leftfold.application.items import (
    DiscontinueItem,
    FindItems,
    GetItem,
    InvoiceLine,
    ItemAsOf,
    ItemHistory,
    ItemQueries,
    RecordInvoice,
    RenameItem,
    TakeBackStock,
    WriteOffStock,
    item_model,
    item_stock,
)
from leftfold.domain import Err, Ok, Result, attr
from leftfold.domain.items import InsufficientStock, Item, ItemNotFound
from leftfold.infrastructure import NotRunningError, Runtime, Settings
from leftfold.infrastructure.items import open_items

pytestmark = pytest.mark.anyio


@pytest.fixture
async def shop(store_url):
    async with open_items(store_url) as shop:
        yield shop


async def test_event_store_persistence(shared_url, register, sell):
    async with open_items(shared_url) as shop:
        await shop.commands.dispatch(register("A", 10))
        written = (await shop.commands.dispatch(sell("A", 3))).unwrap()
        told = (await shop.queries.dispatch(ItemHistory(sku="A"))).unwrap()
    async with open_items(shared_url) as shop:
        assert (await shop.queries.dispatch(ItemHistory(sku="A"))).unwrap() == told
        row = (await shop.queries.dispatch(GetItem(sku="A"), after=written)).unwrap()
        assert (row.on_hand, row.units_sold, row.revenue) == (7, 3, Decimal("7.65"))
        refused = await shop.commands.dispatch(sell("A", 8))
        assert refused == Err(InsufficientStock("A", 8, 7))
    assert [e.event_type for e in told] == ["leftfold.item.registered", "leftfold.item.stock_sold"]
    assert [e.version for e in told] == [1, 2]


async def test_cqrs_end_to_end(shop, register, sell, receive):
    commands, queries = shop.commands, shop.queries
    for sku in ("A", "B", "C"):
        await commands.dispatch(register(sku, 10))
    await commands.dispatch(receive("A", 5))
    await commands.dispatch(sell("A", 12))
    await commands.dispatch(TakeBackStock(sku="A", quantity=2, invoice="C536365"))
    await commands.dispatch(WriteOffStock(sku="A", quantity=1, reason="broken"))
    await commands.dispatch(RenameItem(sku="A", name="Mug"))
    assert await commands.dispatch(sell("A", 5)) == Err(InsufficientStock("A", 5, 4))
    last = await commands.dispatch(DiscontinueItem(sku="B"))

    page = (await queries.dispatch(FindItems(order="-on_hand", limit=2), after=last.value)).unwrap()
    rest = (await queries.dispatch(FindItems(order="-on_hand", limit=2, cursor=page.next))).unwrap()
    assert ([r.on_hand for r in page.rows], page.next is None) == ([10, 10], False)
    assert ([r.sku for r in rest.rows], rest.next) == (["A"], None)
    (item,) = rest.rows
    assert (item.name, item.opening_stock, item.on_hand, item.revenue) == (
        *("Mug", 10, 4),
        Decimal("25.50"),
    )
    moved = (item.units_received, item.units_sold, item.units_returned, item.units_written_off)
    assert moved == (5, 12, 2, 1)

    told = (await queries.dispatch(ItemHistory(sku="A"))).unwrap()
    assert [e.version for e in told] == [1, 2, 3, 4, 5, 6]
    before = (await queries.dispatch(ItemAsOf(sku="A", version=2))).unwrap()
    assert (before.name, before.on_hand) == ("Cup", 15)
    assert await queries.dispatch(GetItem(sku="a")) == Err(ItemNotFound("a"))


async def test_a_query_after_a_receipt_reads_what_that_command_wrote(shop, register, sell):
    await shop.commands.dispatch(register("A", 30))
    for sold in range(1, 21):
        receipt = (await shop.commands.dispatch(sell("A", 1))).unwrap()
        row = (await shop.queries.dispatch(GetItem(sku="A"), after=receipt)).unwrap()
        assert row.units_sold == sold


async def test_a_query_after_what_is_not_there_yet_says_so_in_time(store_url, register):
    settings = Settings(store=store_url, view_timeout=0.2)
    async with open_items(settings=settings) as shop:
        written = (await shop.commands.dispatch(register())).unwrap()
        ahead = replace(written, position=written.position + 1)
        begun = monotonic()
        answer = await shop.queries.dispatch(GetItem(sku="A"), after=ahead)
        assert monotonic() - begun < 1.5
    assert answer == Err(ViewBehind("item_stock", written.position, ahead.position))


async def test_waiting_for_a_receipt_waits_for_the_view(shop, register):
    written = (await shop.commands.dispatch(register())).unwrap()
    assert await shop.wait_for(written) == Ok(None)
    assert (await shop.queries.dispatch(GetItem(sku="A"))).is_ok()
    health, *_ = shop.health().projections
    assert (health.name, health.position, health.lag) == ("item_stock", written.position, 0)


async def test_waiting_for_what_is_not_there_yet_ends_at_the_timeout(shop):
    ahead = Receipt(uuid4(), (), 1)
    assert await shop.wait_for(ahead, timeout=0.1) == Err(ViewBehind("item_stock", 0, 1))


async def test_catching_up_sees_all_that_the_log_holds(shop, register):
    await asyncio.gather(*(shop.commands.dispatch(register(f"S{n}")) for n in range(50)))
    assert await shop.catch_up() == Ok(None)
    page = (await shop.queries.dispatch(FindItems(limit=100))).unwrap()
    assert len(page.rows) == 50


async def test_an_invoice_moves_several_items_or_none(shop, register):
    for sku in ("A", "B"):
        await shop.commands.dispatch(register(sku, 5))
    lines = [InvoiceLine(kind="sale", sku=sku, quantity=n) for sku, n in (("A", 2), ("B", 6))]
    refused = await shop.commands.dispatch(RecordInvoice(invoice="1", lines=tuple(lines)))
    assert refused == Err(InsufficientStock("B", 6, 5))
    receipt = await shop.commands.dispatch(RecordInvoice(invoice="1", lines=(lines[0], lines[0])))
    assert receipt.unwrap().aggregates == ((Item.id_of("A"), 3),)
    row = (await shop.queries.dispatch(GetItem(sku="A"), after=receipt.value)).unwrap()
    assert row.on_hand == 1


async def test_a_command_id_is_carried_out_once_also_after_reopening(shared_url, register, sell):
    command_id = uuid4()
    async with open_items(shared_url) as shop:
        await shop.commands.dispatch(register("A", 10))
        first = (await shop.commands.dispatch(sell("A", 3), command_id=command_id)).unwrap()
    async with open_items(shared_url) as shop:
        again = (await shop.commands.dispatch(sell("A", 3), command_id=command_id)).unwrap()
        row = (await shop.queries.dispatch(GetItem(sku="A"), after=again)).unwrap()
    assert again == replace(first, repeated=True)
    assert row.on_hand == 7


async def test_one_command_id_sent_many_times_at_once_is_carried_out_once(shop, register, sell):
    await shop.commands.dispatch(register("A", 10))
    command_id = uuid4()
    sent = [shop.commands.dispatch(sell("A", 1), command_id=command_id) for _ in range(8)]
    receipts = [outcome.unwrap() for outcome in await asyncio.gather(*sent)]
    assert sorted(receipt.repeated for receipt in receipts) == [False] + [True] * 7
    row = (await shop.queries.dispatch(GetItem(sku="A"), after=receipts[0])).unwrap()
    assert row.on_hand == 9


async def test_one_command_id_twice_in_a_batch_is_refused_as_a_bug(store_url, register, sell):
    command_id = uuid4()
    settings = Settings(store=store_url, command_timeout=2)
    async with open_items(settings=settings) as shop:
        await shop.commands.dispatch(register("A", 10))
        with pytest.raises(ValueError, match="command_id"):
            await shop.commands.dispatch_all([sell(), sell()], command_ids=[command_id] * 2)
        await shop.catch_up()
        assert (await shop.queries.dispatch(GetItem(sku="A"))).unwrap().on_hand == 10


async def test_a_batch_is_carried_out_whole_or_not_at_all(shop, register, sell):
    refused = await shop.commands.dispatch_all([register("A", 1), sell("A", 1), sell("A", 1)])
    assert refused == Err(InsufficientStock("A", 1, 0))
    assert await shop.queries.dispatch(ItemHistory(sku="A")) == Err(ItemNotFound("A"))
    done = await shop.commands.dispatch_all([register("A", 2), sell("A", 1), sell("A", 1)])
    assert len(done.unwrap()) == 3
    assert len((await shop.queries.dispatch(ItemHistory(sku="A"))).unwrap()) == 3


async def test_callers_at_once_lose_no_sale(shop, register, sell):
    await shop.commands.dispatch(register("A", 50))
    outcomes = await asyncio.gather(*(shop.commands.dispatch(sell("A", 1)) for _ in range(60)))
    assert sum(outcome.is_ok() for outcome in outcomes) == 50
    await shop.catch_up()
    assert (await shop.queries.dispatch(GetItem(sku="A"))).unwrap().on_hand == 0


@pytest.mark.parametrize("order", ["discontinued", "-discontinued", "first_sale", "-revenue"])
async def test_items_can_be_paged_by_any_column(shop, register, order):
    await shop.commands.dispatch_all([register(f"S{n}") for n in range(5)])
    await shop.commands.dispatch(DiscontinueItem(sku="S3"))
    await shop.catch_up()
    found, cursor = [], None
    for _ in range(3):
        query = FindItems(order=order, limit=2, cursor=cursor)
        page = (await shop.queries.dispatch(query)).unwrap()
        found += [row.sku for row in page.rows]
        cursor = page.next
    assert cursor is None
    assert sorted(found) == ["S0", "S1", "S2", "S3", "S4"]


async def test_a_value_of_a_row_has_no_attributes_to_ask_for(shop):
    query = FindItems(where=attr("first_sale.year") == 2011)
    answer = await shop.queries.dispatch(query)
    assert isinstance(answer, Err)
    assert isinstance(answer.error, ValidationFailed)


@pytest.mark.parametrize(
    ("order", "cursor"),
    [
        ("on_hand", b'["on_hand","k",99999999999999999999999]'),
        ("revenue", b'["revenue","k","1E-999999999"]'),
        ("revenue", b'["revenue","k","1E+999999999"]'),
    ],
)
async def test_a_forged_cursor_finds_nothing_or_is_refused(shop, register, order, cursor):
    await shop.commands.dispatch(register())
    await shop.catch_up()
    forged = urlsafe_b64encode(cursor).decode()
    match await shop.queries.dispatch(FindItems(order=order, cursor=forged)):
        case Ok(page):
            assert page.rows == ()
        case Err(error):
            assert isinstance(error, ValidationFailed)


async def test_a_closed_runtime_can_not_be_used(store_url, register):
    async with open_items(store_url) as shop:
        commands = shop.commands
    with pytest.raises(NotRunningError):
        shop.commands  # noqa: B018
    with pytest.raises(NotRunningError):
        shop.health()
    assert await commands.dispatch(register()) == Err(ShuttingDown())


async def test_closing_waits_for_the_commands_under_way(shared_url, register):
    async with open_items(shared_url) as shop:
        under_way = [
            asyncio.ensure_future(shop.commands.dispatch(register(f"S{n}"))) for n in range(40)
        ]
        await asyncio.sleep(0)
    answered = [task.result() for task in under_way if task.done()]
    assert len(answered) == 40
    async with open_items(shared_url) as shop:
        await shop.catch_up()
        page = (await shop.queries.dispatch(FindItems(limit=100))).unwrap()
    assert len(page.rows) == sum(outcome.is_ok() for outcome in answered)


async def test_closing_twice_at_once_is_one_closing(store_url):
    shop = open_items(store_url)
    await shop.__aenter__()
    await asyncio.gather(shop.close(), shop.close())
    await shop.close()
    with pytest.raises(NotRunningError):
        shop.health()


class Peek(Query[int, ValidationFailed]):
    limit: int


class Peeking(QueryService):
    def handlers(self):
        yield Peek.handled_by(self.peek)

    async def peek(self, query: Peek) -> Result[int, ValidationFailed]:
        page = await self.views.page(item_stock, "sku", query.limit)
        rows = await self.views.rows(item_stock, limit=query.limit)
        return Ok(len(page.rows) + len(rows))


@pytest.mark.parametrize("limit", [0, -1, 2**63 - 1])
async def test_a_limit_that_no_database_counts_to_is_refused(store_url, register, limit):
    model = replace(item_model, queries=(ItemQueries, Peeking))
    async with Runtime(model, store_url) as shop:
        receipt = (await shop.commands.dispatch(register())).unwrap()
        assert await shop.queries.dispatch(Peek(limit=2**62), after=receipt) == Ok(2)
        refused = await shop.queries.dispatch(Peek(limit=limit))
        assert isinstance(refused, Err)
        assert isinstance(refused.error, ValidationFailed)
