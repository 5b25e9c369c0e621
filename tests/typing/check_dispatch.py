"""Dispatching infers what a message answers."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from decimal import Decimal
from typing import Any, assert_type

from leftfold.application import Command, CommandBus, DispatchError, Page, Query, QueryBus, Receipt
from leftfold.application.errors import ValidationFailed
from leftfold.application.items import (
    FindItems,
    GetItem,
    ItemAsOf,
    ItemHistory,
    ItemRow,
    ItemState,
    RecordInvoice,
    SellStock,
)
from leftfold.domain import DomainError, DomainEvent, Err, Ok, Result
from leftfold.domain.items import ItemError, ItemNotFound


class Refused(DomainError):
    """A refusal."""


class Weigh(Command[Decimal, Refused]):
    """A command that answers itself."""

    async def execute(self) -> Result[Decimal, Refused]:
        return Ok(Decimal(1))


class Look(Query[list[str], Refused]):
    """A question."""


async def commands(bus: CommandBus, sale: SellStock, invoice: RecordInvoice) -> None:
    assert_type(await bus.dispatch(sale), Result[Receipt, ItemError | DispatchError])
    assert_type(await bus.dispatch(invoice), Result[Receipt, ItemError | DispatchError])
    assert_type(await bus.dispatch(Weigh()), Result[Decimal, Refused | DispatchError])
    assert_type(await Weigh().execute(), Result[Decimal, Refused])
    assert_type((await bus.dispatch(sale)).unwrap(), Receipt)


async def batches(bus: CommandBus, sales: list[SellStock]) -> None:
    assert_type(
        await bus.dispatch_all(sales), Result[tuple[Receipt, ...], ItemError | DispatchError]
    )


async def queries(bus: QueryBus, receipt: Receipt) -> None:
    assert_type(
        await bus.dispatch(GetItem(sku="A"), after=receipt),
        Result[ItemRow, ItemNotFound | DispatchError],
    )
    assert_type(await bus.dispatch(FindItems()), Result[Page[ItemRow], ItemError | DispatchError])
    assert_type(
        await bus.dispatch(ItemHistory(sku="A")),
        Result[tuple[DomainEvent, ...], ItemNotFound | DispatchError],
    )
    assert_type(
        await bus.dispatch(ItemAsOf(sku="A")), Result[ItemState, ItemNotFound | DispatchError]
    )
    assert_type(await bus.dispatch(Look()), Result[list[str], Refused | DispatchError])


async def errors(bus: CommandBus, sale: SellStock) -> None:
    match await bus.dispatch(sale):
        case Ok(receipt):
            assert_type(receipt, Receipt)
        case Err(error):
            assert_type(error, ItemError | DispatchError)


async def wrong_bus(commands: CommandBus, queries: QueryBus) -> None:
    await commands.dispatch(Look())  # type: ignore[arg-type]
    await queries.dispatch(Weigh())  # type: ignore[arg-type]


async def wrong_use(bus: CommandBus, sale: SellStock) -> str:
    receipt = (await bus.dispatch(sale)).unwrap()
    return receipt.position  # type: ignore[return-value]


def parsed(bus: CommandBus) -> None:
    match bus.parse("SellStock", {}):
        case Ok(command):
            assert_type(command, Command[Any, Any])
        case Err(error):
            assert_type(error, ValidationFailed)
