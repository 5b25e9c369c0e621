"""When the database goes away: typed answers at all times, and recovery without help."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import replace
from time import monotonic, sleep

import psycopg
import pytest

from leftfold.application import (
    DispatchError,
    EventStoreUnavailable,
    KeysUnavailable,
    Projection,
)
from leftfold.application.items import GetItem, ItemHistory, ItemRow, item_model
from leftfold.domain import Err
from leftfold.domain.items import ItemRenamed
from leftfold.infrastructure import Runtime, Settings, StoreUnavailableError, follower
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.stores import make_store, postgres

pytestmark = [pytest.mark.anyio, pytest.mark.timed]


def terminate(url):
    """Cut all connections to the database but our own; return how many there were."""
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchone()[0]


def execute(url, *statements):
    """Run statements on the database itself, also while others may only read."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        for statement in statements:
            connection.execute(statement)


async def until_ok(dispatch, seconds=10.0):
    """Dispatch until it is answered `Ok`; each answer must be typed, and come in time."""
    begun = monotonic()
    while True:
        outcome = await asyncio.wait_for(dispatch(), 10)
        if outcome.is_ok():
            return outcome.value
        assert isinstance(outcome.error, DispatchError)
        assert monotonic() - begun < seconds
        await asyncio.sleep(0.02)


async def test_commands_recover_by_themselves_after_all_connections_were_lost(
    postgres_url, register, sell
):
    async with open_items(postgres_url) as shop:
        await shop.commands.dispatch(register("A", 100))
        sold = 0
        for _ in range(3):
            assert terminate(postgres_url) > 0
            receipt = await until_ok(lambda: shop.commands.dispatch(sell("A")))
            sold += 1
        (await shop.wait_for(receipt, timeout=10)).unwrap()
        row = await until_ok(lambda: shop.queries.dispatch(GetItem(sku="A"), after=receipt))
        told = await until_ok(lambda: shop.queries.dispatch(ItemHistory(sku="A")))
    assert (row.units_sold, len(told)) == (sold, sold + 1)


async def test_queries_answer_typed_errors_or_rows_after_all_connections_were_lost(
    postgres_url, register
):
    async with open_items(postgres_url) as shop:
        receipt = (await shop.commands.dispatch(register("A", 100))).unwrap()
        (await shop.wait_for(receipt)).unwrap()
        terminate(postgres_url)
        assert (await until_ok(lambda: shop.queries.dispatch(GetItem(sku="A")))).sku == "A"
        terminate(postgres_url)
        assert len(await until_ok(lambda: shop.queries.dispatch(ItemHistory(sku="A")))) == 1


async def test_an_aggregate_that_must_be_read_gives_a_typed_error_while_connections_are_lost(
    postgres_url, register, sell
):
    async with open_items(postgres_url) as shop:
        await shop.commands.dispatch(register("A", 100))
    async with open_items(postgres_url) as shop:
        terminate(postgres_url)
        await until_ok(lambda: shop.commands.dispatch(sell("A")))


async def test_callers_at_once_are_all_answered_while_connections_are_lost(
    postgres_url, register, sell
):
    async with open_items(postgres_url) as shop:
        await shop.commands.dispatch(register("A", 10_000))
        stop = asyncio.Event()
        done = []

        async def sells():
            while not stop.is_set():
                outcome = await asyncio.wait_for(shop.commands.dispatch(sell("A")), 10)
                assert outcome.is_ok() or isinstance(outcome.error, DispatchError)
                done.append(outcome.is_ok())
                await asyncio.sleep(0)

        callers = [asyncio.ensure_future(sells()) for _ in range(8)]
        for _ in range(4):
            await asyncio.sleep(0.1)
            await asyncio.to_thread(terminate, postgres_url)
        stop.set()
        await asyncio.gather(*callers)
        last = await until_ok(lambda: shop.commands.dispatch(sell("A")))
        row = await until_ok(lambda: shop.queries.dispatch(GetItem(sku="A"), after=last))
    assert row.units_sold >= sum(done) + 1


async def test_a_runtime_hears_of_others_again_after_its_connections_were_lost(
    postgres_url, register, monkeypatch
):
    monkeypatch.setattr(follower, "IDLE", 60.0)  # only hints wake it
    async with open_items(postgres_url) as shop:
        terminate(postgres_url)
        await until_ok(lambda: shop.commands.dispatch(register("A")))
        (await shop.catch_up(10)).unwrap()
        await asyncio.sleep(0.3)
        async with open_items(postgres_url) as other:
            receipt = (await other.commands.dispatch(register("B"))).unwrap()
            begun = monotonic()
            while shop.health().projections[0].position < receipt.position:
                assert monotonic() - begun < 3
                await asyncio.sleep(0.005)


async def test_a_runtime_survives_a_restart_of_the_server(start_postgres, register, sell):
    server = start_postgres()
    settings = Settings(store=server.get_uri(), lock_timeout=1, command_timeout=8)
    async with open_items(settings=settings) as shop:
        await shop.commands.dispatch(register("A", 100))
        await shop.commands.dispatch(register("B", 100))
        await asyncio.to_thread(server.stop)
        for message in (sell("A"), sell("C")):
            outcome = await asyncio.wait_for(shop.commands.dispatch(message), 9)
            assert isinstance(outcome.error, DispatchError)
        answer = await asyncio.wait_for(shop.queries.dispatch(GetItem(sku="A")), 9)
        assert isinstance(answer, Err)
        await asyncio.to_thread(server.ensure_postgres_running)
        receipt = await until_ok(lambda: shop.commands.dispatch(sell("A")), 15)
        (await shop.wait_for(receipt, timeout=15)).unwrap()
        row = await until_ok(lambda: shop.queries.dispatch(GetItem(sku="A")))
    assert row.units_sold >= 1


async def test_a_runtime_closes_in_time_while_the_server_is_away(start_postgres, register):
    server = start_postgres()
    async with open_items(server.get_uri()) as shop:
        await shop.commands.dispatch(register("A", 100))
        await asyncio.to_thread(server.stop)
        begun = monotonic()
    assert monotonic() - begun < 12


async def test_a_projection_goes_on_after_a_spell_in_which_nothing_could_be_written(
    postgres_url, register, sell
):
    name = postgres_url.split("/")[3].split("?")[0]
    settings = Settings(store=postgres_url, command_timeout=2)
    async with open_items(settings=settings) as shop:
        await shop.commands.dispatch(register("A", 100))
        (await shop.catch_up()).unwrap()
        execute(postgres_url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        terminate(postgres_url)
        # Something to fold, from a writer for whom the spell does not hold.
        execute(
            postgres_url,
            "INSERT INTO stored_events (originator_id, originator_version, topic, state) "
            "SELECT gen_random_uuid(), 1, topic, state FROM stored_events",
            "NOTIFY stored_events",
        )
        await asyncio.sleep(0.5)
        assert isinstance(await shop.commands.dispatch(sell("A")), Err)
        execute(postgres_url, f"ALTER DATABASE {name} RESET default_transaction_read_only")
        terminate(postgres_url)
        receipt = await until_ok(lambda: shop.commands.dispatch(sell("A")))
        (await shop.wait_for(receipt, timeout=10)).unwrap()
        assert shop.health().is_healthy


def test_a_listener_that_cannot_listen_is_replaced(postgres_url, monkeypatch):
    store = make_store(Settings(store=postgres_url))
    store.open((), create_tables=True)
    with monkeypatch.context() as patch:
        patch.setattr(postgres, "CHANNEL", "no channel")
        with pytest.raises(psycopg.Error):
            store.listen()
    assert store.listen() is not None
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"NOTIFY {postgres.CHANNEL}")
    assert store._listener.execute("SELECT pg_listening_channels()").fetchall() == [
        (postgres.CHANNEL,),
        (postgres.VIEWS_CHANNEL,),
    ]
    store.close()


def test_a_store_closed_while_it_begins_to_listen_leaves_no_connection(postgres_url, monkeypatch):
    store = make_store(Settings(store=postgres_url))
    store.open((), create_tables=True)
    genuine = store._connect

    def connect(**options):
        connection = genuine(**options)
        store.close()
        return connection

    monkeypatch.setattr(store, "_connect", connect)
    assert store.listen() is None
    assert store._listener is None
    with psycopg.connect(postgres_url) as connection:
        listening = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' "
        here = "AND datname = current_database()"
        begun = monotonic()
        while connection.execute(listening + here).fetchone() != (0,):  # the server needs a moment
            assert monotonic() - begun < 20
            sleep(0.01)


@contextmanager
def locked(url):
    """Hold the lock that a writer needs."""
    if url.startswith("sqlite"):
        path = url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
            connection.rollback()
    else:
        with psycopg.connect(url) as connection:
            connection.execute("LOCK TABLE stored_events IN EXCLUSIVE MODE")
            yield
            connection.rollback()


async def test_a_writer_waits_for_the_lock_no_longer_than_it_may(shared_url, register, sell):
    async with open_items(settings=Settings(store=shared_url, lock_timeout=1)) as shop:
        await shop.commands.dispatch(register("A", 100))
        (await shop.catch_up()).unwrap()
        with locked(shared_url):
            begun = monotonic()
            outcome = await asyncio.wait_for(shop.commands.dispatch(sell("A")), 10)
            assert monotonic() - begun < 4
        assert isinstance(outcome, Err)
        assert isinstance(outcome.error, EventStoreUnavailable)
        assert (await shop.commands.dispatch(sell("A"))).is_ok()


async def test_a_writer_waits_for_a_lock_that_is_held_for_a_moment(shared_url, register, sell):
    async with open_items(shared_url) as shop:
        await shop.commands.dispatch(register("A", 100))
        with locked(shared_url):
            waiting = asyncio.ensure_future(shop.commands.dispatch(sell("A")))
            await asyncio.sleep(0.3)
            assert not waiting.done()
        assert (await waiting).is_ok()


async def test_a_full_disk_refuses_commands_and_harms_nothing(sqlite_url, start):
    script = """
        import resource

        def limit(size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        async def main():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            path = url.removeprefix("sqlite:///")
            async with open_items(url) as shop:
                await shop.commands.dispatch(register())
                (await shop.catch_up()).unwrap()
                limit(max(os.path.getsize(path + end) for end in ("", "-wal")))
                for _ in range(2):
                    say(type((await shop.commands.dispatch(sell())).error).__name__)
                limit(resource.RLIM_INFINITY)
                receipt = (await shop.commands.dispatch(sell())).unwrap()
                row = (await shop.queries.dispatch(GetItem(sku="A"), after=receipt)).unwrap()
                say(row.units_sold)

        asyncio.run(main())
    """
    child = start(script, sqlite_url)
    assert [child.says() for _ in range(3)] == [*["EventStoreUnavailable"] * 2, "1"]


async def test_what_a_url_says_beside_the_address_holds_for_every_connection(
    postgres_url, register
):
    url = f"{postgres_url}&application_name=shop-7&options=-c%20work_mem%3D12MB"
    async with open_items(url) as shop:
        receipt = (await shop.commands.dispatch(register("A"))).unwrap()
        (await shop.wait_for(receipt)).unwrap()
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            names = connection.execute(
                "SELECT DISTINCT application_name FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ).fetchall()
    assert names == [("shop-7",)]


async def test_a_server_that_is_silent_once_one_has_logged_in_does_not_hold_up_opening(proxy):
    proxy.is_silent = True
    settings = Settings(store=proxy.url, store_timeout=1, lock_timeout=1)
    with pytest.raises(StoreUnavailableError):
        await asyncio.wait_for(open_items(settings=settings).open(), 5)
    proxy.is_silent = False
    async with open_items(settings=settings) as shop:
        assert shop.health().is_healthy


async def test_opening_is_cut_as_any_call_where_it_only_asks(postgres_url):
    settings = Settings(store=postgres_url, store_timeout=1, lock_timeout=30)
    with psycopg.connect(postgres_url) as busy:
        busy.execute("SELECT pg_advisory_xact_lock(%s)", (postgres.DDL_LOCK,))
        with pytest.raises(StoreUnavailableError):
            await asyncio.wait_for(open_items(settings=settings).open(), 5)


async def test_to_make_an_index_when_a_store_is_opened_may_take_longer(postgres_url):
    view = Projection("stock", version=1, row=ItemRow, indexes=["name"])
    view.on(ItemRenamed)(lambda row, event: row)
    model = replace(item_model, projections=(view,), queries=())
    settings = Settings(store=postgres_url, store_timeout=1)
    async with open_items(postgres_url):
        pass
    execute(
        postgres_url,
        "CREATE FUNCTION slow() RETURNS event_trigger LANGUAGE plpgsql "
        "AS $$ BEGIN PERFORM pg_sleep(2.5); END $$",
        "CREATE EVENT TRIGGER slow ON ddl_command_start WHEN TAG IN ('CREATE INDEX') "
        "EXECUTE FUNCTION slow()",
    )
    async with Runtime(model, settings=settings) as shop:
        assert shop.health().is_healthy


async def test_keys_whose_server_is_silent_once_one_has_logged_in_are_away_and_come_back(
    sqlite_url, proxy
):
    settings = Settings(
        store=sqlite_url, keys=proxy.url, store_timeout=1, lock_timeout=1, forget_within=100
    )
    async with open_items(settings=settings) as shop:
        await shop.provide_keys(["ann"])
        proxy.is_silent = True
        proxy.cut()
        for _ in range(2):
            with pytest.raises(KeysUnavailable):
                await asyncio.wait_for(shop.forget("ann"), 5)
        proxy.is_silent = False
        assert await asyncio.wait_for(shop.forget("ann"), 5)


async def test_closing_ends_what_waits_for_keys(sqlite_url, proxy, caplog):
    settings = Settings(store=sqlite_url, keys=proxy.url, store_timeout=100, forget_within=100)
    shop = await open_items(settings=settings).open()
    await shop.provide_keys(["ann"])
    proxy.is_silent = True
    asked = asyncio.ensure_future(shop.forget("ann"))
    await asyncio.sleep(0.1)
    await shop.close()
    assert "left behind" not in caplog.text
    with pytest.raises(KeysUnavailable):
        await asked


async def test_what_is_being_forgotten_when_it_closes_is_forgotten(sqlite_url, proxy):
    settings = Settings(store=sqlite_url, keys=proxy.url, forget_within=100)
    shop = await open_items(settings=settings).open()
    await shop.provide_keys(["ann"])
    proxy.delay = 0.05
    asked = asyncio.ensure_future(shop.forget("ann"))
    await asyncio.sleep(0.02)
    await shop.close()
    assert await asked
