"""Specifications: in Python against a function written by hand and another library, in SQL by hand.

- Five comparisons on one object, against a function of the same logic, which minds `None` too.
- Filtering 100,000 rows, against fractal-specifications 3.5 with the same five comparisons; it
  raises on `None`, so that the rows have none.
- Pages of 50 of a view of 1,000,000 rows, found by an indexed comparison through a runtime's views,
  against the same SQL by hand through the same driver in the same kind of thread, decoded into the
  same rows.

A ratio above 1 means that leftfold is the slower one where the target is "at most", and the faster
one where it is "at least".

    python benchmarks/specifications.py [--quick]
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from _measure import QUICK, stores
from fractal_specifications.generic.operators import (
    EqualsSpecification,
    GreaterThanEqualSpecification,
    LessThanSpecification,
    NotEqualsSpecification,
)

from leftfold.application import Model, Projection
from leftfold.application.checkpoints import Change
from leftfold.domain import attr
from leftfold.infrastructure import Runtime, Settings
from leftfold.infrastructure.views import FollowedViews

ROUNDS = 3 if QUICK else 9
FILTERED = 10_000 if QUICK else 100_000
STORED = 20_000 if QUICK else 1_000_000
PAGES = 20 if QUICK else 100


@dataclass(frozen=True, slots=True)
class Row:
    sku: str | None
    name: str | None
    unit_price: Decimal | None
    on_hand: int | None
    reorder_level: int | None


PRICE = Decimal("2.5")
spec = (
    (attr("on_hand") < 80)
    & (attr("unit_price") >= PRICE)
    & (attr("sku") != "S7")
    & (attr("reorder_level") >= 1)
    & (attr("name") == "LANTERN")
)


def by_hand(row: Row) -> bool:
    return (
        (row.on_hand is not None and row.on_hand < 80)
        and (row.unit_price is not None and row.unit_price >= PRICE)
        and row.sku != "S7"
        and (row.reorder_level is not None and row.reorder_level >= 1)
        and row.name == "LANTERN"
    )


fractal = (
    LessThanSpecification("on_hand", 80)
    & GreaterThanEqualSpecification("unit_price", PRICE)
    & NotEqualsSpecification("sku", "S7")
    & GreaterThanEqualSpecification("reorder_level", 1)
    & EqualsSpecification("name", "LANTERN")
)


def main() -> None:
    in_python()
    for kind in ("sqlite", "postgresql"):
        with stores(kind) as new_store:
            asyncio.run(in_sql(kind, new_store()))


def in_python() -> None:
    row = Row("S1", "LANTERN", Decimal("2.55"), 10, 20)
    assert spec.is_satisfied_by(row)
    assert by_hand(row)
    satisfied = spec.is_satisfied_by

    def ours() -> None:
        for _ in range(100_000):
            satisfied(row)

    def hand() -> None:
        for _ in range(100_000):
            by_hand(row)

    tell("five comparisons, slower than by hand", ours, hand, "at most 1.3x")
    chance = random.Random(1)
    rows = [
        Row(
            f"S{chance.randrange(10)}",
            chance.choice(["LANTERN", "HEART"]),
            Decimal(chance.randrange(1, 500)) / 100,
            chance.randrange(100),
            chance.randrange(3),
        )
        for _ in range(FILTERED)
    ]
    expected = [r for r in rows if by_hand(r)]
    assert [r for r in rows if spec.is_satisfied_by(r)] == expected
    assert [r for r in rows if fractal.is_satisfied_by(r)] == expected
    tell(
        f"filtering {FILTERED:,} rows, faster than fractal-specifications",
        lambda: [r for r in rows if fractal.is_satisfied_by(r)],
        lambda: [r for r in rows if spec.is_satisfied_by(r)],
        "at least 3x",
    )


stock = Projection("stock", version=1, row=Row, indexes=["on_hand"])


async def in_sql(kind: str, url: str) -> None:
    async with Runtime(
        Model(aggregates=(), projections=(stock,)), settings=Settings(store=url)
    ) as runtime:
        views = runtime._store.views
        chance = random.Random(2)
        for begin in range(0, STORED, 20_000):
            rows = {
                f"{number:08}": Row(
                    f"S{number}", "LANTERN", PRICE, chance.randrange(STORED), number % 7
                )
                for number in range(begin, begin + 20_000)
            }
            (at,) = views.checkpoints([stock])
            assert views.write([Change(stock, at, rows)], at.position)
        reader = FollowedViews(
            runtime._store, runtime._opened.follower, runtime._opened.access, 5.0
        )
        wanted = [chance.randrange(STORED) for _ in range(PAGES)]
        table: Any = views.table(stock)  # type: ignore[attr-defined]  # of a database
        mark = "?" if kind == "sqlite" else "%s"
        text = (
            "SELECT key, sku, name, unit_price, on_hand, reorder_level FROM stock_v1 "
            f"WHERE member AND on_hand >= {mark} ORDER BY on_hand NULLS FIRST, key LIMIT 51"
        )
        database: Any = views._file if kind == "sqlite" else views._database  # type: ignore[attr-defined]  # see above

        def select_by_hand(least: int) -> list[Row]:
            with database.reading() as cursor:
                cursor.execute(text, (least,))
                return [table.decode(values) for _, *values in cursor][:50]

        async def hand(least: int) -> Sequence[Row]:
            return await runtime._platform.in_thread(select_by_hand, least)

        async def ours(least: int) -> Sequence[Row]:
            where = attr("on_hand") >= least
            return (await reader.page(stock, "on_hand", 50, where=where)).rows

        assert list(await ours(wanted[0])) == list(await hand(wanted[0]))
        ratios = []
        for _ in range(ROUNDS):
            took = {ours: 0.0, hand: 0.0}
            for number, least in enumerate(wanted):
                # In turns: who asks first also fetches the pages that the other then finds.
                for work in (ours, hand) if number % 2 else (hand, ours):
                    took[work] += await seconds(work, least)
            ratios.append(took[ours] / took[hand])
        print_ratios(
            f"a page of {STORED:,} rows on {kind}, slower than by hand", ratios, "at most 1.2x"
        )


async def seconds(work: Callable[[int], Awaitable[object]], least: int) -> float:
    begun = time.perf_counter()
    await work(least)
    return time.perf_counter() - begun


def tell(name: str, one: Callable[[], object], other: Callable[[], object], target: str) -> None:
    """Print how many times as long the one takes as the other."""
    ratios = []
    for _ in range(ROUNDS):
        took = []
        for work in (one, other):
            begun = time.perf_counter()
            work()
            took.append(time.perf_counter() - begun)
        ratios.append(took[0] / took[1])
    print_ratios(name, ratios, target)


def print_ratios(name: str, ratios: Sequence[float], target: str) -> None:
    shown = " ".join(f"{ratio:.2f}" for ratio in ratios)
    print(
        f"{name}: {statistics.median(ratios):.2f}x (target {target}) [rounds: {shown}]", flush=True
    )


if __name__ == "__main__":
    main()
