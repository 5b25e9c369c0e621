"""New versions of views beside the old ones, and views that are built anew beside themselves."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from threading import Event as Gate
from time import monotonic, sleep

import pytest
from databases import execute
from eventsourcing.persistence import OperationalError
from waiting import until

from leftfold.application import (
    EventStoreUnavailable,
    InvalidModelError,
    Projection,
    Query,
    QueryService,
)
from leftfold.application.checkpoints import Change, Comparison
from leftfold.application.errors import ViewBuilding
from leftfold.application.items import (
    GetItem,
    ItemQueries,
    ReorderProcess,
    item_model,
    item_stock,
)
from leftfold.application.subscriber import Subscriber
from leftfold.domain import Err, Ok, Result, attr
from leftfold.domain.items import Item, ItemNotFound, ItemRegistered, ItemRenamed, StockSold
from leftfold.infrastructure import (
    ProjectionFailedError,
    Runtime,
    Settings,
    ViewChangedError,
    follower,
    upkeep,
)
from leftfold.infrastructure.errors import ViewBusyError, ViewInUseError
from leftfold.infrastructure.health import ReaderState, dump_health

pytestmark = pytest.mark.anyio

SKUS = ("A", "B", "C", "D")


@dataclass(frozen=True, slots=True)
class Sold:
    sku: str
    units: int


@dataclass(frozen=True, slots=True)
class SoldAndNamed:
    sku: str
    units: int
    name: str


def sold_units(
    version=1,
    *,
    name="sold_units",
    factor=1,
    fails_on=(),
    waits=None,
    told=None,
    row=Sold,
    **options,
):
    """A view of the units sold of each item, times something."""
    units = Projection(name, version=version, row=row, **options)
    named = row is SoldAndNamed

    @units.on(ItemRegistered)
    def registered(row, event):
        if waits is not None:
            waits.wait(20)
        return SoldAndNamed(event.sku, 0, event.name) if named else Sold(event.sku, 0)

    @units.on(StockSold)
    def sold(row, event):
        if event.quantity in fails_on:
            raise ZeroDivisionError
        if told is not None:
            told.append(event.quantity)
        return replace(row, units=row.units + factor * event.quantity)

    return units


class GetSold(Query[Sold, ItemNotFound]):
    sku: str


def asking(view):
    class Asking(QueryService):
        def handlers(self):
            yield GetSold.handled_by(self.get)

        async def get(self, query: GetSold) -> Result[Sold, ItemNotFound]:
            row = await self.views.get(view, Item.id_of(query.sku).hex)
            return Err(ItemNotFound(query.sku)) if row is None else Ok(row)

    return Asking


def model_of(*views, **parts):
    """A model whose queries are about the last of some views."""
    projections = (item_stock, *views)
    return replace(
        item_model, projections=projections, queries=(ItemQueries, asking(views[-1])), **parts
    )


def of(url, *views, **options):
    return Runtime(model_of(*views), settings=Settings(store=url, **options))


def beside(shop, *views, **options):
    """Another runtime on the same store, also on one in memory."""
    other = of(shop.settings.store, *views, **options)
    if shop.settings.store == "memory:":
        other._store = shop._store
    return other


async def units(shop, sku="A", after=None):
    return (await shop.queries.dispatch(GetSold(sku=sku), after=after)).unwrap().units


@pytest.fixture
def fill(register, sell):
    """Register four items, and sell 1, 2, … of them in turn."""

    async def fill(shop, sales=8):
        (await shop.commands.dispatch_all([register(sku, 10_000) for sku in SKUS])).unwrap()
        selling = [sell(SKUS[n % len(SKUS)], n + 1) for n in range(sales)]
        (await shop.commands.dispatch_all(selling)).unwrap()
        (await shop.catch_up()).unwrap()

    return fill


def rows(shop, view):
    """All rows of a view, members or not."""
    return shop._store.views.load(view, [Item.id_of(sku).hex for sku in (*SKUS, "none")])


def damage(shop, view, changed):
    """Write rows by hand, past the log."""
    views = shop._store.views
    for _ in range(100):
        (at,) = views.checkpoints([view])
        if views.write([Change(view, at, changed)], at.position, is_fence=True):
            return
    raise AssertionError


def key(sku):
    return Item.id_of(sku).hex


def tables(url):
    """The names of tables and views of the database that belong to the units sold."""
    query = (
        "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')"
        if url.startswith("sqlite")
        else "SELECT table_name FROM information_schema.tables"
    )
    return {name for (name,) in execute(url, query) if name.startswith("sold_units")}


def shown(url):
    """What people find who ask the database for the view by its name."""
    return sorted(execute(url, "SELECT sku, units FROM sold_units"))


# A new version ---------------------------------------------------------------------------------


async def test_a_new_version_is_built_beside_the_old_one_which_goes_on_meanwhile(
    store_url, fill, sell
):
    gate = Gate()
    async with of(store_url, sold_units()) as old:
        await fill(old)
        async with beside(old, sold_units(2, factor=10, waits=gate)) as new:
            try:
                receipt = (await old.commands.dispatch(sell("A", 100))).unwrap()
                assert await units(old, after=receipt) == 1 + 5 + 100
                for after in (None, receipt):
                    answer = await new.queries.dispatch(GetSold(sku="A"), after=after)
                    assert isinstance(answer.error, ViewBuilding)
                    assert answer.error.projection == "sold_units"
                states = {p.name: p.state for p in new.health().projections}
                assert states["sold_units"] is ReaderState.BUILDING
            finally:
                gate.set()
            (await new.catch_up()).unwrap()
            for shop, sold in ((old, 107), (new, 108)):
                receipt = (await shop.commands.dispatch(sell("A", 1))).unwrap()
                for each, factor in ((old, 1), (new, 10)):
                    assert await units(each, after=receipt) == factor * sold


async def test_another_specification_is_another_version(store_url, fill, sell):
    async with of(store_url, sold_units()) as old:
        await fill(old)
        many = sold_units(2, specification=attr("units") > 10)
        async with beside(old, many) as new:
            (await new.catch_up()).unwrap()
            assert [r.units for _, r in new._store.views.select(many, None, None)] == [12]
            receipt = (await old.commands.dispatch(sell("A", 100))).unwrap()
            assert await units(new, after=receipt) == 106
            assert await new.queries.dispatch(GetSold(sku="B")) == Err(ItemNotFound("B"))
            assert await units(old, "B") == 8


@pytest.mark.parametrize(
    "changed",
    [
        {"specification": attr("units") > 10},
        {"where": attr("originator_version") > 0},
        {"row": SoldAndNamed},
    ],
)
async def test_what_a_view_shows_or_reads_or_holds_is_not_changed_without_a_new_version(
    store_url, fill, changed
):
    async with of(store_url, sold_units()) as shop:
        await fill(shop)
        for create_tables in (True, False):
            other = beside(shop, sold_units(**changed), create_tables=create_tables)
            with pytest.raises(ViewChangedError) as refusal:
                await other.open()
            assert refusal.value.projection == "sold_units_v1"
        async with beside(shop, sold_units(2, **changed)) as other:
            (await other.catch_up()).unwrap()


async def test_the_event_types_of_a_view_are_not_changed_without_a_new_version(store_url, fill):
    async with of(store_url, sold_units()) as shop:
        await fill(shop)
        more = sold_units()
        more.on(ItemRenamed)(lambda row, _: row)
        with pytest.raises(ViewChangedError):
            await beside(shop, more).open()


async def test_people_find_the_new_version_once_it_is_built_and_not_before(shared_url, fill, sell):
    gate = Gate()
    ones = [("A", 6), ("B", 8), ("C", 10), ("D", 12)]
    async with of(shared_url, sold_units()) as old:
        await fill(old)
        async with beside(old, sold_units(2, factor=10, waits=gate)) as new:
            try:
                receipt = (await old.commands.dispatch(sell("A", 1))).unwrap()
                (await old.wait_for(receipt)).unwrap()
                assert shown(shared_url) == [("A", 7), *ones[1:]]
            finally:
                gate.set()
            (await new.catch_up()).unwrap()
            tens = [("A", 70), ("B", 80), ("C", 100), ("D", 120)]
            assert shown(shared_url) == tens
    async with of(shared_url, sold_units()) as old:  # one that is not replaced yet starts again
        (await old.catch_up()).unwrap()
        assert shown(shared_url) == tens


@pytest.mark.parametrize("order", [1, -1])
async def test_of_two_versions_that_are_built_together_people_find_the_newer(
    shared_url, fill, order
):
    async with of(shared_url, sold_units(3)) as shop:
        await fill(shop)
    execute(shared_url, "DELETE FROM leftfold_checkpoints WHERE name = 'sold_units'")
    execute(shared_url, "DROP VIEW sold_units")
    views = [sold_units(1), sold_units(2, factor=10)][::order]
    async with of(shared_url, *views) as shop:
        (await shop.catch_up()).unwrap()
    assert shown(shared_url)[0] == ("A", 60)


# Comparing and dropping versions ---------------------------------------------------------------


async def compared(shop, name="sold_units"):
    """Wait until a runtime tells how a view differed from the version before it."""
    await until(lambda: compared_views(shop)[name] is not None)
    return compared_views(shop)[name]


def compared_views(shop):
    return {each.name: each.compared for each in shop.health().projections}


async def test_a_new_version_tells_how_it_differs_from_the_old_one_when_it_takes_over(
    store_url, fill, caplog
):
    newer = sold_units(2, specification=attr("units") < 9)
    async with of(store_url, sold_units()) as old:
        await fill(old)
        async with beside(old, newer) as new:
            (await new.catch_up()).unwrap()
            assert await compared(new) == Comparison(2, 2, 0, 0)
            assert await new.compare_versions("sold_units") == Comparison(2, 2, 0, 0)
            assert compared_views(old)["sold_units"] is None
            assert '"changed": 2' in dump_health(new.health())
    told = "sold_units_v2 beside the version before: 2 same, 2 changed, 0 added, 0 removed"
    assert ("leftfold.follower", logging.WARNING, told) in caplog.record_tuples


async def test_a_new_version_that_put_its_last_event_aside_is_compared_too(store_url, fill, sell):
    newer = sold_units(2, fails_on={77}, on_poison="park")
    async with of(store_url, sold_units()) as old:
        await fill(old)
        (await old.commands.dispatch(sell("A", 77))).unwrap()
        async with beside(old, newer) as new:
            assert await compared(new) == Comparison(3, 1, 0, 0)


async def test_versions_are_compared_one_after_the_other(store_url, fill, monkeypatch):
    names = ["one", "two", "three"]
    views = [[sold_units(version, name=name) for name in names] for version in (1, 2)]
    at_once = []
    async with of(store_url, *views[0]) as old:
        await fill(old)
        new = beside(old, *views[1])
        compare = type(old._store.views).compare

        def slowly(self, *which):
            at_once.append(at_once[-1] + 1 if at_once else 1)
            sleep(0.1)
            at_once.append(at_once[-1] - 1)
            return compare(self, *which)

        monkeypatch.setattr(type(old._store.views), "compare", slowly)
        async with new:
            for name in names:
                assert await compared(new, name) == Comparison(4, 0, 0, 0)
    assert max(at_once) == 1


async def test_a_version_nobody_keeps_up_to_date_is_not_compared(
    shared_url, fill, sell, monkeypatch, caplog
):
    monkeypatch.setattr(follower, "COMPARED", 3)
    async with of(shared_url, sold_units()) as old:
        await fill(old)
    async with Runtime(item_model, settings=Settings(store=shared_url)) as shop:
        (await shop.commands.dispatch(sell("A", 1))).unwrap()
    async with of(shared_url, sold_units(2)) as new:
        (await new.catch_up()).unwrap()
        await until(lambda: "sold_units_v2 and sold_units_v1 were never equally far" in caplog.text)
        assert await new.compare_versions("sold_units") is None
        assert compared_views(new)["sold_units"] is None


async def test_versions_are_compared_row_by_row(store_url, register, fill):
    newer = sold_units(2, specification=attr("units") < 9)
    async with of(store_url, sold_units(), newer) as shop:
        await fill(shop)
        assert await shop.compare_versions("sold_units") == Comparison(2, 2, 0, 0)
        damage(shop, newer, {key("A"): None, key("none"): Sold("none", 1)})
        assert await shop.compare_versions("sold_units") == Comparison(1, 2, 1, 1)
        (await shop.commands.dispatch(register("none"))).unwrap()
        (await shop.catch_up()).unwrap()
        assert await shop.compare_versions("sold_units") == Comparison(2, 2, 0, 1)


async def test_only_versions_with_the_same_columns_are_compared(store_url, fill):
    async with of(store_url, sold_units(), sold_units(2, row=SoldAndNamed)) as shop:
        await fill(shop)
        assert await shop.compare_versions("sold_units") is None
        assert await shop.compare_versions("item_stock") is None


async def test_a_version_that_is_kept_is_not_dropped(store_url, fill):
    async with of(store_url, sold_units()) as old:
        await fill(old)
        async with beside(old, sold_units(2)) as new:
            (await new.catch_up()).unwrap()
            for shop, version in ((old, 1), (new, 2), (new, 1), (old, 2)):
                with pytest.raises(ViewInUseError):
                    await shop.drop_version("sold_units", version)
            assert await units(old) == await units(new) == 6


async def test_a_version_that_nobody_keeps_is_dropped(store_url, fill):
    async with of(store_url, sold_units()) as old:
        await fill(old)
        async with beside(old, sold_units(2)) as new:
            (await new.catch_up()).unwrap()
            store = old._store
            await old.close()
            await new.drop_version("sold_units", 1)
            assert new._store.views.versions("sold_units") == {2: True}
            assert await units(new) == 6
            with pytest.raises(InvalidModelError):
                await new.drop_version("sold_units", 1)
            if store_url == "memory:":
                assert store.views.load(sold_units(), [key("A")]) == {}
            else:
                assert tables(store_url) == {"sold_units", "sold_units_v2"}
                assert shown(store_url)[0] == ("A", 6)


async def test_a_version_that_people_still_see_leaves_no_broken_view_behind(shared_url, fill):
    async with of(shared_url, sold_units()) as shop:
        await fill(shop)
    async with Runtime(item_model, shared_url) as shop:
        await shop.drop_version("sold_units", 1)
    assert tables(shared_url) == set()


async def test_what_an_interrupted_rebuild_left_is_dropped_with_its_version(
    shared_url, fill, monkeypatch
):
    monkeypatch.setattr(upkeep, "REBUILD", 2)
    async with of(shared_url, sold_units()) as shop:
        await fill(shop)
        await interrupted(shop)
    assert "sold_units_v1_anew" in tables(shared_url)
    async with Runtime(item_model, shared_url) as shop:
        await shop.drop_version("sold_units", 1)
    assert tables(shared_url) == set()


# A view that is built anew ----------------------------------------------------------------------


async def test_a_rebuild_mends_just_the_rows_that_are_wrong(store_url, fill):
    view = sold_units()
    async with of(store_url, view) as shop:
        await fill(shop)
        right = rows(shop, view)
        assert await shop.rebuild("sold_units") == Comparison(4, 0, 0, 0)
        damage(shop, view, {key("A"): Sold("A", 99), key("B"): None, key("none"): Sold("x", 1)})
        assert await units(shop) == 99
        assert await shop.rebuild("sold_units") == Comparison(2, 1, 1, 1)
        assert rows(shop, view) == right
        assert await units(shop) == 6


async def test_a_rebuild_mends_what_was_changed_in_the_database(shared_url, fill):
    view = sold_units()
    async with of(shared_url, view) as shop:
        await fill(shop)
        right = rows(shop, view)
        execute(shared_url, "UPDATE sold_units_v1 SET units = 99 WHERE sku = 'A'")
        execute(shared_url, "DELETE FROM sold_units_v1 WHERE sku = 'B'")
        hidden = "UPDATE sold_units_v1 SET member = (1 = 0) WHERE sku = 'C'"
        execute(shared_url, hidden)
        assert await shop.rebuild("sold_units") == Comparison(1, 2, 1, 0)
        assert rows(shop, view) == right
        assert [sku for sku, _ in shown(shared_url)] == list(SKUS)
        assert tables(shared_url) == {"sold_units", "sold_units_v1"}


async def test_a_view_is_read_and_written_while_it_is_built_anew(
    store_url, fill, sell, monkeypatch
):
    monkeypatch.setattr(upkeep, "REBUILD", 20)
    view = sold_units()
    async with of(store_url, view) as shop:
        await fill(shop)
        (await shop.commands.dispatch_all([sell("D", 1) for _ in range(400)])).unwrap()
        (await shop.catch_up()).unwrap()
        damage(shop, view, {key("A"): Sold("A", 99), key("B"): None})
        sold = 0
        rebuilding = asyncio.ensure_future(shop.rebuild("sold_units"))
        while not rebuilding.done():
            receipt = (await shop.commands.dispatch(sell("C", 1))).unwrap()
            sold += 1
            assert await units(shop, "C", after=receipt) == 10 + sold
            assert await units(shop, "A") in {99, 6}
        assert rebuilding.result() == Comparison(2, 1, 1, 0)
        assert sold > 1
        found = {row.sku: row.units for row in rows(shop, view).values()}
        assert found == {"A": 6, "B": 8, "C": 10 + sold, "D": 412}
        receipt = (await shop.commands.dispatch(sell("A", 1))).unwrap()
        assert await units(shop, after=receipt) == 7


async def test_who_keeps_a_view_goes_on_from_what_another_process_has_mended(
    shared_url, fill, sell
):
    view = sold_units()
    async with of(shared_url, view) as shop, beside(shop, view, follow=False) as other:
        await fill(shop)
        damage(shop, view, {key("A"): Sold("A", 99)})
        receipt = (await shop.commands.dispatch(sell("A", 1))).unwrap()
        assert await units(shop, after=receipt) == 100
        assert await other.rebuild("sold_units") == Comparison(3, 1, 0, 0)
        assert await units(shop) == await units(other) == 7
        receipt = (await other.commands.dispatch(sell("A", 1))).unwrap()
        assert await units(other, after=receipt) == 8


async def test_a_take_over_may_take_longer_than_other_calls_of_the_store(postgres_url, fill):
    view = sold_units()
    async with of(postgres_url, view, store_timeout=0.5) as shop:
        await fill(shop)
        damage(shop, view, {key("A"): Sold("A", 99)})
        execute(
            postgres_url,
            "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql "
            "AS 'BEGIN PERFORM pg_sleep(1.2); RETURN NULL; END'",
        )
        execute(
            postgres_url,
            "CREATE TRIGGER slowly AFTER DELETE ON sold_units_v1 EXECUTE FUNCTION slowly()",
        )
        assert await shop.rebuild("sold_units") == Comparison(3, 1, 0, 0)
        assert await units(shop) == 6


async def test_a_comparison_may_take_longer_than_other_calls_of_the_store(postgres_url, fill):
    old, new = sold_units(), sold_units(version=2)
    async with of(postgres_url, old) as shop:
        await fill(shop)
    async with of(postgres_url, new, store_timeout=0.5) as shop:
        (await shop.catch_up()).unwrap()
        execute(postgres_url, "ALTER TABLE sold_units_v1 RENAME TO all_sold")
        execute(
            postgres_url,
            "CREATE VIEW sold_units_v1 AS SELECT all_sold.* FROM all_sold, pg_sleep(1.2)",
        )
        assert await shop.compare_versions("sold_units") == Comparison(4, 0, 0, 0)


async def test_closing_does_not_wait_for_a_comparison(postgres_url, fill):
    old, new = sold_units(), sold_units(version=2)
    async with of(postgres_url, old) as shop:
        await fill(shop)
    execute(postgres_url, "ALTER TABLE sold_units_v1 RENAME TO all_sold")
    execute(
        postgres_url, "CREATE VIEW sold_units_v1 AS SELECT all_sold.* FROM all_sold, pg_sleep(60)"
    )
    comparing = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    async with of(postgres_url, new) as shop:
        (await shop.catch_up()).unwrap()
        await until(lambda: execute(postgres_url, comparing) == [(1,)])
        begun = monotonic()
    assert monotonic() - begun < 4  # those that hang are given five


async def test_a_rebuild_ends_though_the_view_is_written_without_a_break(shared_url, fill, sell):
    view = sold_units()
    async with of(shared_url, view) as shop, beside(shop, view, follow=False) as other:
        await fill(shop)
        done, is_over = [], False

        async def sells(sku):
            while not is_over:
                done.append((await shop.commands.dispatch(sell(sku))).unwrap())
                await asyncio.sleep(0)

        sellers = [asyncio.ensure_future(sells(sku)) for sku in SKUS]
        try:
            for each in (shop, other):
                assert await asyncio.wait_for(each.rebuild("sold_units"), 20) == Comparison(
                    4, 0, 0, 0
                )
        finally:
            is_over = True
            await asyncio.gather(*sellers)
        (await shop.catch_up()).unwrap()
        assert sum(row.units for row in rows(shop, view).values()) == 36 + len(done)


async def test_all_views_of_the_shop_come_out_of_a_rebuild_as_they_were(
    store_url, register, sell, receive
):
    async with Runtime(item_model, store_url) as shop:
        for n, sku in enumerate(SKUS):
            await shop.commands.dispatch(register(sku, 3_000 + n))
            moves = [move(sku, 1 + k * (n + 1)) for k in range(20) for move in (sell, receive)]
            (await shop.commands.dispatch_all(moves)).unwrap()
        (await shop.catch_up()).unwrap()
        for view in item_model.projections:
            views = shop._store.views
            days = [k for k, _ in views.select(view, None, None)]
            before = views.load(view, [*days, *map(key, SKUS)])
            assert before
            assert await shop.rebuild(view.name) == Comparison(len(before), 0, 0, 0)
            damage(shop, view, dict.fromkeys(before))
            assert await shop.rebuild(view.name) == Comparison(0, 0, len(before), 0)
            assert views.load(view, list(before)) == before


async def test_a_rebuild_tells_how_far_it_is(store_url, fill, monkeypatch):
    monkeypatch.setattr(upkeep, "REBUILD", 5)
    async with of(store_url, sold_units()) as shop:
        await fill(shop)
        told = []
        await shop.rebuild("sold_units", lambda at, head: told.append((at, head)))
    assert [at for at, _ in told] == sorted({at for at, _ in told})
    assert len(told) >= 3
    assert told[-1] == (12, 12)


async def interrupted(shop, after=1):
    """Begin a rebuild of the units sold, and cancel it after some pages; return how far it was."""
    far, positions = asyncio.Event(), []

    def told(position, _):
        positions.append(position)
        if len(positions) == after:
            far.set()

    rebuilding = asyncio.ensure_future(shop.rebuild("sold_units", told))
    await asyncio.wait_for(far.wait(), 20)
    rebuilding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rebuilding
    return positions[after - 1]


async def test_a_cancelled_rebuild_goes_on_where_it_was(store_url, fill, monkeypatch):
    monkeypatch.setattr(upkeep, "REBUILD", 2)
    view = sold_units()
    async with of(store_url, view) as shop:
        await fill(shop)
        damage(shop, view, {key("A"): Sold("A", 99)})
        position = await interrupted(shop, 2)
        assert position >= 4
        assert await units(shop) == 99
        told = []
        begun = monotonic()
        assert await shop.rebuild("sold_units", lambda at, _: told.append(at)) == Comparison(
            3, 1, 0, 0
        )
        assert told[0] > position
        assert monotonic() - begun < 2  # the lease was given back
        assert await units(shop) == 6


async def test_a_killed_rebuild_goes_on_where_it_was(shared_url, start, register, sell):
    rebuilder = """
        from leftfold.infrastructure import upkeep

        upkeep.REBUILD = 5

        async def main():
            async with open_items(url) as shop:
                def told(position, head):
                    say(position)
                    time.sleep(0.3)
                say("open")
                await shop.rebuild("item_stock", told)
        asyncio.run(main())
    """
    async with Runtime(item_model, shared_url) as shop:
        (await shop.commands.dispatch(register("A", 1_000))).unwrap()
        (await shop.commands.dispatch_all([sell() for _ in range(50)])).unwrap()
        (await shop.catch_up()).unwrap()
        child = start(rebuilder, shared_url)
        assert [child.says(60) for _ in range(3)][:2] == ["open", "5"]
        child.process.kill()
        child.ends()
        damage(shop, item_stock, {key("A"): None})
        told = []
        assert await shop.rebuild("item_stock", lambda at, _: told.append(at)) == Comparison(
            0, 0, 1, 0
        )
        assert told[0] > 10
        row = (await shop.queries.dispatch(GetItem(sku="A"))).unwrap()
        assert row.units_sold == 50


async def test_a_rebuild_that_other_code_began_begins_anew(store_url, fill, monkeypatch):
    monkeypatch.setattr(upkeep, "REBUILD", 2)
    async with of(store_url, sold_units()) as old:
        await fill(old)
        await interrupted(old, 2)
        mended = sold_units(factor=10)
        async with beside(old, mended) as new:
            told = []
            assert await new.rebuild("sold_units", lambda at, _: told.append(at)) == Comparison(
                0, 4, 0, 0
            )
            assert told[0] == 2
            assert {row.units for row in rows(new, mended).values()} == {60, 80, 100, 120}


async def test_a_rebuild_that_another_process_is_at_is_refused_if_it_lasts(
    store_url, fill, monkeypatch
):
    monkeypatch.setattr(upkeep, "LEASE", 0.2)
    view = sold_units()
    async with of(store_url, view) as shop:
        await fill(shop)
        views, anew = shop._store.views, view.anew()
        views.define(anew)
        views.hold([anew], "another", 60)
        with pytest.raises(ViewBusyError):
            await shop.rebuild("sold_units")
        async with beside(shop, sold_units(factor=10), follow=False) as other:
            with pytest.raises(ViewBusyError):
                await other.rebuild("sold_units")
        views.release("another")
        assert await shop.rebuild("sold_units") == Comparison(4, 0, 0, 0)


async def test_a_rebuild_waits_for_the_one_that_is_under_way(store_url, fill, monkeypatch):
    monkeypatch.setattr(upkeep, "REBUILD", 2)
    view = sold_units()
    async with of(store_url, view) as shop:
        await fill(shop)
        damage(shop, view, {key("A"): Sold("A", 99)})
        answers = await asyncio.gather(*(shop.rebuild("sold_units") for _ in range(2)))
    assert set(answers) == {Comparison(3, 1, 0, 0), Comparison(4, 0, 0, 0)}


async def test_an_event_that_cannot_be_folded_halts_a_rebuild_and_leaves_the_view_alone(
    store_url, fill, sell, monkeypatch
):
    monkeypatch.setattr(upkeep, "REBUILD", 5)
    fails_on = [50]
    view = sold_units(fails_on=fails_on)
    async with of(store_url, view) as shop:
        await fill(shop)
        for quantity in (50, 1):
            receipt = (await shop.commands.dispatch(sell("A", quantity))).unwrap()
            (await shop.wait_for(receipt, ["item_stock"])).unwrap()
        (await shop.catch_up()).unwrap()
        letters = await shop.dead_letters("sold_units")
        assert len(letters) == 2
        damage(shop, view, {key("B"): None})
        before = rows(shop, view)
        for _ in range(2):  # and again, from where it was
            with pytest.raises(ProjectionFailedError, match="ZeroDivisionError in sold"):
                await shop.rebuild("sold_units")
            assert rows(shop, view) == before
            assert await shop.dead_letters("sold_units") == letters
        sold = (await shop.commands.dispatch(sell("C", 1))).unwrap()
        assert await units(shop, "C", after=sold) == 11
        assert shop.health().is_healthy
        fails_on.clear()
        assert await shop.rebuild("sold_units") == Comparison(2, 1, 1, 0)
        assert await shop.dead_letters("sold_units") == ()
        assert await units(shop) == 6 + 50 + 1
        sold = (await shop.commands.dispatch(sell("A", 1))).unwrap()
        assert await units(shop, after=sold) == 6 + 50 + 1 + 1


async def test_what_cannot_be_folded_halts_a_rebuild_that_was_as_far_as_the_log_before(
    store_url, fill, sell
):
    async with of(store_url, sold_units(fails_on=[50])) as shop:
        await fill(shop)

        def told(position, head):
            if position == head:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            await shop.rebuild("sold_units", told)
        (await shop.commands.dispatch(sell("A", 50))).unwrap()
        (await shop.catch_up()).unwrap()
        with pytest.raises(ProjectionFailedError):
            await shop.rebuild("sold_units")


@pytest.mark.parametrize("by", ["the view", "the store"])
async def test_a_view_that_parks_while_it_is_built_parks_in_a_rebuild_too(
    store_url, fill, sell, by
):
    factor = 1 if by == "the view" else 2**58  # times 56 no database keeps it
    view = sold_units(fails_on=[50] if factor == 1 else [], factor=factor, on_poison="park")
    async with of(store_url, view) as shop:
        await fill(shop)
        for quantity in (50, 1):
            (await shop.commands.dispatch(sell("A", quantity))).unwrap()
        (await shop.catch_up()).unwrap()
        letters = await shop.dead_letters("sold_units")
        damage(shop, view, {key("B"): None})
        assert await shop.rebuild("sold_units") == Comparison(3, 0, 1, 0)
        again = await shop.dead_letters("sold_units")
        assert [(a.position, a.key) for a in again] == [(a.position, a.key) for a in letters]
        units = {row.units for row in rows(shop, view).values()}
        assert units == {factor * sold for sold in (6, 8, 10, 12)}


async def test_a_view_that_stopped_over_a_wrong_row_goes_on_after_a_rebuild(store_url, fill, sell):
    view = sold_units(on_poison="halt")
    async with of(store_url, view) as shop:
        await fill(shop)
        damage(shop, view, {key("A"): None})
        sold = (await shop.commands.dispatch(sell("A", 1))).unwrap()
        assert not (await shop.wait_for(sold, ["sold_units"])).is_ok()
        assert not shop.health().is_healthy
        assert await shop.rebuild("sold_units") == Comparison(3, 0, 1, 0)
        assert await units(shop, after=sold) == 7
        assert shop.health().is_healthy


async def test_of_several_versions_the_newest_is_built_anew(store_url, fill):
    older, newer = sold_units(), sold_units(2, factor=10)
    async with of(store_url, older, newer) as shop:
        await fill(shop)
        for view in (older, newer):
            damage(shop, view, {key("A"): None})
        assert await shop.rebuild("sold_units") == Comparison(3, 0, 1, 0)
        assert key("A") not in rows(shop, older)
        assert rows(shop, newer)[key("A")] == Sold("A", 60)


async def test_only_projections_of_their_own_are_built_anew(store_url):
    subscriber = Subscriber("told")
    subscriber.on(StockSold)(lambda event: None)
    parts = {"processes": (ReorderProcess,), "subscribers": (subscriber,)}
    async with Runtime(model_of(sold_units(), **parts), store_url) as shop:
        for name in ("reorder_watch", "told", "unknown"):
            with pytest.raises(InvalidModelError, match=name):
                await shop.rebuild(name)


async def test_an_inline_view_is_built_anew(store_url, fill, sell):
    view = sold_units(inline=True, unique=["sku"], indexes=["units"])
    async with of(store_url, view) as shop:
        await fill(shop)
        wrong = {key("A"): Sold("B", 1), key("B"): Sold("A", 1), key("C"): None}
        damage(shop, view, wrong)
        assert await shop.rebuild("sold_units") == Comparison(1, 2, 1, 0)
        (await shop.commands.dispatch(sell("A", 1))).unwrap()
        assert await units(shop) == 7
        assert await units(shop, "C") == 10


async def test_a_rebuild_leaves_alone_what_statements_of_the_view_wrote(shared_url, fill):
    view = sold_units()
    written = []
    view.executing(lambda execute, events: written.extend(event.originator_id for event in events))
    async with of(shared_url, view) as shop:
        await fill(shop)
        assert len(written) == 12
        damage(shop, view, {key("A"): None})
        assert await shop.rebuild("sold_units") == Comparison(3, 0, 1, 0)
    assert len(written) == 12


async def test_a_rebuild_waits_while_the_database_is_away_for_a_moment(
    store_url, fill, monkeypatch
):
    monkeypatch.setattr(upkeep, "REBUILD", 2)
    monkeypatch.setattr(upkeep, "FIRST_PAUSE", 0.001)
    async with of(store_url, sold_units()) as shop:
        await fill(shop)
        pages, failures = shop._parts.pages, [OperationalError("away")] * 4
        fold = pages.fold

        def failing(*args):
            outcome = fold(*args)
            if failures:
                raise failures.pop()  # what it wrote is written
            return outcome

        monkeypatch.setattr(pages, "fold", failing)
        assert await shop.rebuild("sold_units") == Comparison(4, 0, 0, 0)
        assert failures == []


async def test_a_rebuild_says_that_the_database_is_away_and_goes_on_later(
    proxy, postgres_url, fill, monkeypatch
):
    monkeypatch.setattr(upkeep, "REBUILD", 2)
    async with of(proxy.url, sold_units(), lock_timeout=1) as shop:
        await fill(shop)
        positions = []

        def told(position, _):
            positions.append(position)
            if len(positions) == 2:
                proxy.refuses = True
                proxy.cut()

        with pytest.raises(EventStoreUnavailable):
            await shop.rebuild("sold_units", told)
        proxy.refuses = False
        again = []
        assert await shop.rebuild("sold_units", lambda at, _: again.append(at)) == Comparison(
            4, 0, 0, 0
        )
        assert again[0] > positions[-1] >= 4
