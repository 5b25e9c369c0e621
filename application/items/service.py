"""The service that handles the commands to items."""

from __future__ import annotations

from collections.abc import Iterable

from leftfold.application.items.commands import (
    DiscontinueItem,
    InvoiceLine,
    ReceiveStock,
    RecordInvoice,
    RegisterItem,
    RenameItem,
    RepriceItem,
    SellStock,
    TakeBackStock,
    WriteOffStock,
)
from leftfold.application.messages import Handling
from leftfold.application.receipt import Receipt
from leftfold.application.service import Service
from leftfold.domain import Err, Ok, Result
from leftfold.domain.items import Item, ItemAlreadyRegistered, ItemError, ItemNotFound


class Items(Service):
    """Handles the commands."""

    aggregates = (Item,)

    def handlers(self) -> Iterable[Handling]:
        yield RegisterItem.handled_by(self.register)
        yield RenameItem.handled_by(self.rename)
        yield RepriceItem.handled_by(self.reprice)
        yield ReceiveStock.handled_by(self.receive)
        yield SellStock.handled_by(self.sell)
        yield TakeBackStock.handled_by(self.take_back)
        yield WriteOffStock.handled_by(self.write_off)
        yield DiscontinueItem.handled_by(self.discontinue)
        yield RecordInvoice.handled_by(self.record_invoice)

    def register(self, command: RegisterItem) -> Result[Receipt, ItemError]:
        if self.repository.find(Item, Item.id_of(command.sku)) is not None:
            return Err(ItemAlreadyRegistered(command.sku))
        item = Item.register(
            command.sku,
            command.name,
            command.unit_price,
            command.opening_stock,
            command.reorder_level,
            command.occurred_at,
        )
        return Ok(self.repository.save(item))

    def rename(self, command: RenameItem) -> Result[Receipt, ItemError]:
        item = self._item(command.sku)
        item.rename(command.name, command.occurred_at)
        return Ok(self.repository.save(item))

    def reprice(self, command: RepriceItem) -> Result[Receipt, ItemError]:
        item = self._item(command.sku)
        item.reprice(command.unit_price, command.occurred_at)
        return Ok(self.repository.save(item))

    def receive(self, command: ReceiveStock) -> Result[Receipt, ItemError]:
        item = self._item(command.sku)
        item.receive(command.quantity, command.occurred_at)
        return Ok(self.repository.save(item))

    def sell(self, command: SellStock) -> Result[Receipt, ItemError]:
        item = self._item(command.sku)
        item.sell(
            command.quantity,
            command.invoice,
            command.unit_price,
            command.country,
            command.customer_id,
            command.occurred_at,
        )
        return Ok(self.repository.save(item))

    def take_back(self, command: TakeBackStock) -> Result[Receipt, ItemError]:
        item = self._item(command.sku)
        item.take_back(
            command.quantity,
            command.invoice,
            command.unit_price,
            command.country,
            command.customer_id,
            command.occurred_at,
        )
        return Ok(self.repository.save(item))

    def write_off(self, command: WriteOffStock) -> Result[Receipt, ItemError]:
        item = self._item(command.sku)
        item.write_off(command.quantity, command.reason, command.occurred_at)
        return Ok(self.repository.save(item))

    def discontinue(self, command: DiscontinueItem) -> Result[Receipt, ItemError]:
        item = self._item(command.sku)
        item.discontinue(command.occurred_at)
        return Ok(self.repository.save(item))

    def record_invoice(self, command: RecordInvoice) -> Result[Receipt, ItemError]:
        skus = list(dict.fromkeys(line.sku for line in command.lines))
        found = self.repository.find_all(Item, [Item.id_of(sku) for sku in skus])
        items: dict[str, Item] = {}
        for sku, item in zip(skus, found, strict=True):
            if item is None:
                return Err(ItemNotFound(sku))
            items[sku] = item
        for line in command.lines:
            _move(items[line.sku], command.invoice, line)
        return Ok(self.repository.save(*items.values()))

    def _item(self, sku: str) -> Item:
        item = self.repository.find(Item, Item.id_of(sku))
        if item is None:
            raise ItemNotFound(sku)
        return item


def _move(item: Item, invoice: str, line: InvoiceLine) -> None:
    match line.kind:
        case "sale":
            move = item.sell
        case "return":
            move = item.take_back
        case "write_off":
            return item.write_off(line.quantity, line.reason, line.occurred_at)
        case "receipt":
            return item.receive(line.quantity, line.occurred_at)
    return move(
        line.quantity, invoice, line.unit_price, line.country, line.customer_id, line.occurred_at
    )
