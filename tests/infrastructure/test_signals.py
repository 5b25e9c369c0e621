"""Signals, kills and forks: what was answered is kept, and what is kept is whole."""

from __future__ import annotations

import asyncio
import signal
from random import Random
from textwrap import dedent

import pytest

from leftfold.application.items import FindItems, ItemHistory
from leftfold.domain import Ok
from leftfold.infrastructure import Settings
from leftfold.infrastructure.items import open_items

pytestmark = [pytest.mark.anyio, pytest.mark.timed]

SELLS_FOREVER = """
    async def sells(shop, n):
        sold = 0
        while (await shop.commands.dispatch(sell(f"S{n}"))).is_ok():
            sold += 1
            say(n, sold)
        await asyncio.sleep(60)

    async def main():
        async with open_items(url) as shop:
            await shop.commands.dispatch_all([register(f"S{n}", 10**6) for n in range(4)])
            await asyncio.gather(*(sells(shop, n) for n in range(4)))

    asyncio.run(main())
"""
STOPS_WHEN_REFUSED = SELLS_FOREVER.replace("await asyncio.sleep(60)", "")
SELLS_AND_RAISES = """
    async def main():
        async with open_items(url) as shop:
            await shop.commands.dispatch(register("S0", 10**6))
            for sold in range(1, 10**6):
                (await shop.commands.dispatch(sell("S0"))).unwrap()
                say(0, sold)

    asyncio.run(main())
"""
SELLS_BLOCKING = """
    with open_items(url).blocking() as shop:
        shop.commands.dispatch(register("S0", 10**6))
        for sold in range(1, 10**6):
            shop.commands.dispatch(sell("S0")).unwrap()
            say(0, sold)
"""
SELLS_BLOCKING_IN_THREADS = """
    from threading import Thread

    with open_items(url).blocking() as shop:
        def sells(n):
            shop.commands.dispatch(register(f"S{n}", 10**6))
            sold = 0
            while shop.commands.dispatch(sell(f"S{n}")).is_ok():
                sold += 1
                say(n, sold)

        for n in range(4):
            Thread(target=sells, args=(n,), daemon=True).start()
        time.sleep(60)
"""


def answered_by(child, lines, number):
    """Send the child a signal after some sales; return how many were answered `Ok`, by item."""
    sold = {}
    for _ in range(lines):
        n, count = child.says().split()
        sold[f"S{n}"] = int(count)
    child.process.send_signal(number)
    for line in child.says_until_it_ends():
        n, count = line.split()
        sold[f"S{n}"] = int(count)
    return sold


async def kept(url):
    """Return how many sales the store holds, by item; the log and the view must agree."""
    async with open_items(url) as shop:
        (await shop.catch_up()).unwrap()
        sold = {}
        for row in (await shop.queries.dispatch(FindItems())).unwrap().rows:
            told = (await shop.queries.dispatch(ItemHistory(sku=row.sku))).unwrap()
            assert [event.version for event in told] == list(range(1, len(told) + 1))
            assert row.units_sold == len(told) - 1
            assert row.on_hand == row.opening_stock - row.units_sold
            sold[row.sku] = row.units_sold
        return sold


@pytest.mark.parametrize(
    "script",
    [
        SELLS_FOREVER,
        STOPS_WHEN_REFUSED,
        SELLS_AND_RAISES,
        SELLS_BLOCKING,
        SELLS_BLOCKING_IN_THREADS,
    ],
    ids=["forever", "stops when refused", "raises", "blocking", "blocking in threads"],
)
async def test_on_sigterm_what_was_answered_is_kept_and_the_signal_ends_the_process(
    sqlite_url, start, script
):
    child = start(script, sqlite_url)
    answered = answered_by(child, 40, signal.SIGTERM)
    assert child.ends() == -signal.SIGTERM
    found = await kept(sqlite_url)
    assert all(found[sku] >= count for sku, count in answered.items())


async def test_on_sigterm_an_idle_runtime_on_postgresql_ends(postgres_url, start):
    script = """
        async def main():
            async with open_items(url) as shop:
                (await shop.commands.dispatch(register("S0"))).unwrap()
                say("ready")
                await asyncio.sleep(60)
        asyncio.run(main())
    """
    child = start(script, postgres_url)
    child.says()
    child.process.send_signal(signal.SIGTERM)
    assert child.ends(5) == -signal.SIGTERM
    assert child.errors == ""
    assert await kept(postgres_url) == {"S0": 0}


async def test_a_programs_own_sigterm_handler_is_left_alone(sqlite_url, start):
    script = """
        signal.signal(signal.SIGTERM, lambda *_: say("mine"))
        async def main():
            async with open_items(url) as shop:
                say("ready")
                await asyncio.sleep(0.5)
                say((await shop.commands.dispatch(register())).is_ok())
        asyncio.run(main())
    """
    child = start(script, sqlite_url)
    child.says()
    child.process.send_signal(signal.SIGTERM)
    assert (child.says(), child.says(), child.ends()) == ("mine", "True", 0)


async def test_sigterm_is_the_systems_again_after_closing(sqlite_url, start):
    script = """
        async def main():
            async with open_items(url) as shop:
                pass
        asyncio.run(main())
        with open_items(url).blocking():
            pass
        say(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
    """
    assert start(script, sqlite_url).says() == "True"


SLOW = """
    from leftfold.application import Command

    class Slow(Command[float, ItemError]):
        seconds: float

    async def slow(command):
        await asyncio.sleep(command.seconds)
        return Ok(command.seconds)

    async def opened(name):
        shop = await open_items(url + name).open()
        shop.commands.add(Slow.handled_by(slow))
        return shop

    async def works(shop, seconds):
        say((await shop.commands.dispatch(Slow(seconds=seconds))).unwrap())
        say((await shop.commands.dispatch(Slow(seconds=0))).is_ok())
"""
OPENS_TWO = (
    SLOW
    + """
    async def main():
        shops = [await opened("1"), await opened("2")]
        working = [asyncio.create_task(works(shop, n / 4)) for n, shop in enumerate(shops, 1)]
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.gather(*working)
        await asyncio.gather(*(shop.close() for shop in shops))
        say("not ended")
    asyncio.run(main())
"""
)
CLOSES_OTHERS = (
    SLOW
    + """
    async def main():
        first, shop = await opened("1"), await opened("2")
        with open_items(url + "3").blocking():
            await first.close()
        working = asyncio.create_task(works(shop, 0.25))
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)
    asyncio.run(main())
"""
)
GIVES_UP_CLOSING = (
    SLOW
    + """
    async def main():
        shop = await opened("1")
        head = shop._store.log.head
        shop._store.log.head = lambda: time.sleep(1) or head()  # a page takes long
        (await shop.commands.dispatch(register())).unwrap()
        await asyncio.sleep(0.05)
        try:
            await asyncio.wait_for(shop.close(), 0.1)
        except TimeoutError:
            say("given up")
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)
    asyncio.run(main())
"""
)


async def test_on_sigterm_all_runtimes_of_a_process_finish_what_is_under_way(sqlite_url, start):
    child = start(OPENS_TWO, sqlite_url)
    assert child.says_until_it_ends() == ["0.25", "False", "0.5", "False"]
    assert child.ends() == -signal.SIGTERM


async def test_a_runtime_that_closes_leaves_sigterm_to_the_others(sqlite_url, start):
    child = start(CLOSES_OTHERS, sqlite_url)
    assert child.says_until_it_ends() == ["0.25", "False"]
    assert child.ends() == -signal.SIGTERM


async def test_sigterm_ends_a_process_whose_close_was_given_up(sqlite_url, start):
    child = start(GIVES_UP_CLOSING, sqlite_url)
    assert child.says_until_it_ends(10) == ["given up"]
    assert child.ends() == -signal.SIGTERM


async def test_sigterm_ends_a_process_that_left_a_runtime_open_on_a_closed_loop(sqlite_url, start):
    script = """
        asyncio.run(open_items(url).open())
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        say("not ended")
    """
    child = start(script, sqlite_url)
    assert child.says_until_it_ends() == []
    assert child.ends() == -signal.SIGTERM


async def test_a_killed_process_leaves_a_whole_log_and_views_that_catch_up(shared_url, start):
    random = Random(7)
    answered = {}
    for _ in range(3):
        child = start(SELLS_FOREVER, shared_url)
        for sku, count in answered_by(child, random.randint(1, 200), signal.SIGKILL).items():
            answered[sku] = answered.get(sku, 0) + count
        assert child.ends() == -signal.SIGKILL
        found = await kept(shared_url)
        assert all(found[sku] >= count for sku, count in answered.items())


async def test_an_invoice_of_a_killed_process_is_whole_or_not_there(shared_url, start):
    script = """
        async def main():
            async with open_items(url) as shop:
                await shop.commands.dispatch_all([register(f"S{n}", 10**6) for n in range(5)])
                lines = tuple(InvoiceLine(kind="sale", sku=f"S{n}", quantity=1) for n in range(5))
                say("ready")
                while True:
                    (await shop.commands.dispatch(RecordInvoice(invoice="1", lines=lines))).unwrap()
        asyncio.run(main())
    """
    child = start(script, shared_url)
    child.says()
    await asyncio.sleep(0.3)
    child.process.kill()
    child.ends()
    found = await kept(shared_url)
    assert len(found) == 5
    assert len(set(found.values())) == 1


async def test_a_process_killed_between_pages_leaves_a_view_that_catches_up(shared_url, start):
    script = """
        async def main():
            async with open_items(settings=Settings(store=url, page_size=3)) as shop:
                while True:
                    say(shop.health().projections[0].position)
                    await asyncio.sleep(0.01)
        asyncio.run(main())
    """
    async with open_items(shared_url) as shop:
        await shop.commands.dispatch_all([_registers(f"S{n}") for n in range(600)])
    _forget_the_view(shared_url)
    child = start(script, shared_url)
    while not 0 < int(child.says()) < 600:
        pass
    child.process.kill()
    child.ends()
    async with open_items(settings=Settings(store=shared_url, page_size=50)) as shop:
        assert await shop.catch_up(20) == Ok(None)
        page = (await shop.queries.dispatch(FindItems(limit=1_000))).unwrap()
    assert len({row.sku for row in page.rows}) == 600


FORKS = """
    def tells(function):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                function()
                said = "nothing raised"
            except BaseException as error:
                said = type(error).__name__
            os.write(write, said.encode())
            os._exit(0)
        os.close(write)
        say(os.read(read, 100).decode() or "hung")
        os.waitpid(child, 0)
"""


async def test_a_runtime_inherited_by_fork_is_refused_and_the_parents_goes_on(shared_url, start):
    script = (
        FORKS
        + """
    async def main():
        async with open_items(url) as shop:
            commands = shop.commands
            def send(bus, message):
                try:
                    bus.dispatch(message).send(None)
                except StopIteration:
                    pass
            tells(lambda: shop.commands)
            tells(lambda: shop.queries)
            tells(lambda: shop.health())
            tells(lambda: send(commands, register()))
            say((await shop.commands.dispatch(register())).is_ok())
    asyncio.run(main())
    """
    )
    child = start(script, shared_url)
    assert [child.says() for _ in range(5)] == [*["ForkedRuntimeError"] * 4, "True"]
    assert child.ends() == 0


@pytest.mark.parametrize(
    "use",
    [
        "shop.commands.dispatch(register())",
        "shop.queries.dispatch(FindItems())",
        "shop.commands.parse('RegisterItem', {})",
        "shop.health()",
        "shop.catch_up()",
        "shop.wait_for(receipt)",
    ],
)
async def test_a_blocking_runtime_inherited_by_fork_is_refused(sqlite_url, start, use):
    script = (
        FORKS
        + f"""
    with open_items(url).blocking() as shop:
        receipt = shop.commands.dispatch(register("first")).unwrap()
        def use():
            signal.alarm(5)
            {use}
        tells(use)
        say(shop.commands.dispatch(register("second")).is_ok())
    """
    )
    child = start(script, sqlite_url)
    assert [child.says(), child.says()] == ["ForkedRuntimeError", "True"]


async def test_a_child_by_fork_can_leave_a_blocking_runtime(sqlite_url, start):
    script = """
        child = 1
        with open_items(url).blocking() as shop:
            child = os.fork()
            if not child:
                signal.alarm(5)
        if not child:
            os._exit(0)
        say(os.waitpid(child, 0)[1])
    """
    assert start(script, sqlite_url).says() == "0"


FORKS_ASYNC = """
    async def main():
        async with open_items(url) as shop:
            forks()
            say((await shop.commands.dispatch(register())).is_ok())
    asyncio.run(main())
"""
FORKS_BLOCKING = """
    with open_items(url).blocking() as shop:
        forks()
        say(shop.commands.dispatch(register()).is_ok())
"""


@pytest.mark.parametrize("opens", [FORKS_ASYNC, FORKS_BLOCKING], ids=["asyncio", "blocking"])
async def test_sigterm_to_a_child_by_fork_ends_the_child_and_not_the_parent(
    sqlite_url, start, opens
):
    script = """
        def forks():
            child = os.fork()
            if not child:
                signal.alarm(5)
                time.sleep(60)
            os.kill(child, signal.SIGTERM)
            say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    child = start(dedent(script) + dedent(opens), sqlite_url)
    assert child.says_until_it_ends() == [str(-signal.SIGTERM), "True"]
    assert child.ends() == 0


async def test_a_child_by_fork_may_end_inside_of_a_blocking_runtime(store_url, start):
    script = """
        def forks():
            child = os.fork()
            if not child:
                signal.alarm(5)
                sys.exit(3)
            say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    child = start(dedent(script) + dedent(FORKS_BLOCKING), store_url)
    assert child.says_until_it_ends() == ["3", "True"]


async def test_a_fork_waits_for_threads_that_hold_a_database_librarys_locks(sqlite_url, start):
    script = """
        for _ in range(10):
            with open_items(url).blocking() as shop:
                child = os.fork()  # while the followers begin
                if not child:
                    signal.alarm(5)
                    with open_items(url).blocking():
                        os._exit(0)
                say(os.waitpid(child, 0)[1])
    """
    assert start(script, sqlite_url).says_until_it_ends(60) == ["0"] * 10


async def test_a_child_by_fork_can_open_a_runtime_of_its_own(shared_url, start):
    script = (
        FORKS
        + """
    def use():
        with open_items(url).blocking() as own:
            own.commands.dispatch(register("B")).unwrap()
    with open_items(url).blocking() as shop:
        tells(use)
        say(shop.commands.dispatch(sell("B")).is_ok())
    """
    )
    child = start(script, shared_url)
    assert [child.says(), child.says()] == ["nothing raised", "True"]


def _registers(sku):
    from decimal import Decimal

    from leftfold.application.items import RegisterItem

    return RegisterItem(sku=sku, name="Cup", unit_price=Decimal(1), opening_stock=1)


def _forget_the_view(url):
    """Put the view back to where it was before the first event."""
    import sqlite3

    import psycopg

    path = url.removeprefix("sqlite:///")
    connection = sqlite3.connect(path) if path != url else psycopg.connect(url)
    connection.execute("DELETE FROM item_stock_v1")
    connection.execute("UPDATE leftfold_checkpoints SET position = 0")
    connection.commit()
    connection.close()
