"""The view of items, against sums made another way."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from leftfold.application.items import ItemRow, item_stock
from leftfold.domain import DomainError
from leftfold.domain.items import Item

START = datetime(2026, 1, 1, tzinfo=UTC)

quantities = st.integers(1, 9)
prices = st.decimals(0, 10, places=3)
moments = st.integers(0, 99).map(lambda hours: START + timedelta(hours=hours))
operations = st.one_of(
    st.tuples(st.just("sell"), quantities, prices, moments),
    st.tuples(st.just("take_back"), quantities, prices, moments),
    st.tuples(st.just("receive"), quantities, st.none(), moments),
    st.tuples(st.just("write_off"), quantities, st.none(), moments),
    st.tuples(st.just("rename"), st.sampled_from(["Cup", "Mug"]), st.none(), moments),
    st.tuples(st.just("reprice"), prices, st.none(), moments),
    st.tuples(st.just("discontinue"), st.none(), st.none(), moments),
)


def carry_out(item, kind, amount, price, at):
    match kind:
        case "sell" | "take_back":
            getattr(item, kind)(amount, "536365", price, occurred_at=at)
        case "write_off":
            item.write_off(amount, "broken", at)
        case "discontinue":
            item.discontinue(at)
        case _:
            getattr(item, kind)(amount, at)


@given(
    st.lists(operations, max_size=25),
    st.integers(0, 30),
    prices,
    st.lists(st.integers(0, 25), max_size=3),
)
def test_the_view_holds_the_sums_of_what_was_done(operations, opening_stock, price, cuts):
    item = Item.register("22423", "Cakestand", price, opening_stock, 4)
    done = []
    for operation in operations:
        with suppress(DomainError):
            carry_out(item, *operation)
            done.append(operation)
    events = item.collect_events()

    def amounts(kind):
        return [amount for k, amount, _, _ in done if k == kind]

    def worth(kind):
        return sum((amount * price for k, amount, price, _ in done if k == kind), Decimal(0))

    sold, returned = sum(amounts("sell")), sum(amounts("take_back"))
    received, lost = sum(amounts("receive")), sum(amounts("write_off"))
    sales = [at for kind, _, _, at in done if kind == "sell"]
    expected = ItemRow(
        sku="22423",
        name=["Cakestand", *amounts("rename")][-1],
        unit_price=[price, *amounts("reprice")][-1],
        reorder_level=4,
        opening_stock=opening_stock,
        on_hand=opening_stock - sold + returned + received - lost,
        units_sold=sold,
        units_returned=returned,
        units_written_off=lost,
        units_received=received,
        revenue=worth("sell") - worth("take_back"),
        first_sale=min(sales, default=None),
        last_sale=max(sales, default=None),
        discontinued=bool(amounts("discontinue")),
    )

    # However the log is cut into pages, the rows end the same.
    rows = {}

    def load(keys):
        return {key: rows[key] for key in keys & set(rows)}

    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(events)], strict=True):
        rows.update(item_stock.fold(events[begin:end], load))
    assert rows == {item.id.hex: expected}
    assert expected.on_hand == item.on_hand
