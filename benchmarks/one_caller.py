"""One caller: load an item, change it, save one event; 200 items in turn, no aggregate cache.

The first figures are leftfold's service and repository on their own, as a plain application is
used, against plain eventsourcing at equal durability. The others, without a target, are the
same through a whole runtime: buses, command ids, receipts, aggregates in memory, views.
"""

from __future__ import annotations

import asyncio

from _measure import PRICE, QUICK, WHEN, PlainItem, compare, plain_items, stores

from leftfold.application.items import Items, RegisterItem, SellStock, item_model
from leftfold.domain.items import Item
from leftfold.infrastructure import Settings
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.stores import SharedLog, make_store

ITEMS = 200
EACH = 2 if QUICK else 5
TARGETS = {"memory": "4x", "sqlite": "1.8x", "postgresql": ""}


def main() -> None:
    for kind, target in TARGETS.items():
        with stores(kind) as new_store:
            store = make_store(Settings(store=new_store()))
            store.open(item_model.projections, create_tables=True)
            ours = Items(store=SharedLog(store.log))
            plain = plain_items(new_store())
            ids, plain_ids = [], []
            for n in range(ITEMS):
                item = Item.register(f"S{n}", "LANTERN", PRICE, 10**6)
                plain_item = PlainItem(
                    sku=f"S{n}", name="LANTERN", unit_price=PRICE, opening_stock=10**6
                )
                for _ in range(9):
                    item.sell(1, "1", PRICE, "France", None, WHEN)
                    plain_item.sell(1, "1", PRICE, "France", None, WHEN)
                ours.repository.save(item)
                plain.save(plain_item)
                ids.append(item.id)
                plain_ids.append(plain_item.id)

            def sell_ours(ours: Items = ours, ids: list = ids) -> None:
                for item_id in ids * EACH:
                    item = ours.repository.load(Item, item_id)
                    item.sell(1, "2", PRICE, "France", None, WHEN)
                    ours.repository.save(item)

            def sell_plain(plain=plain, ids: list = plain_ids) -> None:
                for item_id in ids * EACH:
                    item: PlainItem = plain.repository.get(item_id)
                    item.sell(1, "2", PRICE, "France", None, WHEN)
                    plain.save(item)

            compare(f"one caller, {kind}", sell_ours, sell_plain, target)
            with asyncio.Runner() as runner:
                runtime = runner.run(open_items(settings=Settings(store=new_store())).open())
                runner.run(register_all(runtime))
                compare(
                    f"one caller through the runtime, {kind}",
                    lambda: runner.run(sell_through(runtime)),
                    sell_plain,
                )
                runner.run(runtime.close())
            plain.close()
            store.close()


async def register_all(runtime) -> None:
    for n in range(ITEMS):
        command = RegisterItem(
            sku=f"S{n}", name="LANTERN", unit_price=PRICE, opening_stock=10**6, occurred_at=WHEN
        )
        (await runtime.commands.dispatch(command)).unwrap()


async def sell_through(runtime) -> None:
    for n in range(ITEMS * EACH):
        command = SellStock(
            sku=f"S{n % ITEMS}",
            quantity=1,
            invoice="2",
            unit_price=PRICE,
            country="France",
            occurred_at=WHEN,
        )
        (await runtime.commands.dispatch(command)).unwrap()


main()
