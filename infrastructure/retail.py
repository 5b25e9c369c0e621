"""Reading a shop's sales in the format of the UCI Online Retail data set."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import IO, Literal, NamedTuple

from leftfold.application.items import RecordInvoice
from leftfold.domain.items import MAX_AMOUNT, MAX_PRICE_DECIMALS
from leftfold.infrastructure.errors import InfrastructureError

HEADER = (
    "InvoiceNo",
    "StockCode",
    "Description",
    "Quantity",
    "InvoiceDate",
    "UnitPrice",
    "CustomerID",
    "Country",
)
PRODUCT = re.compile(r"[0-9]{5}[A-Za-z]{0,2}|DCGS[^\0]{0,16}|gift_0001_[^\0]{0,10}|PADS")
"""The codes that are SKUs, none of which is longer than one may be."""

MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}")

Kind = Literal["sale", "return", "write_off", "receipt", "skipped", "odd"]
"""`skipped`: the code is no product. `odd`: a product's row of no known shape."""


class DamagedFileError(InfrastructureError, message="{file}, line {line}: {reason}"):
    """The file cannot be read to its end."""

    file: str
    line: int
    reason: str


class Row(NamedTuple):
    """One line of the file. Quantities are in pieces, negative for what goes out or comes back."""

    line: int
    invoice: str
    code: str
    description: str
    quantity: int
    at: datetime
    price: Decimal
    customer: str
    country: str
    kind: Kind


@dataclass(slots=True)
class Product:
    """What the file tells of one item before it is registered."""

    first_seen: datetime
    name: str = ""
    unit_price: Decimal = Decimal(0)
    opening_stock: int = 0
    """The smallest that never lets the stock go below zero."""
    stock: int = 0
    """Where the stock ends, counted from none."""


@dataclass
class Survey:
    """What a first pass over a file finds."""

    digest: str = ""
    """SHA-256 of the file's text, so of what it holds and not of how it is packed."""
    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    """Rows whose code is no product, by code."""
    odd: list[tuple[int, str]] = field(default_factory=list)
    """Rows of no known shape: line and reason."""
    products: dict[str, Product] = field(default_factory=dict)


def survey(path: Path) -> Survey:
    """Read the file once: count its rows, and find each item's name, price and opening stock.

    Raises `DamagedFileError`.
    """
    found = Survey()
    digest = hashlib.sha256()
    for row in read_rows(path, digest):
        found.rows += 1
        found.kinds[row.kind] += 1
        if row.kind == "skipped":
            found.skipped[row.code] += 1
            continue
        if row.kind == "odd":
            found.odd.append((row.line, _oddity(row)))
            continue
        product = found.products.get(row.code)
        if product is None:
            product = found.products[row.code] = Product(row.at)
        # Sold goods leave and returned ones, whose quantity is negative, come back.
        product.stock += -row.quantity if row.kind in {"sale", "return"} else row.quantity
        product.opening_stock = max(product.opening_stock, -product.stock)
        product.name = product.name or row.description.strip()
        product.unit_price = product.unit_price or row.price
    found.digest = digest.hexdigest()
    return found


def read_runs(path: Path) -> Iterator[tuple[int, str, list[Row]]]:
    """Yield each run of consecutive rows of one invoice: its number from 0, the invoice, the rows.

    Rows that are no movement of a product are left out; a run may be left without any.
    Raises `DamagedFileError`.
    """
    runs = groupby(read_rows(path), key=attrgetter("invoice"))
    for number, (invoice, rows) in enumerate(runs):
        yield number, invoice, [row for row in rows if row.kind not in {"skipped", "odd"}]


def invoice_of(invoice: str, rows: Iterable[Row]) -> RecordInvoice:
    """Make the command of an invoice's rows, all of which are movements."""
    lines = [
        {
            "kind": row.kind,
            "sku": row.code,
            "quantity": abs(row.quantity),
            "unit_price": row.price,
            "country": row.country,
            "customer_id": row.customer or None,
            "occurred_at": row.at,
        }
        if row.kind in {"sale", "return"}
        else {
            "kind": row.kind,
            "sku": row.code,
            "quantity": abs(row.quantity),
            "reason": row.description.strip() if row.kind == "write_off" else "",
            "occurred_at": row.at,
        }
        for row in rows
    ]
    return RecordInvoice.model_validate({"invoice": invoice, "lines": lines})


def read_rows(path: Path, digest: hashlib._Hash | None = None) -> Iterator[Row]:
    """Yield the file's rows; feed what is read to the digest. Raises `DamagedFileError`."""
    line = 1
    try:
        with open_text(path, digest) as text:
            reader = csv.reader(text, strict=True)
            header = next(reader, None)
            if header is None or tuple(header) != HEADER:
                raise DamagedFileError(path.name, 1, f"the header is not {','.join(HEADER)}")
            for fields in reader:
                line = reader.line_num
                yield _row(path, line, fields)
    except UnicodeDecodeError:
        line, reason = _find_undecodable(path)
        raise DamagedFileError(path.name, line, reason) from None
    except (EOFError, OSError, lzma.LZMAError, zlib.error, csv.Error) as error:
        raise DamagedFileError(path.name, line + 1, str(error) or type(error).__name__) from None


def open_text(path: Path, digest: hashlib._Hash | None = None) -> io.TextIOWrapper:
    """Open a `.csv`, `.csv.gz` or `.csv.xz` file as text, feeding its bytes to the digest."""
    binary: io.BufferedIOBase | IO[bytes]
    match path.suffix:
        case ".xz":
            binary = lzma.open(path)  # noqa: SIM115 - the caller closes the wrapper around it
        case ".gz":
            binary = gzip.open(path)  # noqa: SIM115 - see above
        case _:
            binary = path.open("rb")
    source = _Digested(binary, digest) if digest is not None else binary
    return io.TextIOWrapper(source, encoding="utf-8", newline="")  # type: ignore[arg-type]  # a reader is all it needs


class _Digested(io.BufferedIOBase):
    """Passes bytes on and feeds them to a digest."""

    def __init__(self, source: io.BufferedIOBase | IO[bytes], digest: hashlib._Hash) -> None:
        self._source = source
        self._digest = digest

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._source.read(-1 if size is None else size)
        self._digest.update(data)
        return data

    def read1(self, size: int = -1, /) -> bytes:
        return self.read(size)

    def close(self) -> None:
        self._source.close()
        super().close()


def _row(path: Path, line: int, fields: list[str]) -> Row:
    try:
        invoice, code, description, quantity, at, price, customer, country = fields
    except ValueError:
        reason = f"{len(fields)} fields instead of {len(HEADER)}"
        raise DamagedFileError(path.name, line, reason) from None
    try:
        pieces = int(quantity)
        unit_price, is_price = _price(price)
        kind: Kind = "skipped"
        if _is_product(code):
            kind = _shape(invoice, pieces, unit_price) if is_price else "odd"
        return Row(
            line,
            invoice,
            code,
            description,
            pieces,
            _moment(at),
            unit_price,
            customer,
            country,
            kind,
        )
    except (ValueError, InvalidOperation):
        faults = [
            f"{name} {text!r} is not {what}"
            for name, text, what, parse in (
                ("Quantity", quantity, "a whole number", int),
                ("InvoiceDate", at, "a time YYYY-MM-DD HH:MM", _moment),
                ("UnitPrice", price, "a number", _price),
            )
            if not _parses(parse, text)
        ]
        raise DamagedFileError(path.name, line, "; ".join(faults)) from None


def _parses(parse: object, text: str) -> bool:
    try:
        parse(text)  # type: ignore[operator]  # one of three functions of a text
    except (ValueError, InvalidOperation):
        return False
    return True


@lru_cache(maxsize=1_024)
def _moment(text: str) -> datetime:
    if not MOMENT.fullmatch(text):
        raise ValueError(text)
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@lru_cache(maxsize=8_192)
def _price(text: str) -> tuple[Decimal, bool]:
    """Read a price, and tell whether an item can have it."""
    price = Decimal(text)
    if not price.is_finite():
        raise ValueError(text)
    return price, 0 <= price <= MAX_AMOUNT and price == round(price, MAX_PRICE_DECIMALS)


@lru_cache(maxsize=65_536)
def _is_product(code: str) -> bool:
    return PRODUCT.fullmatch(code) is not None


def _shape(invoice: str, quantity: int, price: Decimal) -> Kind:
    if 0 < quantity <= MAX_AMOUNT:
        return "sale" if price else "receipt"
    if -MAX_AMOUNT <= quantity < 0:
        if invoice.startswith("C"):
            return "return"
        if not price:
            return "write_off"
    return "odd"


def _oddity(row: Row) -> str:
    return f"invoice {row.invoice}: quantity {row.quantity} at price {row.price} has no known shape"


def _find_undecodable(path: Path) -> tuple[int, str]:
    with open_text(path) as text:
        lines: Iterable[bytes] = text.buffer  # type: ignore[assignment]  # binary files are
        for number, data in enumerate(lines, 1):
            try:
                data.decode()
            except UnicodeDecodeError as error:
                return number, f"not UTF-8: {error.reason} at byte {error.start + 1}"
    return 0, "not UTF-8"
