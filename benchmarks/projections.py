"""Projections: how fast a view catches up with a log, against plain eventsourcing's own runner.

Both sides have a log of 20,000 events, of the same kinds in the same order, and a view with a row
for each item: its name, stock, units sold and revenue. "One event a row" is 20,000 items that are
registered. "Four events a row" is 5,000 items, each registered and then sold three times; 100
items are written together, so that an item's events are near each other. A side's time is from
opening its store, the view's tables not made yet, until the view has seen the last event. Then
what it holds is compared with what was written.

Plain eventsourcing upserts a row and records the position in one transaction, once an event, at
the library's own durability. On PostgreSQL that is its `ProjectionRunner` with a tracking
recorder; its pipeline mode would be slower. Its recorder for SQLite has no subscriptions: there it
is a `Follower` with a process recorder, which pulls sections of 500 notifications instead of 10. A
`ProjectionRunner` on a subscription of one's own would be slower.

"Four views" is a rebuild of four views of items from a year of real sales, in a process of its
own, against a rebuild of one of them. Its memory is the largest resident set of that process and
of those it starts.

    python benchmarks/projections.py [FILE] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

from _measure import PRICE, QUICK, WHEN, PlainItem, PlainItems, plain_items, plain_settings, stores
from eventsourcing import projection as library
from eventsourcing.application import ProcessingEvent
from eventsourcing.persistence import Tracking
from eventsourcing.postgres import PostgresTrackingRecorder
from eventsourcing.sqlite import SQLiteProcessRecorder
from eventsourcing.system import Follower
from psycopg.sql import SQL
from shop_import import MEMORY_TARGET, REAL, ImportFailedError, run

from leftfold.application import Model, Projection
from leftfold.application.items import ItemRow, RegisterItem, SellStock, item_model, item_stock
from leftfold.domain import ALWAYS, Specification, attr
from leftfold.domain.items import ItemRegistered, StockSold
from leftfold.infrastructure import Runtime, Settings
from leftfold.infrastructure.simulation import write_shop

EVENTS = 2_000 if QUICK else 20_000
TOGETHER = 100  # items that are written together
SALES = 3  # of each item that is sold: four events with its registration
SECTION = 500  # notifications, as many as the library's subscriptions pull
STOCK = 100
ROUNDS, REBUILDS = (2, 2) if QUICK else (5, 3)
PATIENCE = 600.0  # seconds
TARGETS = {"sqlite": ("25x", "50x"), "postgresql": ("35x", "60x")}
COLUMNS = "sku TEXT, name TEXT, on_hand BIGINT, units_sold BIGINT, revenue {}"
UPSERT = (
    "INSERT INTO {table} VALUES ({marks}) ON CONFLICT (key) DO UPDATE SET "
    "on_hand = {table}.on_hand + excluded.on_hand, "
    "units_sold = {table}.units_sold + excluded.units_sold, "
    "revenue = {table}.revenue + excluded.revenue"
)
VIEWS: dict[str, Specification[Any]] = {
    "items": ALWAYS,
    "sold_out": attr("on_hand") == 0,
    "bestsellers": attr("units_sold") >= 1_000,
    "losses": attr("units_written_off") > 0,
}
FOUR_TARGET = 2  # times one view

Turn = Callable[[], float]
"""Catches up with the log by a new view; returns the seconds."""


@dataclass(frozen=True)
class Work:
    """What is in a log."""

    items: int
    sales: int
    """Of each item, one piece each."""

    def batches(self) -> Iterator[range]:
        for begin in range(0, self.items, TOGETHER):
            yield range(begin, min(begin + TOGETHER, self.items))

    def check(self, url: str, table: str) -> None:
        """Raise `ValueError` if a view does not hold it."""
        units = self.items * self.sales
        expected = self.items, self.items * STOCK - units, units
        found = tuple(map(int, totals(url, table)))
        if found != expected:
            msg = f"{table} holds {found}, {expected} were written"
            raise ValueError(msg)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=REAL)
    parser.add_argument("--quick", action="store_true", help="a short log, a small simulated shop")
    parser.add_argument("--fold", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fold:
        url, views, version = options.fold
        model = replace(item_model, projections=item_views(int(views), int(version)))
        print(json.dumps(asyncio.run(catch_up(model, url))))
        return
    for kind, (one, four) in TARGETS.items():
        with stores(kind) as new_store:
            compare(f"one event a row, {kind}", new_store, Work(EVENTS, 0), one)
            work = Work(EVENTS // (1 + SALES), SALES)
            compare(f"four events a row, {kind}", new_store, work, four)
    with sales_file(options.file) as path:
        for kind in TARGETS:
            with stores(kind) as new_store:
                try:
                    rebuild(path, kind, new_store())
                except ImportFailedError as error:
                    print(f"four views, {kind}: not measured: {error}")


def compare(name: str, new_store: Callable[[], str], work: Work, target: str) -> None:
    """Print how many times faster than plain's our view catches up."""
    with plain_side(new_store(), work) as plain, our_side(new_store(), work) as ours:
        ratios = ratios_of(plain, ours, ROUNDS)
    print(f"{name}: {told(ratios, target)}", flush=True)


def ratios_of(above: Turn, below: Turn, rounds: int) -> list[float]:
    """Return the ratio of each round; who begins changes from round to round."""
    ratios = []
    for number in range(rounds):
        took = {}
        for turn in (above, below) if number % 2 == 0 else (below, above):
            gc.collect()
            took[turn] = turn()
        ratios.append(took[above] / took[below])
    return ratios


def told(ratios: Sequence[float], target: str) -> str:
    shown = " ".join(f"{ratio:.1f}" for ratio in ratios)
    return f"{statistics.median(ratios):.1f}x (target {target}) [rounds: {shown}]"


def totals(url: str, table: str) -> tuple[Any, ...]:
    """Return a view's number of rows, and its pieces on hand and sold."""
    query = f'SELECT count(*), sum(on_hand), sum(units_sold) FROM "{table}"'
    if url.startswith("sqlite:///"):
        connection: Any = sqlite3.connect(url.removeprefix("sqlite:///"))
    else:
        import psycopg

        connection = psycopg.connect(url)
    with closing(connection):
        found: tuple[Any, ...] = connection.execute(query).fetchone()
        return found


# leftfold -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stock:
    sku: str
    name: str
    on_hand: int
    units_sold: int
    revenue: Decimal


def stock_view(version: int) -> Projection[Stock]:
    view = Projection("stock", version=version, row=Stock)

    @view.on(ItemRegistered)
    def registered(_: Stock | None, event: ItemRegistered) -> Stock:
        return Stock(event.sku, event.name, event.opening_stock, 0, Decimal(0))

    @view.on(StockSold)
    def sold(row: Stock | None, event: StockSold) -> Stock:
        assert row is not None
        return Stock(
            row.sku,
            row.name,
            row.on_hand - event.quantity,
            row.units_sold + event.quantity,
            row.revenue + event.quantity * event.unit_price,
        )

    return view


@contextmanager
def our_side(url: str, work: Work) -> Iterator[Turn]:
    asyncio.run(write(url, work))
    versions = count(1)

    def turn() -> float:
        view = stock_view(next(versions))
        took = asyncio.run(catch_up(replace(item_model, projections=(view,)), url))
        work.check(url, view.table)
        return took

    yield turn


async def write(url: str, work: Work) -> None:
    model = replace(item_model, projections=())
    async with Runtime(model, settings=Settings(store=url, follow=False)) as shop:
        for batch in work.batches():
            registered = [
                RegisterItem(sku=f"S{n}", name="LANTERN", unit_price=PRICE, opening_stock=STOCK)
                for n in batch
            ]
            sold = [sale(f"S{n}") for _ in range(work.sales) for n in batch]
            (await shop.commands.dispatch_all([*registered, *sold])).unwrap()


def sale(sku: str) -> SellStock:
    return SellStock(
        sku=sku, quantity=1, invoice="2", unit_price=PRICE, country="France", occurred_at=WHEN
    )


async def catch_up(model: Model, url: str) -> float:
    begun = time.perf_counter()
    async with Runtime(model, url) as shop:
        (await shop.catch_up(PATIENCE)).unwrap()
        return time.perf_counter() - begun


# Plain eventsourcing --------------------------------------------------------------------------


class PlainLog(PlainItems):
    """The plain application, whose log lends sections that large."""

    name = "PlainItems"
    log_section_size = SECTION


def change(event: Any) -> tuple[str, str, str, int, int, Decimal]:
    """Return the row that an event adds, or adds to the one that is there."""
    key = event.originator_id.hex
    if isinstance(event, PlainItem.Registered):
        return key, event.sku, event.name, event.opening_stock, 0, Decimal(0)
    quantity: int = event.quantity
    return key, "", "", -quantity, quantity, quantity * event.unit_price


class PostgresStock(PostgresTrackingRecorder):
    table: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        columns = COLUMNS.format("NUMERIC")
        key = 'key TEXT COLLATE "C" PRIMARY KEY'  # as leftfold's
        create = f"CREATE TABLE IF NOT EXISTS {self.table} ({key}, {columns})"
        self.sql_create_statements.append(SQL(create).format())
        self.upsert = UPSERT.format(table=self.table, marks=", ".join(["%s"] * 6)).encode()

    def apply(self, event: Any, tracking: Tracking) -> None:
        with self.datastore.transaction(commit=True) as cursor:
            cursor.execute(self.upsert, change(event), prepare=True)
            self._insert_tracking(cursor, tracking)


class PostgresView(library.Projection[PostgresStock]):
    ended = 0.0

    def process_event(self, domain_event: Any, tracking: Tracking) -> None:
        self.view.apply(domain_event, tracking)
        self.ended = time.perf_counter()  # the runner would look for it every 0.8 s


class SQLiteStock(SQLiteProcessRecorder):
    table: ClassVar[str]

    def construct_create_table_statements(self) -> list[str]:
        self.upsert = UPSERT.format(table=self.table, marks=", ".join("?" * 6))
        key, columns = "key TEXT PRIMARY KEY", COLUMNS.format("REAL")
        create = f"CREATE TABLE IF NOT EXISTS {self.table} ({key}, {columns}) WITHOUT ROWID"
        return [*super().construct_create_table_statements(), create]

    def _insert_events(self, c: Any, stored_events: Any, **kwargs: Any) -> Any:
        *values, revenue = kwargs["change"]
        c.execute(self.upsert, (*values, float(revenue)))
        return super()._insert_events(c, stored_events, **kwargs)


class SQLiteView(Follower[UUID]):
    recorder_class: ClassVar[type[SQLiteStock]]
    pull_section_size = SECTION

    def construct_recorder(self) -> SQLiteStock:
        recorder = self.recorder_class(self.factory.datastore)
        recorder.create_table()
        return recorder

    def policy(self, domain_event: Any, processing_event: ProcessingEvent[UUID]) -> None:
        processing_event.collect_events(change=change(domain_event))


@contextmanager
def plain_side(url: str, work: Work) -> Iterator[Turn]:
    with closing(plain_items(url)) as plain:
        write_plainly(plain, work)
    catch_up_plainly = follow_plainly if url.startswith("sqlite:///") else run_plainly
    numbers = count(1)

    def turn() -> float:
        table = f"stock_{next(numbers)}"
        took = catch_up_plainly(url, table)
        work.check(url, table)
        return took

    yield turn


def write_plainly(plain: PlainItems, work: Work) -> None:
    for batch in work.batches():
        items = [
            PlainItem(sku=f"S{n}", name="LANTERN", unit_price=PRICE, opening_stock=STOCK)
            for n in batch
        ]
        plain.save(*items)
        for _ in range(work.sales):
            for item in items:
                item.sell(1, "2", PRICE, "France", None, WHEN)
            plain.save(*items)


def run_plainly(url: str, table: str) -> float:
    """Catch up on PostgreSQL; return the seconds."""
    begun = time.perf_counter()
    with library.ProjectionRunner(
        application_class=PlainLog,
        projection_class=type(table, (PostgresView,), {}),
        view_class=type("View", (PostgresStock,), {"table": table}),
        env=plain_settings(url),
    ) as runner:
        runner.wait(runner.app.recorder.max_notification_id(), PATIENCE)
        return runner.projection.ended - begun


def follow_plainly(url: str, table: str) -> float:
    """Catch up on SQLite; return the seconds."""
    recorder = type("Recorder", (SQLiteStock,), {"table": table})
    begun = time.perf_counter()
    with (
        closing(PlainLog(env=plain_settings(url))) as plain,
        closing(
            type("View", (SQLiteView,), {"recorder_class": recorder})(plain_settings(url))
        ) as view,
    ):
        view.follow(table, plain.notification_log)  # by a name of its own, from the beginning
        view.pull_and_process(table)
        return time.perf_counter() - begun


# Rebuild --------------------------------------------------------------------------------------


@contextmanager
def sales_file(path: Path) -> Iterator[Path]:
    """Lend the real sales, or those of a simulated shop."""
    if path.exists() and not QUICK:
        yield path
        return
    print(f"a simulated shop, since {'--quick was given' if QUICK else f'there is no {path}'}")
    with tempfile.TemporaryDirectory(prefix="leftfold-") as folder:
        simulated = Path(folder) / "shop.csv"
        write_shop(simulated, seed=1, days=200 if QUICK else 2_000)
        yield simulated


def item_views(number: int, version: int) -> tuple[Projection[ItemRow], ...]:
    """Return the first views of items, as many as are wanted."""
    return tuple(
        item_stock.derive(name, version=version, specification=specification)
        for name, specification in list(VIEWS.items())[:number]
    )


def rebuild(path: Path, kind: str, url: str) -> None:
    """Print how much longer four views take than one, and how much memory they need."""
    run("-m", "leftfold.infrastructure.cli", "import", str(path), "--json", "--store", url)
    versions = count(1)
    peaks: list[float | None] = []

    def fold(views: int) -> float:
        output, peak = run(__file__, "--fold", url, str(views), str(next(versions)))
        if views > 1:
            peaks.append(peak)
        return float(json.loads(output))

    ratios = ratios_of(lambda: fold(len(VIEWS)), lambda: fold(1), REBUILDS)
    print(f"four views against one, {kind}: {told(ratios, f'below {FOUR_TARGET}x')}", flush=True)
    known = [peak for peak in peaks if peak is not None]
    if known:
        print(
            f"four views, {kind}: {max(known):.0f} MiB resident at most, "
            f"{max(known) / MEMORY_TARGET:.2f} of the target (target {MEMORY_TARGET} MiB)"
        )
    else:
        print(f"four views, {kind}: memory not measured, for want of /proc")


if __name__ == "__main__":
    main()
