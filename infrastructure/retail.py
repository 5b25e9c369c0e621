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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple

from typing_extensions import Buffer

from leftfold.application.items import RecordInvoice
from leftfold.domain import Personal
from leftfold.domain.items import MAX_PRICE, MAX_PRICE_DECIMALS, MAX_QUANTITY, MAX_STOCK
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

WHOLE = re.compile(r"[+-]?[0-9]{1,100}")
NUMBER = re.compile(r"[+-]?[0-9]{1,100}(\.[0-9]{0,100})?([eE][+-]?[0-9]{1,3})?")
MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}")

PIECE = 1 << 18
"""Bytes that are read at once."""
LONGEST_SHOWN = 40
"""Characters of a faulty field that are shown."""

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
    customers: set[str] = field(default_factory=set, repr=False)
    """Whom its movements are about."""


def survey(path: Path, copy: io.BufferedIOBase | None = None) -> Survey:
    """Read the file: count its rows, and find each item's name, price and opening stock.

    The file's text goes to `copy` too, for `read_runs`: so what was surveyed is what is read,
    whatever becomes of the file. Raises `DamagedFileError`.
    """
    found = Survey()
    digest = hashlib.sha256()
    for row in read_rows(path, digest, copy):
        found.rows += 1
        found.kinds[row.kind] += 1
        if row.kind == "skipped":
            found.skipped[row.code] += 1
            continue
        if row.kind == "odd":
            found.odd.append((row.line, _oddity(row)))
            continue
        if row.customer:
            found.customers.add(row.customer)
        product = found.products.get(row.code)
        if product is None:
            product = found.products[row.code] = Product(row.at)
        # Sold goods leave and returned ones, whose quantity is negative, come back.
        product.stock += -row.quantity if row.kind in {"sale", "return"} else row.quantity
        product.opening_stock = max(product.opening_stock, -product.stock)
        if product.opening_stock > MAX_STOCK:
            reason = f"{row.code} would need an opening stock of {product.opening_stock}"
            raise DamagedFileError(path.name, row.line, reason)
        product.name = product.name or row.description.strip()
        product.unit_price = product.unit_price or row.price
    found.digest = digest.hexdigest()
    return found


def read_runs(name: str, text: io.BufferedIOBase) -> Iterator[tuple[int, str, list[Row]]]:
    """Yield each run of consecutive rows of one invoice: its number from 0, the invoice, the rows.

    Rows that are no movement of a product are left out; a run may be left without any.
    `text` is the copy of a survey. Raises `DamagedFileError`.
    """
    text.seek(0)
    runs = groupby(_parse(name, _as_text(_Source(text))), key=attrgetter("invoice"))
    for number, (invoice, rows) in enumerate(runs):
        yield number, invoice, [row for row in rows if row.kind not in {"skipped", "odd"}]


def invoice_of(invoice: str, rows: Sequence[Row]) -> RecordInvoice:
    """Make the command of an invoice's rows, all of which are movements."""
    # One value for all rows of a customer, so that it is sealed once.
    customers = {customer: Personal(customer) for customer in {row.customer for row in rows}}
    lines = [
        {
            "kind": row.kind,
            "sku": row.code,
            "quantity": abs(row.quantity),
            "unit_price": row.price,
            "country": row.country,
            "customer_id": customers[row.customer] if row.customer else None,
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


def read_rows(
    path: Path, digest: hashlib._Hash | None = None, copy: io.BufferedIOBase | None = None
) -> Iterator[Row]:
    """Yield a file's rows; give what is read to a digest and a copy. Raises `DamagedFileError`."""
    try:
        with _unpack(path) as packed:
            yield from _parse(path.name, _as_text(_Source(packed, digest, copy)))
    except (UnicodeDecodeError, _NulError) as error:
        with _unpack(path) as packed:
            raise DamagedFileError(path.name, *_find_fault(packed)) from error


def _parse(name: str, text: io.TextIOWrapper) -> Iterator[Row]:
    line = 0
    try:
        reader = csv.reader(text, strict=True)
        header = next(reader, None)
        if header is None or tuple(header) != HEADER:
            raise DamagedFileError(name, 1, f"the header is not {','.join(HEADER)}")
        for fields in reader:
            line = reader.line_num
            if fields:
                yield _row(name, line, fields)
    except (EOFError, OSError, lzma.LZMAError, zlib.error, csv.Error) as error:
        raise DamagedFileError(name, line + 1, str(error) or type(error).__name__) from None


def _unpack(path: Path) -> io.BufferedIOBase:
    match path.suffix.lower():
        case ".xz":
            return lzma.open(path)
        case ".gz":
            return gzip.open(path)
        case _:
            return path.open("rb")


def _as_text(source: _Source) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedReader(source), encoding="utf-8-sig", newline="")


class _NulError(ValueError):
    """The file holds a NUL character, which databases cannot keep in a text."""


class _Source(io.RawIOBase):
    """Reads bytes in large pieces, passes them on, and gives them to a digest and a copy.

    Each read of a file gives up the interpreter's lock for a moment, which is too short for a
    thread that waits for it, and makes that wait anew.
    """

    def __init__(
        self,
        source: io.BufferedIOBase,
        digest: hashlib._Hash | None = None,
        copy: io.BufferedIOBase | None = None,
    ) -> None:
        self._source = source
        self._digest = digest
        self._copy = copy
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        if not self._left:
            self._left = memoryview(self._read_piece())
        wanted = memoryview(buffer)
        piece, self._left = self._left[: len(wanted)], self._left[len(wanted) :]
        wanted[: len(piece)] = piece
        return len(piece)

    def _read_piece(self) -> bytes:
        # In one step: of an archive that ends too early all is read that comes before.
        data = self._source.read1(PIECE)
        if b"\0" in data:
            raise _NulError
        if self._digest is not None:
            self._digest.update(data)
        if self._copy is not None:
            self._copy.write(data)
        return data


def _row(name: str, line: int, fields: list[str]) -> Row:
    try:
        invoice, code, description, quantity, at, price, customer, country = fields
    except ValueError:
        reason = f"{len(fields)} fields instead of {len(HEADER)}"
        raise DamagedFileError(name, line, reason) from None
    try:
        pieces = _whole(quantity)
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
            f"{column} {text[:LONGEST_SHOWN]!r} is not {what}"
            for column, text, what, parse in (
                ("Quantity", quantity, "a whole number", _whole),
                ("InvoiceDate", at, "a time YYYY-MM-DD HH:MM", _moment),
                ("UnitPrice", price, "a number", _price),
            )
            if not _parses(parse, text)
        ]
        raise DamagedFileError(name, line, "; ".join(faults)) from None


def _parses(parse: object, text: str) -> bool:
    try:
        parse(text)  # type: ignore[operator]  # one of three functions of a text
    except (ValueError, InvalidOperation):
        return False
    return True


@lru_cache(maxsize=1_024)
def _whole(text: str) -> int:
    if not WHOLE.fullmatch(text):
        raise ValueError(text)
    return int(text)


@lru_cache(maxsize=1_024)
def _moment(text: str) -> datetime:
    if not MOMENT.fullmatch(text):
        raise ValueError(text)
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@lru_cache(maxsize=8_192)
def _price(text: str) -> tuple[Decimal, bool]:
    """Read a price, and tell whether an item can have it."""
    if not NUMBER.fullmatch(text):
        raise ValueError(text)
    price = Decimal(text)
    return price, 0 <= price <= MAX_PRICE and price == round(price, MAX_PRICE_DECIMALS)


@lru_cache(maxsize=65_536)
def _is_product(code: str) -> bool:
    return PRODUCT.fullmatch(code) is not None


def _shape(invoice: str, quantity: int, price: Decimal) -> Kind:
    if 0 < quantity <= MAX_QUANTITY:
        return "sale" if price else "receipt"
    if -MAX_QUANTITY <= quantity < 0:
        if invoice.startswith("C"):
            return "return"
        if not price:
            return "write_off"
    return "odd"


def _oddity(row: Row) -> str:
    return f"invoice {row.invoice}: quantity {row.quantity} at price {row.price} has no known shape"


def _find_fault(binary: io.BufferedIOBase) -> tuple[int, str]:
    number = 1
    for number, data in enumerate(binary, 1):
        if b"\0" in data:
            return number, "holds a NUL character"
        try:
            data.decode()
        except UnicodeDecodeError as error:
            return number, f"not UTF-8: {error.reason} at byte {error.start + 1}"
    return number, "not UTF-8: it ends within a character"
