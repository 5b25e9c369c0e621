"""Replay of one stream of 5,000 events, against plain eventsourcing doing the same.

Both sides load one item through their repository, from a store of the same kind, without a
cache and without snapshots. The events hold the same facts. leftfold's side is its service on the
store's shared log; plain's is the library's default aggregate, transcoder and recorder.

    python benchmarks/replay.py [--quick]
"""

from __future__ import annotations

from contextlib import closing

from _measure import PRICE, QUICK, WHEN, PlainItem, compare, plain_items, stores

from leftfold.application.items import Items, item_model
from leftfold.domain import Personal
from leftfold.domain.items import Item
from leftfold.infrastructure import Settings
from leftfold.infrastructure.stores import SharedLog, make_store

EVENTS = 1_000 if QUICK else 5_000
SAVED_AT_ONCE = 500
TARGETS = {"memory": "6x", "sqlite": "3x", "postgresql": "2.5x"}


def main() -> None:
    for kind, target in TARGETS.items():
        with (
            stores(kind) as new_store,
            closing(make_store(Settings(store=new_store()))) as store,
            closing(plain_items(new_store())) as plain,
        ):
            store.open(item_model.projections, create_tables=True)
            ours = Items(store=SharedLog(store.log))
            item = Item.register("A", "LANTERN", PRICE, 10**9)
            plain_item = PlainItem(sku="A", name="LANTERN", unit_price=PRICE, opening_stock=10**9)
            for n in range(1, EVENTS):
                item.sell(1, str(n), PRICE, "United Kingdom", Personal("17850"), WHEN)
                plain_item.sell(1, str(n), PRICE, "United Kingdom", "17850", WHEN)
                if n % SAVED_AT_ONCE == 0 or n == EVENTS - 1:
                    ours.repository.save(item)
                    plain.save(plain_item)

            loaded = ours.repository.load(Item, item.id)
            loaded_plain: PlainItem = plain.repository.get(plain_item.id)
            assert loaded.version == loaded_plain.version == EVENTS
            assert loaded.on_hand == loaded_plain.on_hand == 10**9 - EVENTS + 1

            compare(
                f"replay of {EVENTS:,} events, {kind}",
                lambda: ours.repository.load(Item, item.id),
                lambda: plain.repository.get(plain_item.id),
                target,
                rounds=9,
                turns=3,
            )


if __name__ == "__main__":
    main()
