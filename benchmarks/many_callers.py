"""Many callers: 32 at once sell one piece each of random items out of 200; nothing is lost.

Plain eventsourcing runs 32 threads, each of which loads an item, sells, saves, and tries again
after a conflict. leftfold runs 32 tasks of one runtime with command ids and receipts; neither side
has a view that follows meanwhile. "Beside another process" is the same while a second process, of
the same kind, sells the same items by four callers: 100 pieces a second on either side, or "flat
out", as many as each can. Its sales are not counted.

At the end of each side the stock is compared with what all have sold.

    python benchmarks/many_callers.py [--quick]
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

from _measure import PRICE, QUICK, WHEN, PlainItem, PlainItems, plain_items, stores
from eventsourcing.persistence import IntegrityError

from leftfold.application.items import (
    FindItems,
    RegisterItem,
    SellStock,
    item_model,
    item_stock,
)
from leftfold.infrastructure import Runtime, Settings

CALLERS, RIVALS, ITEMS, STOCK = 32, 4, 200, 10**6
PACE = 100  # sales of all rivals in a second
OURS, PLAIN = (20, 4) if QUICK else (200, 12)  # commands of each caller in a round
ROUNDS = 2 if QUICK else 5
SKUS = [f"S{n}" for n in range(ITEMS)]
TARGETS = {"postgresql": ("18x", "9x"), "sqlite": ("6x", "")}
ONE_VIEW = replace(item_model, projections=(item_stock,))
FORK = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Turn:
    """What the callers of one side did in one round."""

    rate: float
    """Commands a second."""
    p99: float
    """Seconds."""
    surfaced: int
    """Commands that were not carried out."""


def main() -> None:
    for kind, (alone, contended) in TARGETS.items():
        with stores(kind) as new_store:
            compare(f"{CALLERS} callers, {kind}", new_store, alone, None)
            beside_another = f"{CALLERS} callers beside another process, {kind}"
            compare(beside_another, new_store, contended, RIVALS / PACE)
            compare(f"{beside_another}, flat out", new_store, "", 0)


def compare(name: str, new_store: Callable[[], str], target: str, pause: float | None) -> None:
    """Print how many times the commands of plain ours carries out in a second.

    A rival's callers pause some seconds after each sale; there is none if that is None.
    """
    rates: list[float] = []
    p99s: list[float] = []
    surfaced = 0
    with plain_side(new_store(), pause) as plain, our_side(new_store(), pause) as ours:
        for number in range(ROUNDS):
            sides = (plain, ours) if number % 2 == 0 else (ours, plain)
            turns = {side: side() for side in sides}
            rates.append(turns[ours].rate / turns[plain].rate)
            p99s.append(turns[ours].p99 / turns[plain].p99)
            surfaced += turns[ours].surfaced
    told = f" (target {target})" if target else ""
    shown = " ".join(f"{rate:.1f}" for rate in rates)
    print(
        f"{name}: {statistics.median(rates):.1f}x{told}, p99 {statistics.median(p99s):.2f} of "
        f"plain's, {surfaced} conflicts surfaced [rounds: {shown}]",
        flush=True,
    )


@contextmanager
def our_side(url: str, pause: float | None) -> Iterator[Callable[[], Turn]]:
    sold = 0
    with asyncio.Runner() as runner:
        shop = runner.run(Runtime(ONE_VIEW, settings=Settings(store=url, follow=False)).open())
        try:
            runner.run(register(shop))
            with beside(our_rival, url, pause) as sell_beside:

                def turn() -> Turn:
                    nonlocal sold
                    with sell_beside:
                        done = runner.run(our_turn(shop))
                    sold += CALLERS * OURS - done.surfaced
                    return done

                yield turn
            left = runner.run(on_hand(shop))
            check(left, sold + sell_beside.sold)
        finally:
            runner.run(shop.close())


async def our_turn(shop: Runtime) -> Turn:
    latencies: list[float] = []
    surfaced = 0

    async def caller(number: int) -> None:
        nonlocal surfaced
        choose = random.Random(number)
        for _ in range(OURS):
            begun = time.perf_counter()
            outcome = await shop.commands.dispatch(sale(choose.choice(SKUS)))
            latencies.append(time.perf_counter() - begun)
            surfaced += not outcome.is_ok()

    begun = time.perf_counter()
    await asyncio.gather(*map(caller, range(CALLERS)))
    return summed_up(time.perf_counter() - begun, latencies, surfaced)


async def register(shop: Runtime) -> None:
    items = [
        RegisterItem(sku=s, name="LANTERN", unit_price=PRICE, opening_stock=STOCK) for s in SKUS
    ]
    (await shop.commands.dispatch_all(items)).unwrap()


async def on_hand(shop: Runtime) -> int:
    shop.follow()
    (await shop.catch_up(60)).unwrap()
    page = (await shop.queries.dispatch(FindItems(limit=ITEMS))).unwrap()
    return sum(row.on_hand for row in page.rows)


def sale(sku: str) -> SellStock:
    return SellStock(
        sku=sku, quantity=1, invoice="2", unit_price=PRICE, country="France", occurred_at=WHEN
    )


@contextmanager
def plain_side(url: str, pause: float | None) -> Iterator[Callable[[], Turn]]:
    sold = 0
    with closing(plain_items(url)) as plain, ThreadPoolExecutor(CALLERS) as threads:
        for sku in SKUS:
            plain.save(PlainItem(sku=sku, name="LANTERN", unit_price=PRICE, opening_stock=STOCK))
        with beside(plain_rival, url, pause) as sell_beside:

            def turn() -> Turn:
                nonlocal sold
                latencies: list[float] = []

                def caller(number: int) -> None:
                    choose = random.Random(number)
                    for _ in range(PLAIN):
                        begun = time.perf_counter()
                        sell_plain(plain, choose.choice(SKUS))
                        latencies.append(time.perf_counter() - begun)

                with sell_beside:
                    begun = time.perf_counter()
                    list(threads.map(caller, range(CALLERS)))
                    took = time.perf_counter() - begun
                sold += CALLERS * PLAIN
                return summed_up(took, latencies, 0)

            yield turn
        ids = map(PlainItem.create_id, SKUS)
        left = sum(plain.repository.get(i).on_hand for i in ids)  # type: ignore[attr-defined]  # it is a PlainItem
        check(left, sold + sell_beside.sold)


def sell_plain(plain: PlainItems, sku: str) -> None:
    while True:
        item: PlainItem = plain.repository.get(PlainItem.create_id(sku))
        item.sell(1, "2", PRICE, "France", None, WHEN)
        try:
            plain.save(item)
        except IntegrityError:
            continue  # another caller was first: load and try again
        return


def summed_up(took: float, latencies: list[float], surfaced: int) -> Turn:
    return Turn(len(latencies) / took, statistics.quantiles(latencies, n=100)[-1], surfaced)


def check(left: int, sold: int) -> None:
    if left != ITEMS * STOCK - sold:
        msg = f"{ITEMS * STOCK - left} pieces are gone, {sold} were sold"
        raise ValueError(msg)


class Beside:
    """A process that sells inside of `with` blocks, and counts what it sold."""

    def __init__(self, rival: Rival, url: str, pause: float | None) -> None:
        self.sold = 0
        self._go, self._is_over = FORK.Event(), FORK.Event()
        self._idle = FORK.Event()
        self._counted = FORK.Value("i", 0)
        self._process = None
        if pause is not None:
            args = (url, pause, self._go, self._idle, self._is_over, self._counted)
            self._process = FORK.Process(target=rival, args=args)
            self._process.start()
            self._idle.wait()

    def __enter__(self) -> None:
        if self._process is not None:
            self._idle.clear()
            self._go.set()

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._go.clear()
            self._idle.wait()

    def end(self) -> None:
        if self._process is not None:
            self._is_over.set()
            self._go.set()
            self._process.join()
            self.sold = self._counted.value


Rival = Callable[..., None]


@contextmanager
def beside(rival: Rival, url: str, pause: float | None) -> Iterator[Beside]:
    process = Beside(rival, url, pause)
    try:
        yield process
    finally:
        process.end()


def our_rival(url, pause, go, idle, is_over, counted) -> None:  # type: ignore[no-untyped-def]  # multiprocessing's own kinds
    async def sell() -> None:
        async with Runtime(ONE_VIEW, settings=Settings(store=url, follow=False)) as shop:
            choose = random.Random(99)

            async def caller() -> None:
                while go.is_set():
                    outcome = await shop.commands.dispatch(sale(choose.choice(SKUS)))
                    counted.value += outcome.is_ok()
                    await asyncio.sleep(pause)

            while not is_over.is_set():
                idle.set()
                await asyncio.to_thread(go.wait)
                if not is_over.is_set():
                    await asyncio.gather(*(caller() for _ in range(RIVALS)))

    asyncio.run(sell())


def plain_rival(url, pause, go, idle, is_over, counted) -> None:  # type: ignore[no-untyped-def]  # multiprocessing's own kinds
    with closing(plain_items(url)) as plain, ThreadPoolExecutor(RIVALS) as threads:

        def caller(number: int) -> None:
            choose = random.Random(99 + number)
            while go.is_set():
                sell_plain(plain, choose.choice(SKUS))
                with counted.get_lock():
                    counted.value += 1
                time.sleep(pause)

        while not is_over.is_set():
            idle.set()
            go.wait()
            if not is_over.is_set():
                list(threads.map(caller, range(RIVALS)))


if __name__ == "__main__":
    main()
