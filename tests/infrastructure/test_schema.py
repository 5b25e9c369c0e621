"""The tables of a store, and what is found wrong with them at start."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import monotonic
from uuid import uuid4

import psycopg
import pytest
from databases import execute

from leftfold.application import InvalidModelError, Projection
from leftfold.application.checkpoints import Change
from leftfold.application.items import GetItem, ItemRow, item_model, item_stock
from leftfold.domain.items import ItemRegistered
from leftfold.infrastructure import (
    Runtime,
    SchemaMissingError,
    SchemaVersionError,
    Settings,
    StoreUnavailableError,
    ViewChangedError,
)
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.stores import make_store

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True)
class Lot:
    number: int


def test_a_role_that_may_not_copy_writes_its_rows_all_the_same(postgres_url, caplog):
    """PostgreSQL refuses COPY to those for whom a table's rows have policies."""
    rows = {f"k{n:03}": Lot(n) for n in range(200)}
    view = Projection("lots", version=1, row=Lot)
    owner = make_store(load_settings(store=postgres_url))
    owner.open([view], create_tables=True)
    owner.close()
    role = f"clerk_{uuid4().hex}"
    for statement in (
        f"CREATE ROLE {role}",
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
        "ALTER TABLE lots_v1 ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY all_rows ON lots_v1 TO {role} USING (true)",
    ):
        execute(postgres_url, statement)
    sign = "&" if "?" in postgres_url else "?"
    clerk = make_store(load_settings(store=f"{postgres_url}{sign}options=-crole%3D{role}"))
    clerk.open([view], create_tables=False)
    for position in (1, 2):
        (at,) = clerk.views.checkpoints([view])
        assert clerk.views.write([Change(view, at, rows, fresh=rows.keys())], position)
        rows = {f"{key}b": row for key, row in rows.items()}
    assert clerk.views.count(view) == 400
    clerk.close()
    assert caplog.text.count("not supported with row-level security") == 1
    execute(postgres_url, f"DROP OWNED BY {role}")
    execute(postgres_url, f"DROP ROLE {role}")


async def opens(runtime):
    async with runtime:
        pass


def without_tables(url):
    return open_items(settings=Settings(store=url, create_tables=False))


async def test_an_empty_store_is_refused_where_no_tables_may_be_made(shared_url):
    with pytest.raises(SchemaMissingError):
        await opens(without_tables(shared_url))


async def test_a_refused_store_is_left_without_tables(postgres_url):
    with pytest.raises(SchemaMissingError):
        await opens(without_tables(postgres_url))
    count = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"
    assert execute(postgres_url, count) == [(0,)]


async def test_a_refused_file_is_not_made(sqlite_url, tmp_path):
    with pytest.raises(SchemaMissingError):
        await opens(without_tables(sqlite_url))
    assert list(tmp_path.iterdir()) == []


async def test_a_file_without_tables_is_refused_where_none_may_be_made(sqlite_url):
    execute(sqlite_url, "CREATE TABLE other (n)")
    with pytest.raises(SchemaMissingError):
        await opens(without_tables(sqlite_url))


async def test_a_store_with_its_tables_opens_where_none_may_be_made(shared_url, register):
    await opens(open_items(shared_url))
    async with without_tables(shared_url) as shop:
        assert (await shop.commands.dispatch(register())).is_ok()


async def test_a_missing_view_is_refused_by_name_where_none_may_be_made(shared_url):
    await opens(open_items(shared_url))
    model = replace(item_model, projections=(*item_model.projections, names(ItemRow)))
    settings = Settings(store=shared_url, create_tables=False)
    with pytest.raises(SchemaMissingError) as refusal:
        await opens(Runtime(model, settings=settings))
    assert refusal.value.table == "names_v1"


@pytest.mark.parametrize("create_tables", [True, False])
async def test_another_schema_version_is_refused(shared_url, create_tables):
    await opens(open_items(shared_url))
    execute(shared_url, "UPDATE leftfold_schema SET version = 99")
    with pytest.raises(SchemaVersionError) as refusal:
        await opens(open_items(settings=Settings(store=shared_url, create_tables=create_tables)))
    assert (refusal.value.found, refusal.value.needed) == (99, 4)


async def test_a_store_of_an_older_release_gets_what_it_lacks(shared_url, register):
    await opens(open_items(shared_url))
    for column in ("failure", "failed_in"):
        execute(shared_url, f"ALTER TABLE leftfold_checkpoints DROP COLUMN {column}")
    execute(shared_url, "UPDATE leftfold_schema SET version = 3")
    with pytest.raises(SchemaVersionError):
        await opens(open_items(settings=Settings(store=shared_url, create_tables=False)))
    async with open_items(shared_url) as shop:
        (await shop.wait_for((await shop.commands.dispatch(register())).unwrap())).unwrap()
    assert execute(shared_url, "SELECT version FROM leftfold_schema") == [(4,)]


async def test_a_changed_row_type_of_the_same_version_is_refused(shared_url):
    @dataclass(frozen=True, slots=True)
    class Other:
        sku: str

    await opens(Runtime(replace(item_model, projections=(names(ItemRow),)), shared_url))
    with pytest.raises(ViewChangedError) as refusal:
        await opens(Runtime(replace(item_model, projections=(names(Other),)), shared_url))
    assert refusal.value.projection == "names_v1"


async def test_a_new_version_of_a_view_begins_beside_the_old_one(shared_url, register):
    async with open_items(shared_url) as shop:
        await shop.commands.dispatch(register("A", 10))
        await shop.catch_up()
    async with Runtime(replace(item_model, projections=(again(),), queries=()), shared_url) as shop:
        (await shop.catch_up()).unwrap()
    rows = [execute(shared_url, f"SELECT sku FROM item_stock_v{n}") for n in (1, 2)]
    assert rows == [[("A",)], [("A",)]]


async def test_people_find_the_members_in_a_sql_view(shared_url, register):
    async with open_items(shared_url) as shop:
        receipt = (await shop.commands.dispatch(register("A", 10))).unwrap()
        await shop.wait_for(receipt)
    ((sku, price, on_hand),) = execute(
        shared_url, "SELECT sku, unit_price, on_hand FROM item_stock"
    )
    assert (sku, float(price), on_hand) == ("A", 2.55, 10)


async def test_a_row_type_that_has_no_columns_is_refused(store_url):
    @dataclass(frozen=True, slots=True)
    class Odd:
        parts: list[str]

    with pytest.raises(InvalidModelError):
        await opens(Runtime(replace(item_model, projections=(names(Odd),)), store_url))


async def test_a_store_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "no.db").write_text("this is no database, but some text of sufficient length " * 9)
    urls = [
        f"sqlite:///{tmp_path}",
        f"sqlite:///{tmp_path / 'missing' / 'shop.db'}",
        f"sqlite:///{tmp_path / 'no.db'}",
        f"postgresql://postgres@/shop?host={tmp_path}",
    ]
    for url in urls:
        with pytest.raises(StoreUnavailableError) as refusal:
            await opens(open_items(url))
        assert refusal.value.store == url


async def test_a_store_that_could_not_be_opened_can_be_opened_later(tmp_path, register):
    shop = open_items(f"sqlite:///{tmp_path / 'later' / 'shop.db'}")
    with pytest.raises(StoreUnavailableError):
        await opens(shop)
    (tmp_path / "later").mkdir()
    async with shop:
        receipt = (await shop.commands.dispatch(register())).unwrap()
        assert (await shop.queries.dispatch(GetItem(sku="A"), after=receipt)).is_ok()


async def test_a_file_stays_the_same_when_the_program_changes_its_directory(
    tmp_path, monkeypatch, register
):
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    there.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(there)
    async with open_items("sqlite:///shop.db") as shop:
        monkeypatch.chdir(elsewhere)
        receipt = (await shop.commands.dispatch(register())).unwrap()
        queries = [shop.queries.dispatch(GetItem(sku="A"), after=receipt) for _ in range(20)]
        assert all(found.is_ok() for found in await asyncio.gather(*queries))
    assert list(elsewhere.iterdir()) == []


async def test_who_reads_a_view_holds_up_the_start_of_a_new_version_for_a_bounded_time(
    postgres_url,
):
    await opens(open_items(postgres_url))
    settings = Settings(store=postgres_url, lock_timeout=1)
    newer = Runtime(replace(item_model, projections=(again(),), queries=()), settings=settings)
    older = open_items(settings=settings)
    with psycopg.connect(postgres_url) as reader:
        reader.execute("SELECT count(*) FROM item_stock")  # and the transaction stays open
        begun = monotonic()
        answers = await asyncio.gather(opens(newer), opens(older), return_exceptions=True)
        assert monotonic() - begun < 4
        shown = "SELECT refobjid::regclass::text FROM pg_depend JOIN pg_rewrite ON "
        shown += "pg_rewrite.oid = objid WHERE ev_class = 'item_stock'::regclass"
        assert ("item_stock_v1",) in reader.execute(shown).fetchall()
    assert answers[0] is None  # that people see the new version has to wait
    assert answers[1] is None or isinstance(answers[1], StoreUnavailableError)
    await opens(newer)
    with psycopg.connect(postgres_url) as reader:
        assert ("item_stock_v2",) in reader.execute(shown).fetchall()


async def test_who_reads_a_view_does_not_hold_up_a_start_that_leaves_it_as_it_is(postgres_url):
    await opens(open_items(postgres_url))
    execute(postgres_url, "DELETE FROM leftfold_checkpoints")  # so that it is built again
    with psycopg.connect(postgres_url) as reader:
        reader.execute("SELECT count(*) FROM item_stock")
        await opens(open_items(settings=Settings(store=postgres_url, lock_timeout=1)))


async def test_the_zone_of_the_database_does_not_matter(postgres_url, register):
    @dataclass(frozen=True, slots=True)
    class Last:
        moment: datetime

    last = Last(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
    view = names(Last)
    view.on(ItemRegistered)(lambda _, event: last)
    name = postgres_url.split("/")[3].split("?")[0]
    execute(postgres_url, f"ALTER DATABASE {name} SET timezone = 'Asia/Tokyo'")
    async with Runtime(replace(item_model, projections=(view,), queries=()), postgres_url) as shop:
        receipt = (await shop.commands.dispatch(register())).unwrap()
        (await shop.wait_for(receipt)).unwrap()
        assert [row for _, row in shop._store.views.select(view, None, None)] == [last]


def again():
    """The next version of the stock's view."""
    view = Projection("item_stock", version=2, row=ItemRow)
    view._evolve = item_stock._evolve
    return view


def names(row):
    return Projection("names", version=1, row=row)
