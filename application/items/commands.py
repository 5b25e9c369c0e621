"""The commands to items, and the types of their fields."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from leftfold.application.messages import Command
from leftfold.application.receipt import Receipt
from leftfold.domain import WHEN_RECORDED, Personal
from leftfold.domain.items import (
    MAX_PRICE,
    MAX_PRICE_DECIMALS,
    MAX_QUANTITY,
    MAX_SKU_LENGTH,
    MAX_STOCK,
    ItemError,
    is_text,
)


def _storable(text: str) -> str:
    if not is_text(text):
        msg = "holds a NUL character or half of a surrogate pair"
        raise ValueError(msg)
    return text


def _as_utc(moment: datetime) -> datetime:
    try:
        return moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    except OverflowError:
        msg = "is beyond the years 1 to 9999 in UTC"
        raise ValueError(msg) from None


Moment = Annotated[AwareDatetime, AfterValidator(_as_utc)]
Text = Annotated[str, AfterValidator(_storable)]
Sku = Annotated[
    # Its length first: after a function of ours it would be checked by one of pydantic's.
    str,
    StringConstraints(min_length=1, max_length=MAX_SKU_LENGTH),
    AfterValidator(_storable),
]
Quantity = Annotated[int, Field(gt=0, le=MAX_QUANTITY, strict=True)]
StockLevel = Annotated[int, Field(ge=0, le=MAX_STOCK, strict=True)]
Price = Annotated[Decimal, Field(ge=0, le=MAX_PRICE, decimal_places=MAX_PRICE_DECIMALS)]


class ItemCommand(Command[Receipt, ItemError]):
    """A command to one item. `occurred_at` is when it happened, if not just now."""

    sku: Sku
    occurred_at: Moment = WHEN_RECORDED


class RegisterItem(ItemCommand):
    """Begin an item."""

    name: Text
    unit_price: Price
    opening_stock: StockLevel = 0
    reorder_level: StockLevel = 0


class RenameItem(ItemCommand):
    """Give an item another name."""

    name: Text


class RepriceItem(ItemCommand):
    """Give an item another price."""

    unit_price: Price


class ReceiveStock(ItemCommand):
    """Take stock in."""

    quantity: Quantity


class SellStock(ItemCommand):
    """Sell stock, at the item's price if none is given."""

    quantity: Quantity
    invoice: Text
    unit_price: Price | None = None
    country: Text = ""
    customer_id: Personal[Text] | None = None


class TakeBackStock(SellStock):
    """Take sold stock back."""


class WriteOffStock(ItemCommand):
    """Take out stock that is lost."""

    quantity: Quantity
    reason: Text


class DiscontinueItem(ItemCommand):
    """Stop selling an item."""


class InvoiceLine(BaseModel):
    """One movement of one item. A receipt needs no more than sku and quantity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["sale", "return", "write_off", "receipt"]
    sku: Sku
    quantity: Quantity
    unit_price: Price = Decimal(0)
    country: Text = ""
    customer_id: Personal[Text] | None = None
    reason: Text = ""
    occurred_at: Moment = WHEN_RECORDED


class RecordInvoice(Command[Receipt, ItemError]):
    """Move several items in one commit, line by line; one refused line refuses the invoice."""

    invoice: Text
    lines: Annotated[tuple[InvoiceLine, ...], Field(min_length=1)]
