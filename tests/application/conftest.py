from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from threading import Event
from typing import Any
from uuid import UUID

import pytest

from leftfold.application import CommandBus, EventMapper, Handling, Middleware
from leftfold.application.execution import Execution
from leftfold.application.items import InvoiceLine, Items, RecordInvoice, RegisterItem, SellStock
from leftfold.application.ports import Failed, Group, Verdict
from leftfold.domain.items import Item
from leftfold.infrastructure.access import StoreAccess
from leftfold.infrastructure.platform import SystemPlatform
from leftfold.infrastructure.stores import SharedLog
from leftfold.infrastructure.stores.memory import MemoryLog


@pytest.fixture
def anyio_backend():
    return "asyncio"


class FarLog(MemoryLog):
    """A log that other processes may write, too."""

    is_local = False


class DoubtfulLog(FarLog):
    """Commits, and says that it does not know."""

    def commit(self, groups: Sequence[Group]) -> list[Verdict]:
        super().commit(groups)
        return [Failed("connection lost", in_doubt=True)] * len(groups)


class SlowLog(FarLog):
    """Commits in a thread, when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_commit = Event()
        self.may_commit.set()

    def commit(self, groups: Sequence[Group]) -> list[Verdict]:
        self.may_commit.wait(10)
        return super().commit(groups)


class OvertakenLog(FarLog):
    """Loses the next groups on their way, and meanwhile somebody else commits."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], object] | None = None

    def commit(self, groups: Sequence[Group]) -> list[Verdict]:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is None:
            return super().commit(groups)
        meanwhile()
        return [Failed("connection lost", in_doubt=True)] * len(groups)


class Shop:
    """A command bus on a log, wired by hand."""

    def __init__(self, log: MemoryLog, *middleware: Middleware) -> None:
        self.log = log
        self.platform = SystemPlatform()
        self.mapper = EventMapper.of(Item)(transcoder=None)
        self.commits = 0
        self.service = Items(store=SharedLog(log))
        self.repository = self.service.repository
        self.execution = Execution(
            log,
            self.mapper,
            self.platform,
            StoreAccess(log, self.platform),
            memory=100,
            committed=self._committed,
        )
        self.bus = CommandBus(middleware, self.execution)
        self.bus.add(*self.service.handlers())

    def _committed(self) -> None:
        self.commits += 1

    def add(self, *handlings: Handling) -> None:
        self.bus.add(*handlings)

    async def register(self, *skus: str, stock: int = 10) -> None:
        for sku in skus:
            (await self.bus.dispatch(register(sku, stock))).unwrap()

    def stored(self, sku: str) -> Any:
        """Return the item as the log has it."""
        aggregate_id = Item.id_of(sku)
        return Item.fold(self.mapper.decode_all(self.log.streams([aggregate_id])[aggregate_id]))

    def on_hand(self, sku: str) -> int:
        found: int = self.stored(sku).on_hand
        return found


def register(sku: str = "A", stock: int = 10) -> RegisterItem:
    return RegisterItem(sku=sku, name="Cup", unit_price=Decimal("2.55"), opening_stock=stock)


def sell(sku: str = "A", quantity: int = 1) -> SellStock:
    return SellStock(sku=sku, quantity=quantity, invoice="536365")


def invoice(*sales: tuple[str, int]) -> RecordInvoice:
    lines = tuple(InvoiceLine(kind="sale", sku=sku, quantity=q) for sku, q in sales)
    return RecordInvoice(invoice="536365", lines=lines)


@contextmanager
def opened(log: MemoryLog, *middleware: Middleware) -> Iterator[Shop]:
    shop = Shop(log, *middleware)
    yield shop
    shop.platform.close()


@pytest.fixture(name="register")
def register_fixture():
    return register


@pytest.fixture(name="sell")
def sell_fixture():
    return sell


@pytest.fixture(name="invoice")
def invoice_fixture():
    return invoice


@pytest.fixture
def shop():
    with opened(MemoryLog()) as shop:
        yield shop


@pytest.fixture(name="opened")
def opened_fixture():
    return lambda *middleware: opened(MemoryLog(), *middleware)


@pytest.fixture
def doubtful():
    with opened(DoubtfulLog()) as shop:
        yield shop


@pytest.fixture
def shops():
    """Two buses on one log that is not local, as two processes have them."""
    log = FarLog()
    with opened(log) as one, opened(log) as other:
        yield one, other


@pytest.fixture
def slow_shop():
    """A bus whose log waits for an event before it commits."""
    log = SlowLog()
    with opened(log) as shop:
        yield shop, log.may_commit


@pytest.fixture
def overtaken():
    """A bus whose log loses groups, and another on the same log."""
    log = OvertakenLog()
    with opened(log) as one, opened(log) as other:
        yield one, other


@pytest.fixture
def ids():
    return [UUID(int=n) for n in range(1, 9)]
