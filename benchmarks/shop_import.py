"""The import of a year of real sales on SQLite, against plain eventsourcing's events alone.

leftfold's side is `leftfold import`, its view `item_stock` included and caught up; it folds the
view in a second process. Plain's side is one process that reads the same file by the same reader,
with the same first pass for the opening stock, keeps the same rules and facts, and saves once an
invoice run, with its aggregate cache on, fast-forward off, and the library's default aggregate and
transcoder. It has no view, no command ids and no way to resume. Both end with as many events and
the same stock on hand, else that is said.

Memory is the sum of the largest resident sets of all processes of leftfold's side, which is never
less than the most that they held at one time; pages that they share count twice.

    python benchmarks/shop_import.py [FILE] [--store sqlite|postgresql] [--rounds N] [--quick]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from _measure import PlainItem, compare, plain_items, stores

from leftfold.infrastructure.retail import read_rows, survey
from leftfold.infrastructure.simulation import write_shop

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "online_retail.csv.xz"
MEMORY_TARGET = 300  # MiB
LOOK_EVERY = 0.1  # seconds between looks at the processes
MOVEMENTS = ("sales", "returns", "write_offs", "receipts")

Outcome = tuple[int, int]
"""Movements and stock on hand."""


class ImportFailedError(Exception):
    """A side did not finish."""


def import_plainly(path: Path, url: str) -> Outcome:
    found = survey(path)
    app = plain_items(url, AGGREGATE_CACHE_MAXSIZE="0", AGGREGATE_CACHE_FASTFORWARD="n")
    for sku, product in found.products.items():
        app.save(
            PlainItem(
                sku=sku,
                name=product.name or sku,
                unit_price=product.unit_price,
                opening_stock=product.opening_stock,
            )
        )
    movements = 0
    for _, run in groupby(read_rows(path), key=attrgetter("invoice")):
        items: dict[str, PlainItem] = {}
        for row in run:
            if row.kind in {"skipped", "odd"}:
                continue
            item = items.get(row.code)
            if item is None:
                items[row.code] = item = app.repository.get(PlainItem.create_id(row.code))
            movements += 1
            quantity, customer = abs(row.quantity), row.customer or None
            match row.kind:
                case "sale":
                    item.sell(quantity, row.invoice, row.price, row.country, customer, row.at)
                case "return":
                    item.take_back(quantity, row.invoice, row.price, row.country, customer, row.at)
                case "write_off":
                    item.write_off(quantity, row.description.strip(), row.at)
                case _:
                    item.receive(quantity, row.at)
        if items:
            app.save(*items.values())
    ids = [PlainItem.create_id(sku) for sku in found.products]
    on_hand = sum(app.repository.get(i, deepcopy_from_cache=False).on_hand for i in ids)
    app.close()
    return movements, on_hand


def run(*command: str) -> tuple[str, float | None]:
    """Run a process to its end; return its output, and its and its children's memory in MiB.

    The memory is None on systems that do not tell. Raises `ImportFailedError`.
    """
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        peaks: dict[int, int] = {}
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                for pid in (process.pid, *children(process.pid)):
                    peaks[pid] = max(peaks.get(pid, 0), largest_resident(pid))
                done.wait(LOOK_EVERY)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            output, _ = process.communicate()
        finally:
            done.set()
            watcher.join()
        if process.returncode:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise ImportFailedError(f"{' '.join(command[:3])} … ended {process.returncode}: {last}")
    return output, sum(peaks.values()) / 1024 or None


def largest_resident(pid: int) -> int:
    """Return the most that a process ever held, in KiB; 0 if the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def children(pid: int) -> list[int]:
    """Return the processes below one."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            direct = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in direct:
            found += [child, *children(child)]
    return found


def measure(path: Path, kind: str, rounds: int) -> None:
    memory: list[float | None] = []
    outcomes: dict[str, Outcome] = {}

    with stores(kind) as new_store:

        def ours() -> None:
            command = ("-m", "leftfold.infrastructure.cli", "import", str(path), "--json")
            output, peak = run(*command, "--store", new_store())
            memory.append(peak)
            summary = json.loads(output)
            movements = sum(summary[name] for name in MOVEMENTS)
            outcomes["leftfold"] = movements, summary["on_hand"]

        def plain() -> None:
            output, _ = run(__file__, "--plain", new_store(), str(path))
            movements, on_hand = json.loads(output)
            outcomes["plain"] = movements, on_hand

        target = {"sqlite": "4x", "postgresql": "5x"}[kind]
        compare(f"import, {kind}, view included", ours, plain, target, rounds=rounds)
    known = [peak for peak in memory if peak is not None]
    if known:
        print(
            f"import, {kind}: {max(known):.0f} MiB resident at most, all processes together, "
            f"{max(known) / MEMORY_TARGET:.2f} of the target (target {MEMORY_TARGET} MiB)"
        )
    else:
        print(f"import, {kind}: memory not measured, for want of /proc")
    if outcomes["leftfold"] != outcomes["plain"]:
        print(f"NOT COMPARABLE: movements and stock on hand differ: {outcomes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=REAL)
    parser.add_argument("--store", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small simulated shop")
    parser.add_argument("--plain", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        print(json.dumps(import_plainly(options.file, options.plain)))
        return
    with tempfile.TemporaryDirectory(prefix="leftfold-") as folder:
        path: Path = options.file
        if options.quick or not path.exists():
            why = "--quick was given" if options.quick else f"there is no {path}"
            print(f"a simulated shop, since {why}")
            path = Path(folder) / "shop.csv"
            write_shop(path, seed=1, days=200 if options.quick else 2_000)
        try:
            measure(path, options.store, options.rounds)
        except ImportFailedError as error:
            print(f"import, {options.store}: not measured: {error}")


if __name__ == "__main__":
    main()
