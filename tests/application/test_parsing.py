"""Outside input: what becomes a command, and what is said of what does not."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from types import MappingProxyType

import pytest
from pydantic import ValidationError

from leftfold.application import CommandBus, ValidationFailed
from leftfold.application.items import RecordInvoice, RegisterItem, SellStock
from leftfold.domain import Err, Ok, Personal

SALE = {"sku": "22423", "quantity": 3, "invoice": "536365"}


@pytest.fixture
def bus():
    bus = CommandBus()
    for command_type in (SellStock, RegisterItem, RecordInvoice):
        bus.register(command_type, lambda _: pytest.fail("was called"))
    return bus


def refusal(answer) -> ValidationFailed:
    assert isinstance(answer, Err)
    assert isinstance(answer.error, ValidationFailed)
    return answer.error


def faults(answer) -> dict[str, str]:
    return dict(refusal(answer).reasons)


@pytest.mark.parametrize(
    "data",
    [SALE, MappingProxyType(SALE), json.dumps(SALE), json.dumps(SALE).encode()],
    ids=["dict", "mapping", "text", "bytes"],
)
def test_a_mapping_or_a_json_document_becomes_a_command(bus, data):
    assert bus.parse("SellStock", data) == Ok(SellStock(**SALE))


def test_json_texts_become_typed_values(bus):
    document = json.dumps(
        {
            **SALE,
            "unit_price": "2.55",
            "customer_id": "17850",
            "occurred_at": "2010-12-01T08:26:00Z",
        }
    )
    command = bus.parse("SellStock", document).unwrap()
    assert command.unit_price == Decimal("2.55")
    assert command.customer_id == Personal("17850")
    assert command.occurred_at == datetime(2010, 12, 1, 8, 26, tzinfo=UTC)


def test_an_unknown_name_is_refused(bus):
    assert bus.parse("StealStock", SALE) == Err(
        ValidationFailed("StealStock", (("name", "nothing of this name is registered"),))
    )


def test_a_refusal_names_the_command(bus):
    assert refusal(bus.parse("SellStock", {})).name == "SellStock"


def test_missing_fields_are_named(bus):
    assert faults(bus.parse("SellStock", {"sku": "A"})) == {
        "quantity": "Field required",
        "invoice": "Field required",
    }


def test_an_unknown_field_is_named(bus):
    assert list(faults(bus.parse("SellStock", {**SALE, "colour": "red"}))) == ["colour"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sku", ""),
        ("sku", "x" * 21),
        ("sku", "a\0b"),
        ("quantity", 0),
        ("quantity", -1),
        ("quantity", 1.5),
        ("quantity", "3"),
        ("quantity", True),
        ("quantity", 10**9 + 1),
        ("unit_price", -1),
        ("unit_price", "1.0001"),
        ("unit_price", "NaN"),
        ("unit_price", "Infinity"),
        ("invoice", 17),
        ("invoice", "a\0b"),
        ("occurred_at", "2010-12-01T08:26:00"),
        ("occurred_at", "yesterday"),
        ("customer_id", 17850),
    ],
)
def test_a_wrong_value_is_refused_with_its_field(bus, field, value):
    fields = faults(bus.parse("SellStock", {**SALE, field: value}))
    assert {name.split(".")[0] for name in fields} == {field}
    assert all(fields.values())


@pytest.mark.parametrize("field", ["invoice", "country", "customer_id"])
def test_text_that_is_no_unicode_is_refused_with_its_field(bus, field):
    fields = faults(bus.parse("SellStock", {**SALE, field: "\ud800"}))
    assert {name.split(".")[0] for name in fields} == {field}


def test_a_field_inside_a_list_is_named_by_its_path(bus):
    lines = [{"kind": "sale", "sku": "A", "quantity": q} for q in (1, 0)]
    answer = bus.parse("RecordInvoice", {"invoice": "536365", "lines": lines})
    assert list(faults(answer)) == ["lines.1.quantity"]


def test_an_invoice_without_lines_is_refused(bus):
    answer = bus.parse("RecordInvoice", {"invoice": "536365", "lines": []})
    assert list(faults(answer)) == ["lines"]


@pytest.mark.parametrize("data", ["{", b"\xff", "[1]", "17", "", [1], None, 17], ids=repr)
def test_what_is_no_object_is_refused(bus, data):
    assert faults(bus.parse("SellStock", data))


@pytest.mark.parametrize("as_json", [False, True])
def test_a_refusal_does_not_echo_the_input(bus, as_json):
    secret = "x-secret-x"
    data = {
        **SALE,
        "sku": secret * 3,
        "quantity": secret,
        "unit_price": secret,
        "occurred_at": secret,
        "customer_id": [secret],
    }
    answer = bus.parse("SellStock", json.dumps(data) if as_json else data)
    assert len(faults(answer)) >= 5
    assert secret not in repr(answer)


def test_a_damaged_document_is_not_echoed(bus):
    assert "x-secret-x" not in repr(bus.parse("SellStock", '{"sku": "x-secret-x"'))


def test_a_refusal_reads_as_a_sentence_with_fields_and_reasons(bus):
    text = str(refusal(bus.parse("SellStock", {"sku": "A", "quantity": 1})))
    assert "SellStock" in text
    assert "invoice" in text
    assert "Field required" in text


@pytest.mark.parametrize("faulty", [{"customer_id": 17850}, {"quantity": "17850"}, {"x": "17850"}])
def test_errors_of_messages_do_not_quote_what_they_were_given(faulty):
    with pytest.raises(ValidationError) as raised:
        SellStock(**SALE | faulty)
    assert "17850" not in str(raised.value)
