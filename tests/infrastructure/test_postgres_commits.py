"""How commits to PostgreSQL are sent, and what its errors mean for them."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxy import Proxy

from leftfold.application.ports import EncodedEvent, Failed, Group, Save
from leftfold.infrastructure import Settings
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.stores import make_store
from leftfold.infrastructure.stores.postgres_arrays import (
    bigints,
    byteas,
    ints,
    read_bigints,
    read_texts,
    take_packed,
    texts,
    uuids,
)
from leftfold.infrastructure.stores.postgres_commits import failed

LONG = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@pytest.mark.parametrize(
    ("sqlstate", "in_doubt", "is_refusal"),
    [
        ("23514", False, True),  # a constraint
        ("22001", False, True),  # a value too long
        ("P0001", False, True),  # raised by a trigger
        ("55P03", False, False),  # the lock is held by others
        ("25006", False, False),  # read-only
        ("40P01", False, False),  # a deadlock
        ("40003", True, False),  # the server says that it does not know
        ("08P01", True, False),  # a pooler whose server went away
        ("57P01", True, False),  # a server that shuts down may say so after it has written
        ("57P02", True, False),  # so may one whose neighbour has crashed
    ],
)
def test_an_error_is_in_doubt_or_a_refusal_or_neither(sqlstate, in_doubt, is_refusal):
    verdict = failed(psycopg.errors.lookup(sqlstate)("no"), is_sent=True)
    assert (verdict.in_doubt, verdict.is_refusal) == (in_doubt, is_refusal)


def test_what_was_not_sent_is_in_no_doubt():
    assert failed(psycopg.OperationalError("lost"), is_sent=False) == Failed("lost")
    assert failed(psycopg.OperationalError("lost"), is_sent=True) == Failed("lost", in_doubt=True)


@pytest.fixture(scope="module")
def connection(postgres_server):
    with psycopg.connect(postgres_server) as connection:
        take_packed(connection)
        yield connection


@pytest.mark.parametrize(
    ("pack", "kind", "elements"),
    [
        (ints, "int[]", st.integers(-(2**31), 2**31 - 1)),
        (bigints, "bigint[]", LONG),
        (texts, "text[]", TEXT),
        (byteas, "bytea[]", st.none() | st.binary()),
    ],
)
def test_the_server_reads_packed_arrays_as_they_were(connection, pack, kind, elements):
    @given(st.lists(elements))
    def reads(values):
        query = f"SELECT %b::{kind} IS NOT DISTINCT FROM %b::{kind}"
        (is_same,) = connection.execute(query, (pack(values), values)).fetchone()
        assert is_same

    reads()


@given(st.lists(st.uuids()))
def test_the_server_reads_packed_ids_as_they_were(connection, ids):
    query = "SELECT %b::uuid[] IS NOT DISTINCT FROM %b::uuid[]"
    packed = uuids([i.int for i in ids])
    assert connection.execute(query, (packed, ids)).fetchone() == (True,)


@given(st.lists(LONG), st.lists(TEXT))
def test_what_the_server_packs_is_read_as_it_was(connection, numbers, words):
    with connection.cursor(binary=True) as cursor:
        cursor.execute("SELECT %b::bigint[], %b::text[]", (numbers, words))
        raw = [cursor.pgresult.get_value(0, n) for n in (0, 1)]
    assert (list(read_bigints(raw[0])), read_texts(raw[1])) == (numbers, words)


@pytest.mark.anyio
async def test_to_open_a_store_that_is_in_use_waits_for_no_commit(postgres_url, register):
    async with open_items(postgres_url) as shop:
        (await shop.commands.dispatch(register("A"))).unwrap()
        with psycopg.connect(postgres_url) as busy:
            busy.execute("UPDATE leftfold_commands SET command = command")
            busy.execute("UPDATE stored_events SET topic = topic")
            busy.execute("UPDATE item_stock_v1 SET key = key")
            async with open_items(postgres_url) as other:
                assert other.health().is_healthy


@pytest.mark.anyio
async def test_a_store_that_was_closed_commits_no_more(postgres_url, register):
    async with open_items(postgres_url) as shop:
        (await shop.commands.dispatch(register("A"))).unwrap()
        commits = shop._store._commits
    (verdict,) = await commits.commit([Group([])])
    assert verdict == Failed("the store is closed")


@pytest.mark.anyio
async def test_a_commit_larger_than_the_sockets_buffers_is_sent_whole(postgres_url, register):
    async with open_items(postgres_url) as shop:
        (await shop.commands.dispatch(register("A"))).unwrap()
        events = [EncodedEvent(uuid4(), 1, "large", bytes(1_000_000)) for _ in range(30)]
        saves = [Save(uuid4(), "Large", [e], ((e.aggregate_id, 1),), None) for e in events]
        (verdict,) = await shop._store._commits.commit([Group(saves)])
        assert len(verdict.positions) == 30
        assert [e.state for e in shop._store.log.read(1, 2)] == [bytes(1_000_000)] * 2


@pytest.mark.anyio
@pytest.mark.parametrize("size", [1, 30_000_000])
async def test_who_waits_for_a_connection_that_is_closed_is_told(postgres_url, register, size):
    async with open_items(postgres_url) as shop:
        (await shop.commands.dispatch(register("A"))).unwrap()
        commits = shop._store._commits
        with psycopg.connect(postgres_url) as other:
            other.execute("LOCK TABLE stored_events")
            large = EncodedEvent(uuid4(), 1, "large", bytes(size))
            save = Save(uuid4(), "Large", [large], ((large.aggregate_id, 1),), None)
            waiting = asyncio.ensure_future(commits.commit([Group([save])]))
            await asyncio.sleep(0.1)
            commits._link.close()
            (verdict,) = await asyncio.wait_for(waiting, 5)
    assert verdict == Failed("the connection was closed", in_doubt=True)


@pytest.mark.anyio
@pytest.mark.parametrize("harm", [Proxy.half_close, Proxy.cut])
async def test_a_connection_that_is_lost_while_much_is_sent_is_replaced(proxy, register, harm):
    async with open_items(settings=Settings(store=proxy.url, command_timeout=5)) as shop:
        (await shop.commands.dispatch(register("A"))).unwrap()
        large = EncodedEvent(uuid4(), 1, "large", bytes(12_000_000))
        save = Save(uuid4(), "Large", [large], ((large.aggregate_id, 1),), None)
        proxy.delay = 0.05  # so that it is on its way for long
        sending = asyncio.ensure_future(shop._store._commits.commit([Group([save])]))
        await asyncio.sleep(0.2)
        harm(proxy)
        (verdict,) = await asyncio.wait_for(sending, 5)
        assert verdict.in_doubt
        proxy.delay = 0
        proxy.cut()
        for sku in ("B", "C"):
            assert (await shop.commands.dispatch(register(sku))).is_ok()


@pytest.mark.anyio
async def test_a_statement_that_the_server_has_forgotten_is_prepared_again(postgres_url, register):
    async with open_items(postgres_url) as shop:
        (await shop.commands.dispatch(register("A"))).unwrap()
        await shop._store._commits._link.connection.execute("DEALLOCATE ALL")
        (await shop.commands.dispatch(register("B"))).unwrap()


@pytest.mark.anyio
async def test_a_store_that_is_closed_while_it_connects_leaves_no_connection(postgres_url):
    store = make_store(load_settings(store=postgres_url))
    store.open((), create_tables=True)
    connecting = asyncio.ensure_future(store._commits.commit([Group([])]))
    await asyncio.sleep(0)
    store.close()
    (verdict,) = await connecting
    assert verdict == Failed("the store is closed")
    with psycopg.connect(postgres_url) as other:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        for _ in range(100):
            if other.execute(query).fetchone() == (1,):
                break
            await asyncio.sleep(0.02)
        else:
            pytest.fail("a connection is left")
