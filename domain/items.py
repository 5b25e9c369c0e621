"""The reference model: a stock-keeping item, and its reorders.

Values, errors, events, rules, specifications.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from leftfold.domain.aggregate import Aggregate
from leftfold.domain.errors import DomainError
from leftfold.domain.event import WHEN_RECORDED, Created, Event
from leftfold.domain.personal import Personal
from leftfold.domain.specification import Specification, attr

# Values ---------------------------------------------------------------------------------------

MAX_SKU_LENGTH = 20  # characters
MAX_PRICE_DECIMALS = 3
MAX_STOCK = 1_000_000_000  # pieces that an item begins with, or is reordered at
MAX_QUANTITY = 1_000_000  # pieces in one movement
MAX_PRICE = 100_000
"""With `MAX_QUANTITY`, one movement is worth 10^11 at most; views sum up to 9.2 * 10^12."""


# Errors ---------------------------------------------------------------------------------------


class ItemError(DomainError):
    """A rule of the item refuses."""


class InvalidSku(ItemError, message="{sku!r} is not a SKU: 1 to 20 characters of text"):
    sku: str


class InvalidName(ItemError, message="{name!r} is not a name: some text"):
    name: str


class InvalidQuantity(ItemError, message="{quantity} is not a positive whole number up to 10^9"):
    quantity: int


class InvalidStock(ItemError, message="{quantity} is not a stock level: a whole number, 0 to 10^9"):
    quantity: int


class InvalidPrice(ItemError, message="{price} is not a price: 0 to 10^9 with at most 3 decimals"):
    price: Decimal


class ItemAlreadyRegistered(ItemError, message="{sku} is registered already"):
    sku: str


class ItemNotFound(ItemError, message="there is no item {sku}"):
    sku: str


class ItemIsDiscontinued(ItemError, message="{sku} is discontinued"):
    sku: str


class InsufficientStock(ItemError, message="{sku}: {requested} requested, {available} available"):
    sku: str
    requested: int
    available: int


class ReorderIsClosed(DomainError, message="reorder {number} of {sku} is closed"):
    sku: str
    number: int


# Events ---------------------------------------------------------------------------------------


class ItemRegistered(Created, topic="leftfold.item.registered"):
    sku: str
    name: str
    unit_price: Decimal
    opening_stock: int
    reorder_level: int

    def apply(self, item: Item) -> None:
        item.sku = self.sku
        item.name = self.name
        item.unit_price = self.unit_price
        item.on_hand = self.opening_stock
        item.reorder_level = self.reorder_level
        item.discontinued = False


class ItemRenamed(Event, topic="leftfold.item.renamed"):
    name: str

    def apply(self, item: Item) -> None:
        item.name = self.name


class ItemRepriced(Event, topic="leftfold.item.repriced"):
    unit_price: Decimal

    def apply(self, item: Item) -> None:
        item.unit_price = self.unit_price


class StockReceived(Event, topic="leftfold.item.stock_received"):
    quantity: int

    def apply(self, item: Item) -> None:
        item.on_hand += self.quantity


class StockSold(Event, topic="leftfold.item.stock_sold", subject="customer_id"):
    invoice: str
    quantity: int
    unit_price: Decimal
    country: str
    customer_id: Personal[str] | None

    def apply(self, item: Item) -> None:
        item.on_hand -= self.quantity


class StockReturned(Event, topic="leftfold.item.stock_returned", subject="customer_id"):
    invoice: str
    quantity: int
    unit_price: Decimal
    country: str
    customer_id: Personal[str] | None

    def apply(self, item: Item) -> None:
        item.on_hand += self.quantity


class StockWrittenOff(Event, topic="leftfold.item.stock_written_off"):
    quantity: int
    reason: str

    def apply(self, item: Item) -> None:
        item.on_hand -= self.quantity


class ItemDiscontinued(Event, topic="leftfold.item.discontinued"):
    def apply(self, item: Item) -> None:
        item.discontinued = True


class ReorderOpened(Created, topic="leftfold.reorder.opened"):
    sku: str
    number: int
    on_hand: int
    reorder_level: int

    def apply(self, reorder: Reorder) -> None:
        reorder.sku = self.sku
        reorder.number = self.number
        reorder.is_open = True


class ReorderClosed(Event, topic="leftfold.reorder.closed"):
    received: int

    def apply(self, reorder: Reorder) -> None:
        reorder.is_open = False


# Rules ----------------------------------------------------------------------------------------


class Item(
    Aggregate,
    topic="leftfold.item",
    events=(
        ItemRegistered,
        ItemRenamed,
        ItemRepriced,
        StockReceived,
        StockSold,
        StockReturned,
        StockWrittenOff,
        ItemDiscontinued,
    ),
):
    """A stock-keeping item, identified by its SKU. Its stock never falls below zero."""

    sku: str
    name: str
    unit_price: Decimal
    on_hand: int
    reorder_level: int
    discontinued: bool

    @classmethod
    def register(
        cls,
        sku: str,
        name: str,
        unit_price: Decimal,
        opening_stock: int = 0,
        reorder_level: int = 0,
        occurred_at: datetime = WHEN_RECORDED,
    ) -> Item:
        """Begin an item. Raises `InvalidSku`, `InvalidName`, `InvalidPrice`, `InvalidStock`."""
        if not 1 <= len(sku) <= MAX_SKU_LENGTH or not is_text(sku):
            raise InvalidSku(sku)
        for level in (opening_stock, reorder_level):
            if not 0 <= level <= MAX_STOCK:
                raise InvalidStock(level)
        registered = ItemRegistered(
            sku=sku,
            name=_valid_name(name),
            unit_price=_valid_price(unit_price),
            opening_stock=opening_stock,
            reorder_level=reorder_level,
            occurred_at=occurred_at,
        )
        return cls.begin(registered, key=sku)

    def rename(self, name: str, occurred_at: datetime = WHEN_RECORDED) -> None:
        """Give the item another name. Raises `InvalidName`."""
        self.record(ItemRenamed(name=_valid_name(name), occurred_at=occurred_at))

    def reprice(self, unit_price: Decimal, occurred_at: datetime = WHEN_RECORDED) -> None:
        """Give the item another price. Raises `InvalidPrice`."""
        self.record(ItemRepriced(unit_price=_valid_price(unit_price), occurred_at=occurred_at))

    def receive(self, quantity: int, occurred_at: datetime = WHEN_RECORDED) -> None:
        """Take stock in. Raises `InvalidQuantity`, `ItemIsDiscontinued`."""
        if self.discontinued:
            raise ItemIsDiscontinued(self.sku)
        self.record(StockReceived(quantity=_valid_quantity(quantity), occurred_at=occurred_at))

    def sell(
        self,
        quantity: int,
        invoice: str,
        unit_price: Decimal | None = None,
        country: str = "",
        customer_id: Personal[str] | None = None,
        occurred_at: datetime = WHEN_RECORDED,
    ) -> None:
        """Sell stock, at the item's price if none is given.

        Raises `InvalidQuantity`, `InvalidPrice`, `ItemIsDiscontinued`, `InsufficientStock`.
        """
        if self.discontinued:
            raise ItemIsDiscontinued(self.sku)
        self._take_out(_valid_quantity(quantity))
        sold = StockSold(
            invoice=invoice,
            quantity=quantity,
            unit_price=self.unit_price if unit_price is None else _valid_price(unit_price),
            country=country,
            customer_id=customer_id,
            occurred_at=occurred_at,
        )
        self.record(sold)

    def take_back(
        self,
        quantity: int,
        invoice: str,
        unit_price: Decimal | None = None,
        country: str = "",
        customer_id: Personal[str] | None = None,
        occurred_at: datetime = WHEN_RECORDED,
    ) -> None:
        """Take sold stock back, also of a discontinued item.

        Raises `InvalidQuantity`, `InvalidPrice`.
        """
        returned = StockReturned(
            invoice=invoice,
            quantity=_valid_quantity(quantity),
            unit_price=self.unit_price if unit_price is None else _valid_price(unit_price),
            country=country,
            customer_id=customer_id,
            occurred_at=occurred_at,
        )
        self.record(returned)

    def write_off(self, quantity: int, reason: str, occurred_at: datetime = WHEN_RECORDED) -> None:
        """Take out stock that is lost. Raises `InvalidQuantity`, `InsufficientStock`."""
        self._take_out(_valid_quantity(quantity))
        self.record(StockWrittenOff(quantity=quantity, reason=reason, occurred_at=occurred_at))

    def discontinue(self, occurred_at: datetime = WHEN_RECORDED) -> None:
        """Stop selling the item. Raises `ItemIsDiscontinued` if that was done before."""
        if self.discontinued:
            raise ItemIsDiscontinued(self.sku)
        self.record(ItemDiscontinued(occurred_at=occurred_at))

    def _take_out(self, quantity: int) -> None:
        if quantity > self.on_hand:
            raise InsufficientStock(self.sku, quantity, self.on_hand)


class Reorder(Aggregate, topic="leftfold.reorder", events=(ReorderOpened, ReorderClosed)):
    """A reorder of an item: open until stock is received. Each item's are numbered from 1."""

    sku: str
    number: int
    is_open: bool

    @staticmethod
    def key_of(sku: str, number: int) -> str:
        """Return the natural key of an item's reorder with this number."""
        return f"{sku}/{number}"

    @classmethod
    def open(
        cls,
        sku: str,
        number: int,
        on_hand: int,
        reorder_level: int,
        occurred_at: datetime = WHEN_RECORDED,
    ) -> Reorder:
        """Open a reorder of an item that has this stock and this reorder level."""
        opened = ReorderOpened(
            sku=sku,
            number=number,
            on_hand=on_hand,
            reorder_level=reorder_level,
            occurred_at=occurred_at,
        )
        return cls.begin(opened, key=cls.key_of(sku, number))

    def close(self, received: int, occurred_at: datetime = WHEN_RECORDED) -> None:
        """Close the reorder: so much stock was received.

        Raises `ReorderIsClosed` if that was done before.
        """
        if not self.is_open:
            raise ReorderIsClosed(self.sku, self.number)
        self.record(ReorderClosed(received=received, occurred_at=occurred_at))


def is_text(text: str) -> bool:
    """Tell whether databases can keep a text: no NUL, no half of a surrogate pair."""
    if "\0" in text:
        return False
    return text.isascii() or text.encode("utf-8", "ignore").decode() == text


def _valid_name(name: str) -> str:
    if not name.strip() or not is_text(name):
        raise InvalidName(name)
    return name


def _valid_quantity(quantity: int) -> int:
    if not 0 < quantity <= MAX_QUANTITY:
        raise InvalidQuantity(quantity)
    return quantity


def _valid_price(price: Decimal) -> Decimal:
    if (
        not price.is_finite()
        or not 0 <= price <= MAX_PRICE
        or price != round(price, MAX_PRICE_DECIMALS)
    ):
        raise InvalidPrice(price)
    return price


# Specifications -------------------------------------------------------------------------------


class InStock(Specification[object]):
    """There is something to sell."""

    def tree(self) -> Specification[object]:
        return attr("on_hand") > 0


@dataclass(frozen=True)
class BestSeller(Specification[object]):
    """It has earned at least so much; asked of rows, since an item itself keeps no revenue."""

    min_revenue: Decimal

    def tree(self) -> Specification[object]:
        return attr("revenue") >= self.min_revenue


class NeedsReorder(Specification[object]):
    """The stock is down to the reorder level, and the item is still sold."""

    def tree(self) -> Specification[object]:
        return (attr("on_hand") <= attr("reorder_level")) & (attr("discontinued") == False)  # noqa: E712 - builds a specification
