"""Following the log, page by page, whatever comes in between."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from time import monotonic
from uuid import uuid4

import psycopg
import pytest
from eventsourcing.persistence import OperationalError, ProgrammingError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leftfold.application import Projection, Receipt, ViewBehind, ViewStopped
from leftfold.application.checkpoints import Change
from leftfold.application.items import (
    FindItems,
    GetItem,
    ItemRow,
    RegisterItem,
    SellStock,
    item_model,
    item_stock,
)
from leftfold.application.ports import EncodedEvent, Group, Save
from leftfold.domain import DomainError, Err, attr
from leftfold.domain.items import ItemRegistered, ItemRenamed, StockReceived, StockSold
from leftfold.infrastructure import Runtime, Settings
from leftfold.infrastructure.follower import FIRST_PAGE
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.pages import Fold, Pages
from leftfold.infrastructure.platform import SystemPlatform, collector_paused
from leftfold.infrastructure.stores import make_store

pytestmark = pytest.mark.anyio
SECRET = "s3cret"


@dataclass(frozen=True, slots=True)
class Flow:
    country: str
    sold: int
    sales: int


def flows():
    """A view whose rows are fed by many aggregates, come to be hidden, and are deleted."""
    flow = Projection(
        "flows",
        version=1,
        row=Flow,
        specification=attr("sold") > 2,
        key=lambda event: event.country,
    )

    @flow.on(StockSold)
    def sold(row, event):
        row = row or Flow(event.country, 0, 0)
        row = replace(row, sold=row.sold + event.quantity, sales=row.sales + 1)
        return None if row.sold % 7 == 0 else row

    return flow


def counting(name="counts", fails_on=None):
    """A view that counts events by aggregate, and may raise."""
    counts = Projection(name, version=1, row=Flow, on_poison="halt")

    def count(row, event):
        if fails_on is not None and isinstance(event, fails_on):
            raise ZeroDivisionError("a bug in the projection")
        return Flow("", 0, (row.sales if row else 0) + 1)

    for event_type in (ItemRegistered, ItemRenamed, StockSold, StockReceived):
        counts.on(event_type)(count)
    return counts


@asynccontextmanager
async def opened(url, *projections, **options):
    model = replace(item_model, projections=(item_stock, *projections))
    async with Runtime(model, settings=Settings(store=url, **options)) as shop:
        yield shop


# Failing projections --------------------------------------------------------------------------


async def test_a_projection_that_raises_stops_and_health_says_why(store_url, register, sell):
    async with opened(store_url, counting(fails_on=StockSold)) as shop:
        written = (await shop.commands.dispatch(register("A", 10))).unwrap()
        (await shop.wait_for(written)).unwrap()
        assert shop.health().is_healthy
        sold = (await shop.commands.dispatch(sell("A"))).unwrap()
        assert not (await shop.wait_for(sold)).is_ok()
        healthy, failed = shop.health().projections
        assert not shop.health().is_healthy
    assert healthy.failure is None
    assert re.fullmatch(
        r"projection counts_v1 stopped: ZeroDivisionError in count, line \d+ of test_follower.py",
        failed.failure,
    )
    assert failed.position == written.position


class Nosy(DomainError, message="{name} is at fault"):
    name: str


@pytest.mark.parametrize("error", [KeyError(SECRET), Nosy(SECRET)])
async def test_a_projection_that_stops_does_not_say_what_its_error_quotes(
    caplog, store_url, register, error
):
    caplog.set_level(logging.DEBUG, "leftfold.follower")
    quoting = Projection("quoting", version=1, row=Flow, on_poison="halt")

    @quoting.on(ItemRegistered)
    def quote(row, event):
        raise error

    async with opened(store_url, quoting) as shop:
        written = (await shop.commands.dispatch(register())).unwrap()
        answer = await shop.wait_for(written)
        failure = shop.health().projections[1].failure
    assert f"{type(error).__name__} in quote" in failure
    assert SECRET not in f"{failure} {answer.error} {answer.error!r} {caplog.text}"


async def test_a_database_that_refuses_a_row_is_told_without_the_row(
    caplog, postgres_url, register
):
    caplog.set_level(logging.DEBUG, "leftfold.follower")
    named = Projection("named", version=1, row=Flow, on_poison="halt")
    named.on(ItemRegistered)(lambda _, event: Flow(SECRET, 1, 1))
    async with opened(postgres_url, named) as shop:
        with psycopg.connect(postgres_url) as connection:
            connection.execute("ALTER TABLE named_v1 ADD CHECK (sales > 1)")
        written = (await shop.commands.dispatch(register())).unwrap()
        answer = await shop.wait_for(written)
        failure = shop.health().projections[1].failure
    assert "IntegrityError: new row for relation" in failure
    assert SECRET not in f"{failure} {answer.error} {answer.error!r} {caplog.text}"


async def test_other_things_go_on_beside_a_projection_that_stopped(store_url, register, sell):
    async with opened(store_url, counting(fails_on=ItemRegistered)) as shop:
        await shop.commands.dispatch(register("A", 10))
        for _ in range(3):
            sold = (await shop.commands.dispatch(sell("A"))).unwrap()
            row = (await shop.queries.dispatch(GetItem(sku="A"), after=sold)).unwrap()
        assert row.on_hand == 7
        assert (await shop.wait_for(sold, ["item_stock"])).is_ok()


async def test_waiting_for_a_projection_that_stopped_ends_at_once(store_url, register, sell):
    async with opened(store_url, counting(fails_on=StockSold), view_timeout=6) as shop:
        await shop.commands.dispatch(register("A", 10))
        sold = (await shop.commands.dispatch(sell("A"))).unwrap()
        for _ in range(2):  # while it stops, and after it stopped
            begun = monotonic()
            answer = await shop.wait_for(sold)
            assert monotonic() - begun < 2
            assert isinstance(answer, Err)
            assert (answer.error.projection, answer.error.wanted) == ("counts", sold.position)


async def test_a_stopped_projection_goes_on_where_it_was_once_it_is_mended(
    shared_url, register, sell
):
    async with opened(shared_url, counting(fails_on=StockSold)) as shop:
        await shop.commands.dispatch(register("A", 10))
        sold = (await shop.commands.dispatch(sell("A"))).unwrap()
        await shop.wait_for(sold)
    async with opened(shared_url, counting()) as shop:
        (await shop.wait_for(sold)).unwrap()
        rows = dict(shop._store.views.select(shop.model.projections[1], None, None))
    assert [row.sales for row in rows.values()] == [2]


async def test_a_row_that_cannot_be_kept_stops_its_projection(store_url, register):
    @dataclass(frozen=True, slots=True)
    class Share:
        share: Decimal

    thirds = Projection("thirds", version=1, row=Share, on_poison="halt")
    thirds.on(ItemRegistered)(lambda _, event: Share(event.unit_price / 7))
    async with opened(store_url, thirds) as shop:
        written = (await shop.commands.dispatch(register("A", 10))).unwrap()
        begun = monotonic()
        assert isinstance(await shop.wait_for(written), Err)
        assert monotonic() - begun < 2
        assert "thirds" in (shop.health().projections[1].failure or "")
        assert (await shop.wait_for(written, ["item_stock"])).is_ok()


async def test_a_row_with_none_where_none_is_not_foreseen_stops_its_projection(store_url, register):
    nameless = Projection("nameless", version=1, row=Flow, on_poison="halt")
    nameless.on(ItemRegistered)(lambda _, event: Flow(event.sku, None, 0))
    async with opened(store_url, nameless) as shop:
        written = (await shop.commands.dispatch(register("A", 10))).unwrap()
        assert isinstance(await shop.wait_for(written, timeout=1), Err)
        assert "nameless" in (shop.health().projections[1].failure or "")


# Pages ----------------------------------------------------------------------------------------


MOVES = st.lists(
    st.tuples(st.sampled_from(["A", "B"]), st.sampled_from(["UK", "DE", "FR"]), st.integers(1, 4)),
    max_size=14,
)


@pytest.mark.parametrize("page_size", [1, 2, 3, 7])
async def test_small_pages_give_the_same_view_as_large_ones(store_url, register, sell, page_size):
    flow = flows()
    settings = Settings(store=store_url, page_size=page_size)
    model = replace(item_model, projections=(flow, item_stock))
    runtime = Runtime(model, settings=settings)
    async with runtime as shop:
        await shop.commands.dispatch_all([register("A", 1_000), register("B", 1_000)])
        for n in range(6):
            sales = [
                sell("AB"[k % 2], 1 + k % 3).model_copy(update={"country": f"C{k % 4}"})
                for k in range(n, n + 5)
            ]
            (await shop.commands.dispatch_all(sales)).unwrap()
        (await shop.catch_up()).unwrap()
        views, log, mapper = shop._store.views, shop._store.log, shop._parts.mapper
        events = [mapper.decode(*event[1:]) for event in log.read(0, 5_000)]
        for projection in (flow, item_stock):
            folded = projection.fold(events, lambda _: {})
            expected = {key: row for key, row in folded.items() if row is not None}
            assert views.load(projection, list(folded)) == expected
            shown = {key: row for key, row in expected.items() if projection.shows(row)}
            assert dict(views.select(projection, None, None)) == shown
    assert len(events) == 32


@given(st.lists(MOVES, max_size=3), st.integers(1, 5), st.integers(1, 5))
@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_two_followers_in_any_turn_fold_each_event_once(store_url, bursts, one_size, other_size):
    """Two followers of one view take turns on a log that grows in between."""
    asyncio.run(_take_turns(store_url, bursts, one_size, other_size))


async def _take_turns(store_url, bursts, one_size, other_size):
    async with open_items(store_url) as shop:
        store, mapper = shop._store, shop._parts.mapper
        flow, platform = flows(), SystemPlatform()
        second = make_store(shop.settings) if store_url != "memory:" else store
        second.open((flow,), create_tables=True)
        try:
            begun = store.log.head()
            pages = Pages(second.log, second.views, mapper, platform)
            (at,) = second.views.checkpoints([flow])
            second.views.write([Change(flow, at, dict.fromkeys(("UK", "DE", "FR")))], begun)
            folds = [(Fold(flow), size) for size in (one_size, other_size)]

            def fold_page(fold, size):
                fold.adopt(second.views.checkpoints([flow])[0])
                return pages.fold([fold], size).has_more

            for sku in ("A", "B"):
                await shop.commands.dispatch(
                    RegisterItem(sku=sku, name="x", unit_price=1, opening_stock=10**6)
                )
            for moves in bursts:
                sales = [
                    SellStock(sku=sku, quantity=n, invoice="1", country=country)
                    for sku, country, n in moves
                ]
                if sales:
                    (await shop.commands.dispatch_all(sales)).unwrap()
                for fold, size in folds:
                    await asyncio.to_thread(fold_page, fold, size)
            while any([await asyncio.to_thread(fold_page, *turn) for turn in folds]):
                pass
            events = [mapper.decode(*event[1:]) for event in store.log.read(begun, 5_000)]
            folded = flow.fold(events, lambda _: {})
            expected = {key: row for key, row in folded.items() if row is not None}
            assert second.views.load(flow, ["UK", "DE", "FR"]) == expected
        finally:
            platform.close()
            if second is not store:
                second.close()


async def test_a_page_that_comes_too_late_is_folded_again_from_the_new_rows(
    shared_url, register, sell
):
    async with open_items(shared_url) as shop:
        await shop.commands.dispatch(register("A", 100))
        (await shop.catch_up()).unwrap()
        late = shop._parts.follower.readers["item_stock_v1"]
        views = shop._store.views
        genuine, raced = views.write, []

        def write(changes, position, **options):
            if not raced:
                raced.append(genuine(changes, position, **options))
            return genuine(changes, position, **options)

        views.write = write  # another process is first, by a hair
        receipt = (await shop.commands.dispatch(sell("A", 1))).unwrap()
        (await shop.wait_for(receipt)).unwrap()
        row = (await shop.queries.dispatch(GetItem(sku="A"))).unwrap()
        assert (raced, row.units_sold, late.failure) == ([True], 1, None)


async def test_a_view_stops_before_an_event_that_the_model_does_not_know(store_url, register, sell):
    """Such an event may have been meant for it: to pass it over would make the view false."""
    only_sales = Projection(
        "only_sales", version=1, row=Flow, key=lambda event: event.country, on_poison="halt"
    )
    only_sales.on(StockSold)(lambda row, event: row or Flow(event.country, 0, 0))
    async with opened(store_url, only_sales) as shop:
        (await shop.commands.dispatch(register("A", 9))).unwrap()
        (await shop.catch_up()).unwrap()
        stored = shop._store.log.read(0, 1)[0]
        unknown = EncodedEvent(uuid4(), 1, "of.another.release", stored.state)
        save = Save(uuid4(), "Other", [unknown], ((unknown.aggregate_id, 1),), None)
        shop._store.log.commit([Group([save])])
        sold = (await shop.commands.dispatch(sell("A"))).unwrap()
        behind = (await shop.wait_for(sold, ["only_sales"])).error
        assert isinstance(behind, ViewStopped)
        assert "of.another.release" in behind.reason
        failures = {p.name: p.failure for p in shop.health().projections}
        assert "of.another.release" in failures["only_sales"]


async def test_events_of_other_kinds_move_the_checkpoint_too(store_url, register, receive):
    async with opened(store_url, flows()) as shop:
        await shop.commands.dispatch(register("A", 1))
        received = (await shop.commands.dispatch(receive("A", 1))).unwrap()
        (await shop.wait_for(received, ["flows"])).unwrap()
        assert shop.health().projections[1].position == received.position


async def test_a_new_view_is_filled_from_the_beginning(shared_url, register, sell):
    async with open_items(shared_url) as shop:
        await shop.commands.dispatch(register("A", 1_000))
        for _ in range(4):
            (await shop.commands.dispatch_all([sell("A") for _ in range(50)])).unwrap()
    async with opened(shared_url, counting(), page_size=17) as shop:
        (await shop.catch_up()).unwrap()
        rows = dict(shop._store.views.select(shop.model.projections[1], None, None))
    assert [row.sales for row in rows.values()] == [201]


async def test_rows_that_a_page_deletes_can_come_again(store_url, register, sell):
    flow = flows()
    async with opened(store_url, flow) as shop:
        await shop.commands.dispatch(register("A", 1_000))
        seen = []
        for quantity in (3, 4, 5):
            sold = sell("A", quantity).model_copy(update={"country": "UK"})
            receipt = (await shop.commands.dispatch(sold)).unwrap()
            (await shop.wait_for(receipt)).unwrap()
            seen.append(shop._store.views.get(flow, "UK"))
    assert seen == [Flow("UK", 3, 1), None, Flow("UK", 5, 1)]


async def test_views_of_one_runtime_follow_independently(store_url, register):
    others = [counting(f"count_{n}") for n in range(8)]
    async with opened(store_url, *others) as shop:
        receipt = (await shop.commands.dispatch(register("A", 1))).unwrap()
        (await shop.wait_for(receipt)).unwrap()
        assert {p.position for p in shop.health().projections} == {receipt.position}
        page = (await shop.queries.dispatch(FindItems())).unwrap()
    assert isinstance(page.rows[0], ItemRow)


async def test_a_wait_that_ends_leaves_other_waits_alone(store_url, register):
    async with open_items(store_url) as shop:
        ahead = Receipt(uuid4(), (), 1)
        short = asyncio.ensure_future(shop.wait_for(ahead, timeout=0.05))
        long = asyncio.ensure_future(shop.wait_for(ahead, timeout=10))
        assert await short == Err(ViewBehind("item_stock", 0, 1))
        await shop.commands.dispatch(register("A", 1))
        assert (await long).is_ok()


async def test_a_process_that_only_watches_sees_what_another_folds_soon(shared_url, register, sell):
    watching = Settings(store=shared_url, follow=False)
    async with open_items(shared_url) as shop, open_items(settings=watching) as watcher:
        await shop.commands.dispatch(register("A", 100))
        for _ in range(3):
            sold = (await shop.commands.dispatch(sell("A"))).unwrap()
            begun = monotonic()
            (await watcher.wait_for(sold)).unwrap()
            assert monotonic() - begun < 0.5
            sold = (await shop.commands.dispatch(sell("A"))).unwrap()
            begun = monotonic()
            while watcher.health().projections[0].position < sold.position:
                assert monotonic() - begun < 0.5
                await asyncio.sleep(0.005)


# What views share ------------------------------------------------------------------------------


def seen(calls, fails_on=()):
    """A view that notes what it folds, and one that shows other rows of the same."""
    view = Projection("seen", version=1, row=Flow)

    @view.on(StockSold)
    def sold(row, event):
        calls.append(event.invoice)
        if event.quantity in fails_on:
            raise ZeroDivisionError
        return Flow(event.country, (row.sold if row else 0) + event.quantity, 1)

    return view, view.derive("much", version=1, specification=attr("sold") > 5)


async def shown(shop, view):
    (await shop.catch_up()).unwrap()
    return sorted(row.sold for _, row in shop._store.views.select(view, None, None))


async def test_views_that_fold_the_same_from_the_beginning_are_folded_once(
    store_url, register, sell
):
    calls = []
    every, much = seen(calls)
    async with opened(store_url, every, much) as shop:
        await shop.commands.dispatch_all([register("A", 100), register("B", 100)])
        (await shop.catch_up()).unwrap()
        for quantity in (2, 3, 4):
            await shop.commands.dispatch_all([sell("A", quantity), sell("B", 1)])
            (await shop.catch_up()).unwrap()
        assert (await shown(shop, every), await shown(shop, much)) == ([3, 9], [9])
    assert len(calls) == 6


async def test_views_that_fold_the_same_and_were_treated_differently_stay_different(
    store_url, register, sell
):
    fails_on = {7}
    every, much = seen([], fails_on)
    async with opened(store_url, every, much) as shop:
        await shop.commands.dispatch(register("A", 100))
        await shop.commands.dispatch_all([sell("A", 6), sell("A", 7), sell("A", 1)])
        assert (await shown(shop, every), await shown(shop, much)) == ([6], [6])
        await shop.drop_dead_letters("seen")
        fails_on.clear()
        await shop.retry("much")
        await shop.commands.dispatch(sell("A", 2))
        assert (await shown(shop, every), await shown(shop, much)) == ([8], [16])


async def test_after_a_restart_views_go_on_from_their_own_rows(shared_url, register, sell):
    for _ in range(2):
        every, much = seen([])
        async with opened(shared_url, every, much) as shop:
            await shop.commands.dispatch(register("A", 100))
            await shop.commands.dispatch(sell("A", 4))
            await shown(shop, every)
    async with opened(shared_url, every, much) as shop:
        assert (await shown(shop, every), await shown(shop, much)) == ([8], [8])


def test_the_collector_runs_again_after_a_page_and_stays_off_where_it_was_off():
    with collector_paused():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


async def test_a_view_that_stops_after_an_outage_leaves_the_processor_alone(
    store_url, register, monkeypatch
):
    async with open_items(settings=Settings(store=store_url, follow=False)) as shop:
        (await shop.commands.dispatch(register())).unwrap()
        follower, errors = shop._parts.follower, [OperationalError("away"), ProgrammingError("no")]
        groups, asked = follower._groups, []

        def begin(_folds, _limit):
            raise errors.pop(0)

        monkeypatch.setattr(shop._parts.pages, "begin", begin)
        monkeypatch.setattr(follower, "_groups", lambda now: asked.append(now) or groups(now))
        shop.follow()
        assert isinstance((await shop.catch_up()).error, ViewStopped)
        asked.clear()
        await asyncio.sleep(1.5)  # within the lease
        assert len(asked) < 30


async def test_a_page_that_fails_for_a_moment_is_tried_again_half_as_long(
    store_url, register, monkeypatch
):
    model = replace(item_model, projections=(item_stock,))
    async with Runtime(model, settings=Settings(store=store_url, follow=False)) as shop:
        (await shop.commands.dispatch(register())).unwrap()
        pages, errors, limits = shop._parts.pages, [OperationalError("too slow")] * 2, []
        begin = pages.begin

        def failing(folds, limit):
            limits.append(limit)
            if errors:
                raise errors.pop()
            return begin(folds, limit)

        monkeypatch.setattr(pages, "begin", failing)
        shop.follow()
        (await shop.catch_up()).unwrap()
        assert limits == [FIRST_PAGE, FIRST_PAGE // 2, FIRST_PAGE // 4]


async def test_whoever_watches_sees_how_quickly_others_get_on(shared_url, register):
    async with open_items(settings=Settings(store=shared_url, follow=False)) as shop:
        receipts = [(await shop.commands.dispatch(register(f"S{n}"))).unwrap() for n in range(60)]
        head, begun = receipts[-1].position, monotonic()
        follower, views = shop._parts.follower, shop._store.views
        for position in range(10, head, 10):  # others take in 40 events a second, ten at a time
            while monotonic() < begun + position / 40:  # many looks a page
                follower.look()
                await asyncio.sleep(0.01)
            (at,) = views.checkpoints([item_stock])
            assert views.write([Change(item_stock, at)], position)
        (found, *_) = shop.health().projections
        assert 20 < found.rate < 80


@pytest.mark.parametrize(("page_seconds", "grows"), [(60.0, True), (1e-6, False)])
async def test_pages_grow_and_shrink_to_take_as_long_as_they_may(
    sqlite_url, register, sell, page_seconds, grows
):
    async with open_items(settings=Settings(store=sqlite_url, follow=False)) as shop:
        await shop.commands.dispatch(register("A", 10**6))
        for _ in range(12):
            (await shop.commands.dispatch_all([sell("A") for _ in range(500)])).unwrap()
    sizes = []
    settings = Settings(store=sqlite_url, page_seconds=page_seconds, follow=False)
    model = replace(item_model, projections=(item_stock,))
    async with Runtime(model, settings=settings) as shop:
        shop._parts.follower._paged = lambda reader, events, seconds: sizes.append(events)
        shop.follow()
        (await shop.catch_up(30)).unwrap()
        await asyncio.sleep(0.05)
        size = shop._parts.follower.readers["item_stock_v1"].limit
    assert sum(sizes) == 6_001
    assert (size > FIRST_PAGE) is grows
    assert size >= 1
