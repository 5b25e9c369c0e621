"""One caller: load an item, change it, save one event; 200 items in turn, at equal durability.

"Alone" is leftfold's service and repository as a plain application is used, without a runtime and
so with every load read from the store, against plain eventsourcing: items of 10 events at first,
and one more after each turn, on both sides.

"Through the runtime" is a whole command against the same plain side: buses, command ids, receipts,
aggregates in memory. What plain needs grows with the events of an item, what leftfold needs does
not: so it is shown for items of 10 events, and of 130, as many as the shop's have on average.
No view follows on either side.

    python benchmarks/one_caller.py [--quick]
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing
from itertools import cycle, islice

from _measure import PRICE, QUICK, WHEN, PlainItem, PlainItems, compare, plain_items, stores

from leftfold.application import Service
from leftfold.application.items import Items, RegisterItem, SellStock, item_model
from leftfold.domain.items import Item
from leftfold.infrastructure import Runtime, Settings
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.stores import SharedLog, make_store

ITEMS = 40 if QUICK else 200
FEW, MANY = 10, 130  # events of an item
TARGETS = {"memory": ("4x", "15x"), "sqlite": ("1.8x", "3x"), "postgresql": ("", "3.5x")}
TURNS = {"memory": 1, "sqlite": 10, "postgresql": 10}
SKUS = [f"S{n}" for n in range(ITEMS)]


def main() -> None:
    for kind, (target, runtime_target) in TARGETS.items():
        with stores(kind) as new_store:
            alone(kind, new_store, target)
            through_the_runtime(kind, new_store, FEW)
            through_the_runtime(kind, new_store, MANY, runtime_target)


def alone(kind: str, new_store: Callable[[], str], target: str) -> None:
    with (
        closing(make_store(Settings(store=new_store()))) as store,
        closing(plain_items(new_store())) as plain,
    ):
        store.open(item_model.projections, create_tables=True)
        ours = Items(store=SharedLog(store.log))
        durability = "" if kind != "sqlite" else f" at {equal_durability(ours, plain)}"
        sell_plain = plain_seller(plain, kind, FEW)
        items = [Item.register(sku, "LANTERN", PRICE, 10**6) for sku in SKUS]
        for item in items:
            for _ in range(FEW - 1):
                item.sell(1, "1", PRICE, "France", None, WHEN)
            ours.repository.save(item)
        turns = cycle([item.id for item in items])

        def sell() -> None:
            for item_id in islice(turns, ITEMS // TURNS[kind]):
                item = ours.repository.load(Item, item_id)
                item.sell(1, "2", PRICE, "France", None, WHEN)
                ours.repository.save(item)

        compare(f"one caller, {kind}{durability}", sell, sell_plain, target, turns=TURNS[kind])


def through_the_runtime(
    kind: str, new_store: Callable[[], str], events: int, target: str = ""
) -> None:
    with asyncio.Runner() as runner, closing(plain_items(new_store())) as plain:
        sell_plain = plain_seller(plain, kind, events)
        runtime = runner.run(open_items(settings=Settings(store=new_store(), follow=False)).open())
        try:
            runner.run(fill(runtime, events))
            turns = cycle(SKUS)

            async def sell() -> None:
                for sku in islice(turns, ITEMS // TURNS[kind]):
                    (await runtime.commands.dispatch(sale(sku))).unwrap()

            compare(
                f"one caller through the runtime, {kind}, items of {events} events",
                lambda: runner.run(sell()),
                sell_plain,
                target,
                turns=TURNS[kind],
            )
        finally:
            runner.run(runtime.close())


def plain_seller(plain: PlainItems, kind: str, events: int) -> Callable[[], None]:
    items = [
        PlainItem(sku=sku, name="LANTERN", unit_price=PRICE, opening_stock=10**6) for sku in SKUS
    ]
    for item in items:
        for _ in range(events - 1):
            item.sell(1, "1", PRICE, "France", None, WHEN)
        plain.save(item)
    turns = cycle([item.id for item in items])

    def sell() -> None:
        for item_id in islice(turns, ITEMS // TURNS[kind]):
            item: PlainItem = plain.repository.get(item_id)
            item.sell(1, "2", PRICE, "France", None, WHEN)
            plain.save(item)

    return sell


async def fill(runtime: Runtime, events: int) -> None:
    register = [
        RegisterItem(
            sku=sku, name="LANTERN", unit_price=PRICE, opening_stock=10**6, occurred_at=WHEN
        )
        for sku in SKUS
    ]
    (await runtime.commands.dispatch_all(register)).unwrap()
    for _ in range(events - 1):
        (await runtime.commands.dispatch_all([sale(sku) for sku in SKUS])).unwrap()


def sale(sku: str) -> SellStock:
    return SellStock(
        sku=sku, quantity=1, invoice="2", unit_price=PRICE, country="France", occurred_at=WHEN
    )


def equal_durability(ours: Service, plain: PlainItems) -> str:
    """Return how both sides flush what they commit. Raises if they differ."""
    settings = []
    for application in (ours, plain):
        recorder = application.recorder
        with recorder.datastore.get_connection(commit=True) as connection:
            ask = connection._sqlite_conn.execute
            journal, level = (
                ask(f"PRAGMA {it}").fetchone()[0] for it in ("journal_mode", "synchronous")
            )
            settings.append(f"journal_mode={journal} synchronous={level}")
    if settings[0] != settings[1]:
        raise ValueError(settings)
    return settings[0]


if __name__ == "__main__":
    main()
