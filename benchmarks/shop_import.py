"""The import of a year of real sales on SQLite, against plain eventsourcing's events alone.

leftfold's side is `leftfold import`, its view `item_stock` included and caught up. Plain's side
reads the same file likewise (a first pass for the opening stock), keeps the same rules and facts,
and saves once an invoice run, with its aggregate cache on and fast-forward off; it has no view,
no command ids and no way to resume. Each runs as a process of its own. Memory is the largest
resident set of all processes at work together.

    python benchmarks/shop_import.py [FILE] [--postgresql] [--quick]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from _measure import QUICK, PlainItem, compare, plain_items, stores

from leftfold.infrastructure.retail import read_rows, survey
from leftfold.infrastructure.simulation import write_shop

REAL = Path(__file__).parents[1].parent / "shared" / "data" / "online_retail.csv.xz"


def import_plainly(path: Path, url: str) -> None:
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
    for _, run in groupby(read_rows(path), key=attrgetter("invoice")):
        items: dict[str, PlainItem] = {}
        for row in run:
            if row.kind in {"skipped", "odd"}:
                continue
            item = items.get(row.code)
            if item is None:
                items[row.code] = item = app.repository.get(PlainItem.create_id(row.code))
            quantity = abs(row.quantity)
            match row.kind:
                case "sale":
                    item.sell(
                        quantity, row.invoice, row.price, row.country, row.customer or None, row.at
                    )
                case "return":
                    item.take_back(
                        quantity, row.invoice, row.price, row.country, row.customer or None, row.at
                    )
                case "write_off":
                    item.write_off(quantity, row.description.strip(), row.at)
                case _:
                    item.receive(quantity, row.at)
        if items:
            app.save(*items.values())
    app.close()


def run(*command: str) -> int:
    """Run a process to its end; return the largest resident set of it and its children, in MiB."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, sum(map(resident, [process.pid, *children(process.pid)])))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        sys.exit(f"{command} ended with {code}")
    return peak // 1024


def resident(pid: int) -> int:
    """Return a process's resident set in KiB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0
    )


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return found


def main() -> None:
    kind = "postgresql" if "--postgresql" in sys.argv else "sqlite"
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    with tempfile.TemporaryDirectory() as folder, stores(kind) as new_store:
        path = Path(given[0]) if given else REAL
        if QUICK or not path.exists():
            path = Path(folder) / "shop.csv"
            write_shop(path, seed=1, days=1_000)
            print("a simulated shop, since --quick was given or the real sales are not there")
        peaks: list[int] = []

        def ours() -> None:
            command = ("-m", "leftfold.infrastructure.cli", "import", str(path), "--json")
            peaks.append(run(*command, "--store", new_store()))

        def plain() -> None:
            run(__file__, "--plain", str(path), new_store())

        compare(f"import, {kind}, view included", ours, plain, "3x" if kind == "sqlite" else "", 3)
        print(f"import, {kind}: {max(peaks)} MiB resident at most, all processes (target 300)")


if sys.argv[1:2] == ["--plain"]:
    import_plainly(Path(sys.argv[2]), sys.argv[3])
else:
    main()
