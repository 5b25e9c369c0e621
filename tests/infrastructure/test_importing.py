"""Importing sales: exact sums, once only, killed at any point, on the real file where it is."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import pytest

from leftfold.application.items import (
    Count,
    FindItems,
    GetItem,
    ItemHistory,
    ItemRow,
    best_sellers,
    daily_sales,
    item_model,
    item_stock,
    low_stock,
)
from leftfold.domain import Specification
from leftfold.domain.items import Item
from leftfold.infrastructure import importing
from leftfold.infrastructure.importing import import_sales
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.retail import DamagedFileError, read_rows
from leftfold.infrastructure.simulation import write_shop

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "online_retail.csv.xz"
REAL_SUMMARY = {
    "rows": 541_909,
    "sales": 527_792,
    "returns": 8_704,
    "write_offs": 1_336,
    "receipts": 1_165,
    "skipped": 2_912,
    "items": 4_059,
    "units_sold": 5_577_136,
    "units_returned": 272_030,
    "units_written_off": 206_957,
    "units_received": 68_095,
    "opening_stock": 5_630_832,
    "on_hand": 186_864,
    "revenue": Decimal("9793394.693"),
}


@pytest.fixture
def shop(tmp_path):
    path = tmp_path / "shop.csv"
    write_shop(path, seed=7, days=30)
    return path


async def imported(url, path):
    async with open_items(url) as runtime:
        summary = await import_sales(runtime, path)
        rows = (await runtime.queries.dispatch(FindItems(limit=10_000))).unwrap().rows
        return summary, rows


def sums(summary):
    return {name: getattr(summary, name) for name in REAL_SUMMARY}


def test_the_view_holds_what_a_plain_sum_of_the_file_gives(store_url, shop):
    sold, revenue = defaultdict(int), defaultdict(Decimal)
    for row in read_rows(shop):
        if row.kind in {"sale", "return"}:
            sold[row.code] += row.quantity if row.kind == "sale" else 0
            revenue[row.code] += row.quantity * row.price
    _, rows = asyncio.run(imported(store_url, shop))
    assert {row.sku: row.units_sold for row in rows if row.units_sold} == {
        sku: units for sku, units in sold.items() if units
    }
    assert {row.sku: row.revenue for row in rows if row.revenue} == {
        sku: amount for sku, amount in revenue.items() if amount
    }


def test_the_stock_adds_up(store_url, shop):
    s, rows = asyncio.run(imported(store_url, shop))
    moved = s.units_received + s.units_returned - s.units_sold - s.units_written_off
    assert s.on_hand == s.opening_stock + moved
    assert all(row.on_hand >= 0 for row in rows)


def test_a_finished_import_run_twice_changes_nothing(shared_url, shop):
    first, rows = asyncio.run(imported(shared_url, shop))
    second, rows_again = asyncio.run(imported(shared_url, shop))
    assert second == first
    assert rows_again == rows


def test_a_row_is_one_event_with_the_invoices_time(shop):
    async def run():
        async with open_items("memory:") as runtime:
            await import_sales(runtime, shop)
            sku = next(row.code for row in read_rows(shop) if row.kind == "sale")
            history = (await runtime.queries.dispatch(ItemHistory(sku=sku))).unwrap()
            return sku, history

    sku, history = asyncio.run(run())
    rows = [row for row in read_rows(shop) if row.code == sku and row.kind != "odd"]
    assert [e.payload["occurred_at"] for e in history[1:]] == [row.at for row in rows]


async def histories(shop):
    async with open_items("memory:") as runtime:
        await import_sales(runtime, shop)
        skus = {row.code for row in read_rows(shop) if row.kind == "sale"}
        return [(await runtime.queries.dispatch(ItemHistory(sku=sku))).unwrap() for sku in skus]


def test_all_events_of_an_import_belong_together(shop):
    events = [event for history in asyncio.run(histories(shop)) for event in history]
    (correlation_id,) = {event.metadata.correlation_id for event in events}
    assert correlation_id.startswith("import:")
    assert len({event.metadata.causation_id for event in events}) > 1


def test_the_ids_of_its_commands_are_in_the_files_order(shop):
    for _, *moved in asyncio.run(histories(shop)):
        ids = [UUID(event.metadata.causation_id) for event in moved]
        assert ids == sorted(ids)
        assert {command_id.version for command_id in ids} == {8}


def test_a_damaged_file_writes_nothing(tmp_path, shop):
    shop.write_text(shop.read_text() + "1,85123A,x,none,2010-12-01 08:26,1,,UK\n")

    async def run():
        async with open_items(f"sqlite:///{tmp_path}/shop.db") as runtime:
            with pytest.raises(DamagedFileError):
                await import_sales(runtime, shop)
            return (await runtime.queries.dispatch(FindItems())).unwrap().rows

    assert asyncio.run(run()) == ()


def test_what_was_surveyed_is_imported_whatever_becomes_of_the_file(tmp_path, shop):
    def truncate(doing, *_):
        if doing == "importing":
            shop.write_text("gone")

    async def run():
        async with open_items("memory:") as runtime:
            return await import_sales(runtime, shop, truncate)

    rows = len(shop.read_text().splitlines()) - 1
    summary = asyncio.run(run())
    moved = summary.sales + summary.returns + summary.write_offs + summary.receipts
    assert (summary.rows, summary.on_hand >= 0, moved > 0) == (rows, True, True)
    assert shop.read_text() == "gone"


def test_others_go_on_while_rows_are_read_that_are_no_movements(shop, monkeypatch):
    monkeypatch.setattr(importing, "BREATH", 0.0)
    turns = 0

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def run():
        async with open_items("memory:") as runtime:
            beside = asyncio.ensure_future(others())
            reading = importing._Import(runtime, shop, lambda *_: None)
            batch = await reading._read((number, "POST", []) for number in range(500))
            beside.cancel()
            return batch

    assert not asyncio.run(run()).commands
    assert turns >= 500


def test_an_invoice_that_the_shop_refuses_is_told_and_the_rest_goes_on(tmp_path):
    header = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country"
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    line = "{},85123A,HEART,{},2010-12-01 08:26,{},17850,France\n"
    first.write_text(f"{header}\n" + line.format(1, 5, "2.55"))
    # The item is registered by the first file with a stock of 5, all of which is sold.
    second.write_text(
        f"{header}\n"
        + line.format(2, 3, "0")
        + line.format(3, 9, "2.55")
        + line.format(4, 2, "2.55")
    )

    async def run():
        async with open_items("memory:") as runtime:
            await import_sales(runtime, first)
            summary = await import_sales(runtime, second)
            return summary, (await runtime.queries.dispatch(GetItem(sku="85123A"))).unwrap()

    summary, row = asyncio.run(run())
    assert [(r.invoice, r.line) for r in summary.refused] == [("3", 3)]
    assert (row.on_hand, row.units_sold, row.units_received) == (1, 7, 3)


def start_import(path, url):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "leftfold.infrastructure.cli",
            "import",
            str(path),
            "--store",
            url,
            "--json",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
def test_an_import_that_is_killed_again_and_again_ends_the_same(tmp_path):
    shop = tmp_path / "shop.csv"
    write_shop(shop, seed=3, days=400)
    expected, expected_rows = asyncio.run(imported("memory:", shop))
    url = f"sqlite:///{tmp_path}/shop.db"
    kills = 0
    for wait in (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2):
        process = start_import(shop, url)
        time.sleep(wait)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert kills
    summary, rows = asyncio.run(imported(url, shop))
    assert sums(summary) == sums(expected)
    assert rows == expected_rows


@pytest.mark.long
def test_sigterm_ends_an_import_between_two_transactions(tmp_path):
    shop = tmp_path / "shop.csv"
    write_shop(shop, seed=4, days=1_000)
    url = f"sqlite:///{tmp_path}/shop.db"
    process = start_import(shop, url)
    deadline = time.monotonic() + 20
    while not (tmp_path / "shop.db-wal").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.terminate()
    _, complaint = process.communicate(timeout=30)
    assert process.returncode in {1, -signal.SIGTERM}, complaint
    assert "Traceback" not in complaint
    expected, _ = asyncio.run(imported("memory:", shop))
    summary, _ = asyncio.run(imported(url, shop))
    assert sums(summary) == sums(expected)


@pytest.mark.long
@pytest.mark.skipif(not REAL.exists(), reason="the real sales are not beside the checkout")
def test_the_real_sales_are_imported_exactly(shared_url):
    process = start_import(REAL, shared_url)
    try:
        output, complaint = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, complaint
    summary = json.loads(output)
    found = {name: summary[name] for name in REAL_SUMMARY} | {
        "revenue": Decimal(summary["revenue"])
    }
    assert found == REAL_SUMMARY

    async def ask():
        async with open_items(shared_url) as runtime:
            (await runtime.catch_up(60)).unwrap()
            row = (await runtime.queries.dispatch(GetItem(sku="22423"))).unwrap()
            rows = (await runtime.queries.dispatch(FindItems(limit=10_000))).unwrap().rows
            counted = [
                (await runtime.queries.dispatch(Count(where=where))).unwrap()
                for where, _ in documented_questions()
            ]
            snapshots = runtime._store.log.snapshots([Item.id_of("22423")])
            views = runtime._store.views
            shown = {view: dict(views.select(view, None, None)) for view in item_model.projections}
            rebuilt = [await runtime.rebuild(view.name) for view in item_model.projections]
            return row, rows, counted, snapshots, shown, rebuilt

    row, rows, counted, snapshots, shown, rebuilt = asyncio.run(ask())
    stock = shown[item_stock]
    for view in (low_stock, best_sellers):
        assert shown[view] == {key: r for key, r in stock.items() if view.shows(r)}
    assert (len(shown[best_sellers]), len(shown[low_stock]) > 0) == (215, True)
    by_day = sum(day.revenue for day in shown[daily_sales].values())
    assert by_day == REAL_SUMMARY["revenue"] == sum(r.revenue for r in stock.values())
    for view, compared in zip(item_model.projections, rebuilt, strict=True):
        assert compared.same >= len(shown[view])
        assert (compared.changed, compared.added, compared.removed) == (0, 0, 0)
    assert [snapshot.version >= 2_000 for snapshot in snapshots] == [True]
    assert (row.units_sold, row.units_returned, row.revenue) == (13_879, 857, Decimal("164762.19"))
    in_python = [
        sum(map(where.bind(ItemRow).is_satisfied_by, rows)) for where, _ in documented_questions()
    ]
    assert counted == in_python == [answer for _, answer in documented_questions()]


def documented_questions():
    """The specifications of docs/questions.md, each with the number of items that satisfy it."""
    page = Path(__file__).parents[2] / "docs" / "questions.md"
    lines = [line.split("|")[2:4] for line in page.read_text().splitlines() if "? | `" in line]
    assert len(lines) >= 12
    return [(Specification.parse(said.strip(" `")), int(count)) for said, count in lines]
