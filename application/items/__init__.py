"""The reference model's application: commands, their service, views, queries, reorders."""

from dataclasses import replace

from leftfold.application.items.commands import (
    DiscontinueItem,
    InvoiceLine,
    ItemCommand,
    Moment,
    Price,
    Quantity,
    ReceiveStock,
    RecordInvoice,
    RegisterItem,
    RenameItem,
    RepriceItem,
    SellStock,
    Sku,
    StockLevel,
    TakeBackStock,
    Text,
    WriteOffStock,
)
from leftfold.application.items.queries import (
    Count,
    FindItems,
    GetItem,
    ItemAsOf,
    ItemHistory,
    ItemQueries,
    ItemState,
)
from leftfold.application.items.reorders import ReorderProcess, ReorderWatch, reorder_watch
from leftfold.application.items.service import Items
from leftfold.application.items.views import (
    DailySales,
    ItemRow,
    best_sellers,
    daily_sales,
    item_stock,
    low_stock,
)
from leftfold.application.model import Model
from leftfold.application.snapshots import SnapshotPolicy
from leftfold.domain.items import Item, Reorder

__all__ = [
    "Count",
    "DailySales",
    "DiscontinueItem",
    "FindItems",
    "GetItem",
    "InvoiceLine",
    "ItemAsOf",
    "ItemCommand",
    "ItemHistory",
    "ItemQueries",
    "ItemRow",
    "ItemState",
    "Items",
    "Moment",
    "Price",
    "Quantity",
    "ReceiveStock",
    "RecordInvoice",
    "RegisterItem",
    "RenameItem",
    "ReorderProcess",
    "ReorderWatch",
    "RepriceItem",
    "SellStock",
    "Sku",
    "StockLevel",
    "TakeBackStock",
    "Text",
    "WriteOffStock",
    "best_sellers",
    "daily_sales",
    "item_model",
    "item_stock",
    "low_stock",
    "reorder_watch",
    "shop_model",
]

item_model = Model(
    aggregates=(Item, Reorder),
    services=(Items,),
    projections=(item_stock, low_stock, best_sellers, daily_sales),
    queries=(ItemQueries,),
    snapshots={Item: SnapshotPolicy(every=500)},
)

shop_model = replace(item_model, processes=(ReorderProcess,))
"""The same with reorders, which the process opens and closes by itself."""
