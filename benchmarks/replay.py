"""Replay of one stream of 5,000 events, against plain eventsourcing doing the same.

Both sides load one item through their repository, from a store of the same kind, without a
cache and without snapshots. Plain is the library's default aggregate, transcoder and recorder.
"""

from __future__ import annotations

from _measure import PRICE, QUICK, WHEN, PlainItem, compare, plain_items, stores

from leftfold.application.items import Items, item_model
from leftfold.domain import Personal
from leftfold.domain.items import Item
from leftfold.infrastructure import Settings
from leftfold.infrastructure.stores import SharedLog, make_store

EVENTS = 1_000 if QUICK else 5_000
TARGETS = {"memory": "6x", "sqlite": "3x", "postgresql": "2.5x"}


def main() -> None:
    for kind, target in TARGETS.items():
        with stores(kind) as new_store:
            store = make_store(Settings(store=new_store()))
            store.open(item_model.projections, create_tables=True)
            ours = Items(store=SharedLog(store.log))
            item = Item.register("A", "LANTERN", PRICE, 10**9)
            for n in range(EVENTS - 1):
                item.sell(1, str(n), PRICE, "United Kingdom", Personal("17850"), WHEN)
                if item.unsaved >= 500:
                    ours.repository.save(item)
            ours.repository.save(item)

            plain = plain_items(new_store())
            plain_item = PlainItem(sku="A", name="LANTERN", unit_price=PRICE, opening_stock=10**9)
            for n in range(EVENTS - 1):
                plain_item.sell(1, str(n), PRICE, "United Kingdom", "17850", WHEN)
                if len(plain_item.pending_events) >= 500:
                    plain.save(plain_item)
            plain.save(plain_item)

            loaded = ours.repository.load(Item, item.id)
            loaded_plain: PlainItem = plain.repository.get(plain_item.id)
            assert loaded.version == loaded_plain.version == EVENTS
            assert loaded.on_hand == loaded_plain.on_hand

            compare(
                f"replay of {EVENTS:,} events, {kind}",
                lambda: ours.repository.load(Item, item.id),
                lambda: plain.repository.get(plain_item.id),
                target,
            )
            plain.close()
            store.close()


main()
