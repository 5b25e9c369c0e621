"""A database that is paused, killed, restarted or badly connected while it is under load."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import eventsourcing.utils
import psycopg
import pytest

from leftfold.application import DispatchError, EventStoreUnavailable, OutcomeUnknown
from leftfold.application.items import GetItem, ItemHistory
from leftfold.domain import Err, Ok
from leftfold.infrastructure import CircuitState, Settings
from leftfold.infrastructure.items import open_items

pytestmark = [pytest.mark.anyio, pytest.mark.timed]

STORE_TIMEOUT = 1.0


def settings(url, **others):
    return Settings(
        store=url, lock_timeout=1, store_timeout=STORE_TIMEOUT, command_timeout=5, **others
    )


@pytest.fixture
def server(start_postgres):
    """A server of this test's own."""
    return start_postgres()


def signal_all(server, number):
    """Send a signal to the server and all its processes."""
    pid = server.get_pid()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for each in (pid, *map(int, children)):
        with suppress(ProcessLookupError):
            os.kill(each, number)


class Load:
    """Callers who sell and ask, and note each answer and how long it took."""

    def __init__(self, shop, sell, record):
        self.shop, self.sell, self.record = shop, sell, record
        self.answers = Counter()
        self.slowest = 0.0
        self._is_over = False

    async def __aenter__(self):
        self._callers = [asyncio.ensure_future(self._sells()) for _ in range(6)]
        self._callers += [asyncio.ensure_future(self._asks()) for _ in range(2)]
        await asyncio.sleep(0.2)
        assert self.answers["sold"]
        return self

    async def __aexit__(self, *_):
        self._is_over = True
        await asyncio.gather(*self._callers)
        self.record("outage", f"{dict(self.answers)}, slowest answer {self.slowest:.2f} s")

    async def recovers(self, seconds=10.0):
        """Wait until commands and queries succeed again."""
        begun, before = monotonic(), self.answers.copy()
        while any(self.answers[each] < before[each] + 5 for each in ("sold", "asked")):
            assert monotonic() - begun < seconds, self.answers
            await asyncio.sleep(0.01)
        return monotonic() - begun

    async def check(self):
        """Compare what was answered with what the log has."""
        told = (await self.shop.queries.dispatch(ItemHistory(sku="A"))).unwrap()
        sold = len(told) - 1
        assert [event.version for event in told] == list(range(1, len(told) + 1))
        assert self.answers["sold"] <= sold <= self.answers["sold"] + self.answers["unknown"]
        (await self.shop.catch_up(10)).unwrap()
        row = (await self.shop.queries.dispatch(GetItem(sku="A"))).unwrap()
        assert row.units_sold == sold

    async def _sells(self):
        while not self._is_over:
            match await self._timed(self.shop.commands.dispatch(self.sell("A"))):
                case Ok():
                    self.answers["sold"] += 1
                case Err(OutcomeUnknown()):
                    self.answers["unknown"] += 1
                case Err(DispatchError() as error):
                    self.answers[type(error).__name__] += 1
            await asyncio.sleep(0.001)

    async def _asks(self):
        while not self._is_over:
            answer = await self._timed(self.shop.queries.dispatch(ItemHistory(sku="A")))
            assert isinstance(answer, Ok) or isinstance(answer.error, DispatchError)
            self.answers["asked" if answer.is_ok() else "not answered"] += 1
            await asyncio.sleep(0.005)

    async def _timed(self, dispatch):
        begun = monotonic()
        try:
            return await dispatch
        finally:
            self.slowest = max(self.slowest, monotonic() - begun)


@pytest.fixture
def loaded(register, sell, record_property):
    async def loaded(shop):
        (await shop.commands.dispatch(register("A", 1_000_000))).unwrap()
        return Load(shop, sell, record_property)

    return loaded


def start_again(server, pid):
    while Path(f"/proc/{pid}").exists():  # until then it is taken for running
        sleep(0.05)
    server.ensure_postgres_running()


async def test_a_paused_server_is_answered_for_in_time_and_goes_on(server, loaded):
    async with open_items(settings=settings(server.get_uri())) as shop:
        load = await loaded(shop)
        async with load:
            signal_all(server, signal.SIGSTOP)
            try:
                await asyncio.sleep(3 * STORE_TIMEOUT)
                refused = load.answers["EventStoreUnavailable"] + load.answers["unknown"]
                assert refused
            finally:
                signal_all(server, signal.SIGCONT)
            await load.recovers()
        await load.check()
    assert load.slowest < 3 * STORE_TIMEOUT + 2


async def test_a_killed_server_is_answered_for_in_time_and_comes_back(server, loaded):
    async with open_items(settings=settings(server.get_uri())) as shop:
        load = await loaded(shop)
        async with load:
            pid = server.get_pid()
            signal_all(server, signal.SIGKILL)
            begun = monotonic()
            while shop.health().is_healthy:
                assert monotonic() - begun < 6
                await asyncio.sleep(0.05)
            assert load.answers["EventStoreUnavailable"]
            await asyncio.to_thread(start_again, server, pid)
            await load.recovers()
        await load.check()
        assert shop.health().is_healthy
    assert load.slowest < 6


async def test_a_server_restarted_under_load_loses_nothing(server, loaded):
    async with open_items(settings=settings(server.get_uri())) as shop:
        load = await loaded(shop)
        async with load:
            for _ in range(2):
                await asyncio.to_thread(server.stop)
                await asyncio.to_thread(server.ensure_postgres_running)
                await load.recovers()
        await load.check()


async def test_connections_that_are_cut_or_half_closed_are_replaced(proxy, loaded):
    async with open_items(settings=settings(proxy.url)) as shop:
        load = await loaded(shop)
        async with load:
            for harm in (proxy.cut, proxy.half_close, proxy.cut, proxy.half_close):
                harm()
                await load.recovers()
        await load.check()
    assert load.slowest < 4


async def test_a_network_that_swallows_is_noticed(proxy, loaded):
    async with open_items(settings=settings(proxy.url)) as shop:
        load = await loaded(shop)
        async with load:
            proxy.swallows = True
            await asyncio.sleep(2.5 * STORE_TIMEOUT)
            assert load.answers["EventStoreUnavailable"] + load.answers["unknown"]
            proxy.swallows = False
            proxy.cut()
            await load.recovers()
        await load.check()
    assert load.slowest < 6


async def test_after_a_long_outage_all_is_soon_well_again(proxy, loaded):
    async with open_items(settings=settings(proxy.url)) as shop:
        load = await loaded(shop)
        async with load:
            proxy.refuses = True
            proxy.cut()
            await asyncio.sleep(3.5)
            proxy.refuses = False
            assert await load.recovers() < 2.5
        await load.check()


async def test_a_slow_network_only_makes_answers_late(proxy, loaded):
    async with open_items(settings=settings(proxy.url)) as shop:
        load = await loaded(shop)
        async with load:
            proxy.delay = 0.02
            await load.recovers(20)
            proxy.delay = 0
        await load.check()
    assert set(load.answers) == {"sold", "asked"}


async def test_a_call_that_the_server_does_not_answer_is_cut_off(postgres_url, register):
    async with open_items(settings=settings(postgres_url)) as shop:
        log = shop._store.log

        def hang():
            with log.datastore.reading() as cursor:
                cursor.execute("SELECT pg_sleep(60)")

        begun = monotonic()
        with pytest.raises(EventStoreUnavailable):
            await shop._opened.access.read(hang)
        assert monotonic() - begun < STORE_TIMEOUT + 1
        assert (await shop.commands.dispatch(register("B"))).is_ok()


async def test_while_the_breaker_is_open_answers_come_at_once(server, register, sell):
    async with open_items(settings=settings(server.get_uri())) as shop:
        (await shop.commands.dispatch(register("A"))).unwrap()
        await asyncio.to_thread(server.stop)
        breaker = shop._opened.access.breaker
        while breaker.state is CircuitState.CLOSED:
            assert isinstance(await shop.commands.dispatch(sell("A")), Err)
        begun = monotonic()
        refused = await shop.commands.dispatch(sell("A"))
        asked = await shop.queries.dispatch(ItemHistory(sku="A"))
        assert monotonic() - begun < 0.1
        assert isinstance(refused.error, EventStoreUnavailable)
        assert isinstance(asked.error, EventStoreUnavailable)
        (part,) = shop.health().parts
        assert (part.kind, part.state) == ("breaker", "open")
        assert part.counters["opened"] == 1
        assert part.counters["rejected"] >= 2
        await asyncio.to_thread(server.ensure_postgres_running)
        begun = monotonic()
        while not (await shop.commands.dispatch(sell("A"))).is_ok():
            assert monotonic() - begun < 10
            await asyncio.sleep(0.05)
        assert shop.health().is_healthy


async def test_the_librarys_own_retries_do_not_hide_under_ours(server, register, monkeypatch):
    slept = []
    monkeypatch.setattr(eventsourcing.utils, "sleep", slept.append)
    async with open_items(settings=settings(server.get_uri())) as shop:
        (await shop.commands.dispatch(register("A"))).unwrap()
        await asyncio.to_thread(server.stop)
        for _ in range(3):
            assert isinstance(await shop.queries.dispatch(ItemHistory(sku="A")), Err)
            assert isinstance(await shop.commands.dispatch(register("B")), Err)
    assert slept == []


async def test_a_moments_failure_is_retried_and_nobody_sees_it(postgres_url, register):
    async with open_items(settings=settings(postgres_url)) as shop:
        (await shop.commands.dispatch(register("A"))).unwrap()
        for _ in range(20):  # views may be the first to find that all connections are gone
            with psycopg.connect(postgres_url, autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            answers = await asyncio.gather(
                *(shop.queries.dispatch(ItemHistory(sku="A")) for _ in range(6))
            )
            assert all(answer.is_ok() for answer in answers)
            if shop.health().parts[0].counters["failures"] > 0:
                break
        assert shop.health().parts[0].counters["failures"] > 0
