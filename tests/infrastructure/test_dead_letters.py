"""Events that cannot be folded: put aside, looked at, tried again, given up."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from databases import execute
from eventsourcing.persistence import JSONTranscoder
from waiting import until

from leftfold.application import (
    Answer,
    EventMapper,
    EventPutAside,
    InvalidModelError,
    Projection,
    Query,
    QueryService,
    Receipt,
    ViewStopped,
)
from leftfold.application.items import GetItem, item_model, item_stock
from leftfold.application.ports import EncodedEvent, Group, Save
from leftfold.domain import Aggregate, Err, Event, Ok, Specification
from leftfold.domain.items import Item, ItemError, ItemRegistered, StockReceived, StockSold
from leftfold.infrastructure import Retried, Runtime, Settings, pages
from leftfold.infrastructure.errors import TooManyDeadLettersError

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True)
class Sales:
    sku: str
    sold: int


class Fault:
    """What is wrong with a projection, until it is mended."""

    def __init__(self, *quantities):
        self.quantities = set(quantities)


def sales(fault, **options):
    """A view that cannot fold sales of some quantities."""
    view = Projection("sales", version=1, row=Sales, **options)

    @view.on(ItemRegistered)
    def registered(row, event):
        return Sales(event.sku, 0)

    @view.on(StockSold)
    def sold(row, event):
        if event.quantity in fault.quantities:
            raise ZeroDivisionError(event.invoice)
        return replace(row, sold=row.sold + event.quantity)

    return view


@asynccontextmanager
async def opened(url, view, **options):
    model = replace(item_model, projections=(item_stock, view))
    async with Runtime(model, settings=Settings(store=url, **options)) as shop:
        yield shop


async def rows(shop, view):
    (await shop.catch_up()).unwrap()
    return {row.sku: row.sold for _, row in shop._store.views.select(view, None, None)}


async def sold(shop, sell, *quantities, sku="A"):
    for quantity in quantities:
        (await shop.commands.dispatch(sell(sku, quantity))).unwrap()


def health(shop, name="sales"):
    return next(p for p in shop.health().projections if p.name == name)


async def test_what_cannot_be_folded_is_parked_with_what_follows_of_its_key(
    store_url, register, sell
):
    view = sales(Fault(7))
    async with opened(store_url, view) as shop:
        await shop.commands.dispatch_all([register("A", 100), register("B", 100)])
        await sold(shop, sell, 1, 7, 2, 7)
        await sold(shop, sell, 3, 4, sku="B")
        assert await rows(shop, view) == {"A": 1, "B": 7}
        letters = await shop.dead_letters("sales")
        assert [letter.version for letter in letters] == [3, 4, 5]
        assert {letter.key for letter in letters} == {Item.id_of("A").hex}
        assert "ZeroDivisionError in sold" in letters[0].error
        assert [letter.error for letter in letters[1:]] == ["", ""]
        assert (health(shop).state, health(shop).dead_letters) == ("live", 3)
        assert shop.health().is_healthy
        assert (await shop.queries.dispatch(GetItem(sku="A"))).unwrap().units_sold == 17


async def test_who_asks_for_what_was_put_aside_is_told(store_url, register, sell):
    fault = Fault(7)
    view = sales(fault)

    class Sold(Query[int, ItemError]):
        sku: str

    class Ask(QueryService):
        def handlers(self):
            yield Sold.handled_by(self.sold)

        async def sold(self, query):
            row = await self.views.get(view, Item.id_of(query.sku).hex)
            return Ok(row.sold)

    model = replace(item_model, projections=(view,), queries=(Ask,))
    async with Runtime(model, store_url) as shop:
        first = (await shop.commands.dispatch(register("A", 100))).unwrap()
        (await shop.commands.dispatch(register("B", 100))).unwrap()
        receipts = {}
        for sku, quantity in (("A", 1), ("A", 7), ("A", 2), ("B", 3)):
            answer = await shop.commands.dispatch(sell(sku, quantity), consistency=["sales"])
            receipts[sku, quantity] = answer.unwrap()
        for parked in (("A", 7), ("A", 2)):
            receipt = receipts[parked]
            travelled = Receipt.at(receipt.position)
            assert await shop.wait_for(travelled) == await shop.wait_for(receipt)
            told = EventPutAside("sales", receipt.position - 1, receipt.position)
            assert receipt.behind == ("sales",)
            assert await shop.queries.dispatch(Sold(sku="A"), after=receipt) == Err(told)
            assert await shop.wait_for(receipt) == Err(told)
            assert await shop.queries.answer(Sold(sku="A"), after=receipt) == Ok(Answer(1, 1))
        for seen in (first, receipts["A", 1], receipts["B", 3]):
            assert seen.behind == ()
            assert (await shop.queries.dispatch(Sold(sku="B"), after=seen)) == Ok(3)
            assert await shop.wait_for(seen) == Ok(None)
        assert await shop.queries.dispatch(Sold(sku="A")) == Ok(1)
        fault.quantities.clear()
        assert (await shop.retry("sales")).released == 2
        assert await shop.queries.dispatch(Sold(sku="A"), after=receipts["A", 2]) == Ok(10)
        assert await shop.wait_for(receipts["A", 7]) == Ok(None)


async def test_who_asks_another_process_for_what_was_put_aside_is_told(shared_url, register, sell):
    view = sales(Fault(7))
    async with opened(shared_url, view) as shop, opened(shared_url, view, follow=False) as other:
        await shop.commands.dispatch(register("A", 100))
        receipt = (await other.commands.dispatch(sell("A", 7))).unwrap()
        told = EventPutAside("sales", receipt.position - 1, receipt.position)
        assert await other.wait_for(receipt) == Err(told)


async def test_the_error_of_a_dead_letter_quotes_nothing(store_url, register, sell):
    view = sales(Fault(7))
    async with opened(store_url, view) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 7)
        await rows(shop, view)
        (letter,) = await shop.dead_letters("sales")
        assert "536365" not in letter.error


async def test_what_was_parked_is_folded_in_order_once_it_can_be(store_url, register, sell):
    fault = Fault(7)
    view = sales(fault)
    async with opened(store_url, view) as shop:
        await shop.commands.dispatch_all([register("A", 100), register("B", 100)])
        await sold(shop, sell, 1, 7, 2)
        await sold(shop, sell, 7, sku="B")
        assert await rows(shop, view) == {"A": 1, "B": 0}
        tried = await shop.retry("sales")
        assert (tried.released, tried.kept) == (0, 3)
        fault.quantities.clear()
        tried = await shop.retry("sales")
        assert (tried.released, tried.kept) == (3, 0)
        await sold(shop, sell, 4)
        assert await rows(shop, view) == {"A": 14, "B": 7}
        assert await shop.dead_letters("sales") == ()


async def test_after_a_restart_a_key_is_still_parked(shared_url, register, sell):
    view = sales(Fault(7))
    async with opened(shared_url, view) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 7)
        await rows(shop, view)
    async with opened(shared_url, view) as shop:
        await sold(shop, sell, 1)
        assert await rows(shop, view) == {"A": 0}
        assert len(await shop.dead_letters("sales")) == 2


async def test_another_process_may_retry(shared_url, register, sell):
    view, mended = sales(Fault(7)), sales(Fault())
    watching = {"follow": False}
    async with opened(shared_url, view) as shop, opened(shared_url, mended, **watching) as other:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 7, 1)
        await rows(shop, view)
        assert (await other.retry("sales")).released == 2
        await sold(shop, sell, 2)
        assert await rows(shop, view) == {"A": 10}


async def test_one_that_is_given_up_lets_a_retry_go_on_with_the_next(store_url, register, sell):
    view = sales(Fault(7))
    async with opened(store_url, view) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 7, 1, 7, 2)
        await rows(shop, view)
        first, *_ = await shop.dead_letters("sales")
        assert await shop.drop_dead_letters("sales", first.position) == 1
        tried = await shop.retry("sales")
        assert (tried.released, tried.kept) == (1, 2)
        assert await shop.drop_dead_letters("sales") == 2
        await sold(shop, sell, 3)
        assert await rows(shop, view) == {"A": 4}


async def test_names_that_the_model_does_not_have_are_refused(store_url):
    async with opened(store_url, sales(Fault())) as shop:
        for ask in (shop.dead_letters, shop.retry, shop.drop_dead_letters, shop.rebuild):
            with pytest.raises(InvalidModelError, match="nothing_so_named"):
                await ask("nothing_so_named")


async def test_a_view_that_halts_goes_on_after_a_retry(store_url, register, sell):
    fault = Fault(7)
    view = sales(fault, on_poison="halt")
    async with opened(store_url, view) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1, 7)
        assert isinstance((await shop.catch_up()).error, ViewStopped)
        assert health(shop).state == "halted"
        assert not shop.health().is_healthy
        fault.quantities.clear()
        await shop.retry("sales")
        assert await rows(shop, view) == {"A": 8}
        assert health(shop).state == "live"


async def test_a_view_that_can_fold_nothing_stops_in_the_end(
    store_url, register, sell, monkeypatch
):
    monkeypatch.setattr(pages, "MAX_DEAD_LETTERS", 3)
    view = sales(Fault(7))
    async with opened(store_url, view) as shop:
        await shop.commands.dispatch_all([register(f"S{n}", 100) for n in range(9)])
        await shop.commands.dispatch_all([sell(f"S{n}", 7) for n in range(9)])
        assert isinstance((await shop.catch_up()).error, ViewStopped)
        assert "has 3 dead letters" in health(shop).failure
        assert (await shop.wait_for(await last(shop, sell), ["item_stock"])).is_ok()


async def test_a_view_that_stops_for_what_it_has_put_aside_does_so_before_the_logs_end(
    store_url, register, sell, monkeypatch
):
    monkeypatch.setattr(pages, "MAX_DEAD_LETTERS", 5)
    view = sales(Fault(7), on_poison="park")
    async with opened(store_url, view, page_size=5, follow=False) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 7, *[1] * 40)
        shop.follow()
        assert isinstance((await shop.catch_up()).error, ViewStopped)
        await asyncio.sleep(0.1)
        found = health(shop)
        assert found.state == "halted"
        assert 5 <= found.dead_letters <= 15


async def test_a_rebuild_stops_that_has_put_aside_too_much_behind_one_event(
    store_url, register, sell, monkeypatch
):
    monkeypatch.setattr(pages, "MAX_DEAD_LETTERS", 5)
    fault = Fault()
    view = sales(fault, on_poison="park")
    async with opened(store_url, view) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 7, *[1] * 9)
        assert await rows(shop, view) == {"A": 16}
        fault.quantities.add(7)
        with pytest.raises(TooManyDeadLettersError):
            await shop.rebuild("sales")
        assert await rows(shop, view) == {"A": 16}


async def test_a_rebuild_that_can_fold_nothing_stops_in_the_end(
    store_url, register, sell, monkeypatch
):
    monkeypatch.setattr(pages, "MAX_DEAD_LETTERS", 3)
    fault = Fault()
    async with opened(store_url, sales(fault, on_poison="park")) as shop:
        await shop.commands.dispatch_all([register(f"S{n}", 100) for n in range(9)])
        await shop.commands.dispatch_all([sell(f"S{n}", 7) for n in range(9)])
        assert (await shop.catch_up()).is_ok()
        fault.quantities.add(7)
        with pytest.raises(TooManyDeadLettersError, match="_anew has 3 dead"):
            await shop.rebuild("sales")
        assert set((await rows(shop, sales(fault))).values()) == {7}


async def last(shop, sell):
    return (await shop.commands.dispatch(sell("S0", 1))).unwrap()


async def unknown(shop, topic="of.another.release", aggregate_id=None, version=1):
    """Write an event that no class of the model is for."""
    stored = shop._store.log.read(0, 1)[0]
    event = EncodedEvent(aggregate_id or uuid4(), version, topic, stored.state)
    save = Save(uuid4(), "Other", [event], ((event.aggregate_id, version),), None)
    shop._store.log.commit([Group([save])])


async def test_an_event_of_an_unknown_type_is_parked_and_all_else_goes_on(
    store_url, register, sell
):
    view = sales(Fault())
    async with opened(store_url, view) as shop:
        await shop.commands.dispatch_all([register("A", 100), register("B", 100)])
        await unknown(shop, aggregate_id=Item.id_of("B"), version=2)
        await sold(shop, sell, 1)
        assert await rows(shop, view) == {"A": 1, "B": 0}
        (letter,) = await shop.dead_letters("sales")
        assert (letter.key, letter.topic) == (Item.id_of("B").hex, "of.another.release")


async def test_a_release_that_knows_a_type_takes_in_what_an_older_one_put_aside(
    shared_url, register, sell
):
    class Counted(Event, topic="test.counted"):
        quantity: int

    class Count(Aggregate, topic="test.count", events=(Counted,)):
        pass

    def counting(*event_types):
        view = sales(Fault())
        for event_type in event_types:
            view.on(event_type)(lambda row, event: Sales("counted", event.quantity))
        return view

    async with opened(shared_url, counting()) as shop:
        await shop.commands.dispatch(register("A", 100))
        counted = Counted(quantity=3)
        counted.stamp(Count.id_of("x"), 1, datetime.now(UTC))
        event = EventMapper.of(Count)(JSONTranscoder()).encode(counted)
        save = Save(uuid4(), "Other", [event], ((event.aggregate_id, 1),), None)
        shop._store.log.commit([Group([save])])
        await rows(shop, counting())
        assert await shop.retry("item_stock") == Retried(0, 1)
        assert len(await shop.dead_letters("item_stock")) == 1
    model = replace(item_model, aggregates=(*item_model.aggregates, Count))
    async with Runtime(model, shared_url) as shop:
        for _ in range(200):
            if not await shop.dead_letters("item_stock"):
                break
            await asyncio.sleep(0.02)
        assert await shop.dead_letters("item_stock") == ()


async def test_views_that_are_to_halt_do_so_before_an_event_of_an_unknown_type(
    store_url, register, sell
):
    view = sales(Fault(), on_poison="halt")
    async with opened(store_url, view) as shop:
        await shop.commands.dispatch(register("A", 100))
        await unknown(shop)
        await sold(shop, sell, 1)
        assert isinstance((await shop.catch_up()).error, ViewStopped)
        assert "of.another.release" in health(shop).failure


async def test_a_key_that_is_too_long_for_an_index_is_the_events_fault(store_url, register, sell):
    view = Projection("sales", version=1, row=Sales, keys=lambda event: [event.invoice])

    @view.on_each(StockSold)
    def sold_(row, event, key):
        return Sales(key[:5], (row.sold if row else 0) + event.quantity)

    async with opened(store_url, view) as shop:
        await shop.commands.dispatch(register("A", 100))
        for invoice in ("1" * 1_000, "2" * 1_001, "ä" * 501, "3"):
            sale = sell("A", 1).model_copy(update={"invoice": invoice})
            (await shop.commands.dispatch(sale)).unwrap()
        assert await rows(shop, view) == {"11111": 1, "3": 1}
        letters = await shop.dead_letters("sales")
        assert [(letter.position, letter.key) for letter in letters] == [
            (3, Item.id_of("A").hex),
            (4, Item.id_of("A").hex),
        ]
        assert "is longer than 1000 bytes" in letters[0].error


async def test_one_event_may_be_parked_under_several_keys(store_url, register, sell):
    fault = Fault(7)

    def keys(event):
        return ("all", event.originator_id.hex)

    both = Projection("sales", version=1, row=Sales, keys=keys)

    @both.on_each(StockSold)
    def sold_(row, event, key):
        if event.quantity in fault.quantities:
            raise ValueError
        return Sales(key, (row.sold if row else 0) + event.quantity)

    @both.on(StockReceived)
    def received(row, event):
        return row

    a, b = Item.id_of("A").hex, Item.id_of("B").hex
    async with opened(store_url, both) as shop:
        await shop.commands.dispatch_all([register("A", 100), register("B", 100)])
        await sold(shop, sell, 1, 7)
        await sold(shop, sell, 2, sku="B")  # the row of all is parked: it waits, whole
        assert await rows(shop, both) == {"all": 1, a: 1}
        assert {letter.key for letter in await shop.dead_letters("sales")} == {"all", a, b}
        fault.quantities.clear()
        assert (await shop.retry("sales")).released == 2
        assert await rows(shop, both) == {"all": 10, a: 8, b: 2}


async def test_a_view_that_folds_as_another_is_apart_once_it_has_parked_something(
    store_url, register, sell
):
    class Fussy(Specification[Sales]):
        """Cannot tell of some rows."""

        def is_satisfied_by(self, row):
            if row.sold == 7:
                raise ZeroDivisionError
            return True

    base = sales(Fault())
    fussy = base.derive("fussy", version=1, specification=Fussy())
    model = replace(item_model, projections=(item_stock, base, fussy))
    async with Runtime(model, store_url) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 7)
        assert (await rows(shop, base)) == {"A": 7}
        await sold(shop, sell, 1)
        assert (await rows(shop, base)) == {"A": 8}
        letters = await shop.dead_letters("fussy")
        assert [letter.version for letter in letters] == [2, 3]
        kept = shop._store.views.load(fussy, [Item.id_of("A").hex])
        assert [row.sold for row in kept.values()] == [0]


async def test_a_view_that_parks_the_last_event_while_it_is_built_is_built(
    shared_url, register, sell
):
    async with Runtime(item_model, shared_url) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 7)
    view = sales(Fault(7), on_poison="park")
    async with opened(shared_url, view) as shop:
        assert await rows(shop, view) == {"A": 0}
        assert health(shop).state == "live"


async def test_a_view_stops_that_has_put_aside_too_much_behind_one_event(
    store_url, register, sell, monkeypatch
):
    monkeypatch.setattr(pages, "MAX_DEAD_LETTERS", 5)
    view = sales(Fault(7))
    async with opened(store_url, view) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 7, *[1] * 9)
        await shop.catch_up(1)
        assert health(shop).state == "halted"
        await shop.drop_dead_letters("sales")
        await until(lambda: health(shop).state == "live")
        assert health(shop).state == "live"


async def test_a_view_that_halted_goes_on_when_another_process_asks_for_it(
    shared_url, register, sell
):
    fault = Fault(7)
    view = sales(fault, on_poison="halt")
    async with opened(shared_url, view) as shop, opened(shared_url, view, follow=False) as other:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 7)
        assert isinstance((await shop.catch_up()).error, ViewStopped)
        fault.quantities.clear()
        await other.retry("sales")
        await until(lambda: health(shop).state == "live")
        assert await rows(shop, view) == {"A": 7}


async def test_who_lets_a_view_go_on_sees_at_once_that_it_may(shared_url, register, sell):
    view = sales(Fault(7), on_poison="halt")
    async with opened(shared_url, view) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 7)
        assert isinstance((await shop.catch_up()).error, ViewStopped)
    async with opened(shared_url, view, follow=False) as other:
        assert health(other).state == "halted"
        assert await other.drop_dead_letters("sales") == 0
        assert health(other).state == "halted"
        await other.retry("sales")
        assert (health(other).state, health(other).failure) == ("free", None)


async def test_to_give_up_nothing_changes_nothing(shared_url, register, sell):
    view = sales(Fault())
    async with opened(shared_url, view) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 7)
        (await shop.catch_up()).unwrap()
        before = shop._store.views.checkpoints([view])
        assert await shop.drop_dead_letters("sales") == 0
        assert shop._store.views.checkpoints([view]) == before


def telling(url, *, by):
    """A view that keeps the names of items in a table of its own, by a statement for each."""
    view = sales(Fault())
    mark = "?" if url.startswith("sqlite") else "%s"

    @view.executing
    def execute(execute, events):
        for event in events:
            if isinstance(event, ItemRegistered):
                by(execute, event.name, mark)

    return view


async def test_a_value_that_a_views_own_statement_does_not_take_is_the_events_fault(
    shared_url, register
):
    def in_json(execute, name, mark):
        taken = "json_extract('{}', ?)" if mark == "?" else "%s::json"
        execute(f"SELECT {taken}", (name,))

    view = telling(shared_url, by=in_json)
    async with opened(shared_url, view) as shop:
        good = "$.a" if shared_url.startswith("sqlite") else "[]"
        names = {"A": good, "B": "secret", "C": good}
        for sku, name in names.items():
            command = register(sku).model_copy(update={"name": name})
            (await shop.commands.dispatch(command)).unwrap()
        (await shop.catch_up()).unwrap()
        (letter,) = await shop.dead_letters("sales")
        assert letter.position == 2
        assert "secret" not in letter.error


async def test_a_statement_that_is_wrong_for_every_event_stops_the_view(shared_url, register):
    view = telling(shared_url, by=lambda execute, *_: execute("INSERT INTO told VALUES (1, 2, 3)"))
    async with opened(shared_url, view) as shop:
        execute(shared_url, "CREATE TABLE told (a int, b int)")
        (await shop.commands.dispatch(register("A"))).unwrap()
        assert isinstance((await shop.catch_up()).error, ViewStopped)
        assert await shop.dead_letters("sales") == ()


async def test_why_a_view_stopped_quotes_no_value(shared_url, register):
    def unwisely(execute, name, mark):
        execute(f"SELECT ('{name}')")

    view = telling(shared_url, by=unwisely)
    async with opened(shared_url, view) as shop:
        command = register("A").model_copy(update={"name": "Pat O'Brien"})
        (await shop.commands.dispatch(command)).unwrap()
        assert isinstance((await shop.catch_up()).error, ViewStopped)
        assert "ProgrammingError" in health(shop).failure
        assert "Brien" not in health(shop).failure


async def test_a_row_that_is_too_large_for_an_index_is_parked(postgres_url, register, sell):
    wide = Projection("wide", version=1, row=Sales, indexes=["sku"])
    text = "".join(chr(0x4E00 + n * 7919 % 20_000) for n in range(6_000))
    wide.on(ItemRegistered)(lambda row, event: Sales(text if event.sku == "A" else "", 0))
    async with opened(postgres_url, wide) as shop:
        await shop.commands.dispatch_all([register("A", 1), register("B", 1)])
        (await shop.catch_up()).unwrap()
        (letter,) = await shop.dead_letters("wide")
        assert "index row" in letter.error
