"""A small simulated shop, in the format of the real sales; the same seed is the same shop."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

from leftfold.infrastructure.retail import HEADER

FIRST_DAY = datetime(2026, 1, 5, 9, tzinfo=UTC)
THINGS = ("LANTERN", "TEACUP", "BUNTING", "CAKE TIN", "LUNCH BAG", "DOORMAT", "CLOCK", "MUG")
STYLES = ("WHITE METAL", "RED SPOTTY", "VINTAGE", "HEART", "REGENCY", "WOODLAND", "JUMBO", "PAPER")
COUNTRIES = ("United Kingdom", "United Kingdom", "United Kingdom", "France", "Germany", "EIRE")


def write_shop(path: Path, *, seed: int, days: int) -> None:
    """Write some days of a shop's sales as a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows(_rows(random.Random(seed), days))  # noqa: S311 - a shop, not a secret


def _rows(chance: random.Random, days: int) -> Iterator[tuple[object, ...]]:
    names = [f"{style} {thing}" for style in STYLES for thing in THINGS]
    items = {f"{21000 + 7 * i}{'ABC'[i % 3] if i % 4 == 0 else ''}": n for i, n in enumerate(names)}
    prices = {code: Decimal(chance.randint(29, 1495)) / 100 for code in items}
    codes = list(items)
    invoice = 536_365
    for day in range(days):
        for minute in sorted(chance.sample(range(480), chance.randint(4, 12))):
            invoice += 1
            at = FIRST_DAY + timedelta(days=day, minutes=minute)
            when, customer = f"{at:%Y-%m-%d %H:%M}", str(chance.randint(12_346, 12_846))
            country = chance.choice(COUNTRIES)
            kind = chance.random()
            for code in chance.sample(codes, chance.randint(1, 9)):
                name, price = items[code], prices[code]
                quantity = chance.choice((1, 2, 3, 4, 6, 12, 24))
                if kind < 0.06:  # noqa: PLR2004 - six invoices in a hundred are cancellations
                    yield f"C{invoice}", code, name, -quantity, when, price, customer, country
                elif kind < 0.09:  # noqa: PLR2004 - three are write-offs
                    yield invoice, code, "damaged", -quantity, when, 0, "", "United Kingdom"
                elif kind < 0.12:  # noqa: PLR2004 - three are stock found
                    yield invoice, code, "", quantity, when, 0, "", "United Kingdom"
                else:
                    yield invoice, code, name, quantity, when, price, customer, country
            if kind > 0.9:  # noqa: PLR2004 - one in ten pays postage
                yield invoice, "POST", "POSTAGE", 1, when, Decimal("18.00"), customer, country
