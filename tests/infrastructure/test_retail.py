"""Reading a shop's sales: what a row means, runs of invoices, and damaged files."""

import gzip
import lzma
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from leftfold.infrastructure.retail import (
    HEADER,
    DamagedFileError,
    invoice_of,
    read_rows,
    read_runs,
    survey,
)

HEADER_LINE = ",".join(HEADER)
SALE = "536365,85123A,WHITE HEART,6,2010-12-01 08:26,2.55,17850,United Kingdom"


def write(path, *lines):
    path.write_text("\n".join([HEADER_LINE, *lines]) + "\n", encoding="utf-8", newline="")
    return path


def row(invoice="536365", code="85123A", quantity=6, price="2.55", description="HEART"):
    return f"{invoice},{code},{description},{quantity},2010-12-01 08:26,{price},17850,France"


@pytest.fixture
def sheet(tmp_path):
    return lambda *lines: write(tmp_path / "shop.csv", *lines)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (row(), "sale"),
        (row(quantity=6, price="0"), "receipt"),
        (row(invoice="C536379", quantity=-1), "return"),
        (row(invoice="C536379", quantity=-1, price="0"), "return"),
        (row(quantity=-1, price="0"), "write_off"),
        (row(quantity=-1), "odd"),
        (row(quantity=0), "odd"),
        (row(price="-2.5"), "odd"),
        (row(price="0.0001"), "odd"),
        (row(quantity=2_000_000_000), "odd"),
        (row(code="85123a"), "sale"),
        (row(code="DCGS0076"), "sale"),
        (row(code="gift_0001_20"), "sale"),
        (row(code="PADS"), "sale"),
        (row(code="POST"), "skipped"),
        (row(code="85123ABC"), "skipped"),
        (row(code="8512"), "skipped"),
        (row(code="DCGS" + "x" * 17), "skipped"),
        (row(code="٨٥١٢٣"), "skipped"),
    ],
)
def test_a_rows_shape_tells_what_it_means(sheet, line, kind):
    assert [r.kind for r in read_rows(sheet(line))] == [kind]


def test_a_row_is_read_with_its_line_time_and_exact_price(sheet):
    (read,) = read_rows(sheet(SALE))
    assert (read.line, read.quantity, read.price) == (2, 6, Decimal("2.55"))
    assert read.at == datetime(2010, 12, 1, 8, 26, tzinfo=UTC)


def test_a_quoted_description_over_two_lines_keeps_the_line_numbers(sheet):
    path = sheet('1,85123A,"two\nlines",1,2010-12-01 08:26,1,,UK', SALE)
    assert [r.line for r in read_rows(path)] == [3, 4]


def test_consecutive_rows_of_one_invoice_are_a_run(sheet):
    path = sheet(row("1"), row("1"), row("2"), row("2", code="POST"), row("1"), row("3", "M"))
    runs = [
        (number, invoice, len(rows))
        for number, invoice, rows in read_runs(path.name, path.open("rb"))
    ]
    assert runs == [(0, "1", 2), (1, "2", 1), (2, "1", 1), (3, "3", 0)]


def test_opening_stock_is_the_smallest_that_never_goes_below_zero(sheet):
    path = sheet(
        row(quantity=6),
        row(quantity=4, price="0"),
        row(quantity=9),
        row(invoice="C1", quantity=-20),
        row(quantity=5),
    )
    assert survey(path).products["85123A"].opening_stock == 11


def test_an_item_that_never_runs_out_needs_no_opening_stock(sheet):
    path = sheet(row(quantity=6, price="0"), row(quantity=6))
    assert survey(path).products["85123A"].opening_stock == 0


def test_the_name_is_the_first_description_and_the_price_the_first_positive_one(sheet):
    path = sheet(
        row(quantity=1, price="0", description="  "),
        row(price="1.25", description="LANTERN"),
        row(price="9.99", description="other"),
    )
    product = survey(path).products["85123A"]
    assert (product.name, product.unit_price) == ("LANTERN", Decimal("1.25"))


def test_codes_that_differ_by_case_are_two_items(sheet):
    found = survey(sheet(row(code="85123A"), row(code="85123a")))
    assert set(found.products) == {"85123A", "85123a"}


def test_skipped_rows_are_counted_by_code_and_odd_ones_told_with_their_line(sheet):
    found = survey(sheet(row(code="POST"), row(code="POST"), row(code="M"), row(quantity=-3)))
    assert found.skipped == Counter(POST=2, M=1)
    assert [line for line, _ in found.odd] == [5]
    assert found.rows == 4


def test_the_digest_is_of_the_text_however_it_is_packed(tmp_path, sheet):
    plain = sheet(SALE)
    packed = tmp_path / "shop.csv.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    zipped = tmp_path / "shop.csv.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert survey(plain).digest == survey(packed).digest == survey(zipped).digest


def test_a_line_of_the_command_carries_what_the_kind_needs(sheet):
    rows = list(read_rows(sheet(row(), row(quantity=-2, price="0", description=" damaged "))))
    sale, lost = invoice_of("536365", rows).lines
    assert (sale.kind, sale.quantity, sale.country) == ("sale", 6, "France")
    assert sale.customer_id is not None
    assert (lost.kind, lost.quantity, lost.reason) == ("write_off", 2, "damaged")


@pytest.mark.parametrize(
    ("lines", "line", "reason"),
    [
        ([row(), row(quantity="many")], 3, "Quantity 'many'"),
        ([row(price="cheap")], 2, "UnitPrice 'cheap'"),
        ([row(price="NaN")], 2, "UnitPrice 'NaN'"),
        ([SALE.replace("2010-12-01", "01/12/2010")], 2, "InvoiceDate"),
        ([SALE, "536365,85123A"], 3, "2 fields instead of 8"),
        ([SALE, SALE + ",more"], 3, "9 fields"),
        ([row(quantity="1_000")], 2, "Quantity '1_000'"),
        ([row(quantity="٣")], 2, "Quantity"),
        ([SALE, row(description="a\0b")], 3, "NUL"),
        ([row(quantity="9" * 5_000)], 2, "Quantity '" + "9" * 40 + "'"),
        ([row(quantity=900_000)] * 1_200, 1_113, "would need an opening stock of 1000"),
    ],
)
def test_a_bad_value_is_told_with_file_line_and_reason(sheet, lines, line, reason):
    with pytest.raises(DamagedFileError) as caught:
        survey(sheet(*lines))
    assert (caught.value.file, caught.value.line) == ("shop.csv", line)
    assert reason in caught.value.reason


def test_a_byte_order_mark_and_blank_lines_are_no_fault(tmp_path):
    path = tmp_path / "shop.CSV.XZ"
    path.write_bytes(lzma.compress(f"\ufeff{HEADER_LINE}\r\n{SALE}\r\n\r\n".encode()))
    assert survey(path).rows == 1


@pytest.mark.parametrize("text", ["", "Invoice,Code\n1,2\n", HEADER_LINE.lower() + "\n"])
def test_a_wrong_header_is_told(tmp_path, text):
    path = tmp_path / "shop.csv"
    path.write_text(text)
    with pytest.raises(DamagedFileError, match=r"shop.csv, line 1: the header"):
        survey(path)


def test_bytes_that_are_no_utf8_are_told_with_their_line(tmp_path):
    path = tmp_path / "shop.csv"
    lines = [HEADER_LINE.encode(), *[SALE.encode()] * 500, SALE.encode() + b"\xff", SALE.encode()]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DamagedFileError, match=r"line 502: not UTF-8"):
        survey(path)


@pytest.mark.parametrize(("suffix", "pack"), [("xz", lzma.compress), ("gz", gzip.compress)])
def test_a_truncated_archive_is_told(tmp_path, suffix, pack):
    path = tmp_path / f"shop.csv.{suffix}"
    text = "\n".join([HEADER_LINE, *(row(invoice=str(n)) for n in range(5_000))])
    path.write_bytes(pack(text.encode())[:-2_000])
    with pytest.raises(DamagedFileError) as caught:
        survey(path)
    assert caught.value.line > 1
    assert "end" in caught.value.reason.lower()


def test_a_file_that_is_no_archive_is_told(tmp_path):
    path = tmp_path / "shop.csv.xz"
    path.write_text("not packed at all")
    with pytest.raises(DamagedFileError):
        survey(path)
