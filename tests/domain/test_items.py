from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from leftfold.domain import Personal
from leftfold.domain.items import (
    MAX_QUANTITY,
    MAX_STOCK,
    InsufficientStock,
    InvalidName,
    InvalidPrice,
    InvalidQuantity,
    InvalidSku,
    InvalidStock,
    Item,
    ItemDiscontinued,
    ItemIsDiscontinued,
    ItemRegistered,
    ItemRenamed,
    ItemRepriced,
    Reorder,
    ReorderClosed,
    ReorderIsClosed,
    ReorderOpened,
    StockReceived,
    StockReturned,
    StockSold,
    StockWrittenOff,
)
from leftfold.infrastructure.testing import scenario

PRICE = Decimal("2.55")
SOLD_AT = datetime(2010, 12, 1, 8, 26, tzinfo=UTC)
CUSTOMER = Personal("17850")

registered = ItemRegistered(
    sku="22423", name="Cakestand", unit_price=PRICE, opening_stock=10, reorder_level=2
)
discontinued = ItemDiscontinued()
opened = ReorderOpened(sku="22423", number=1, on_hand=2, reorder_level=3)


def register(sku="22423", name="Cakestand", price=PRICE, opening_stock=10, reorder_level=2):
    return lambda _: Item.register(sku, name, price, opening_stock, reorder_level)


def sold(**changes):
    facts = {"invoice": "536365", "quantity": 3, "unit_price": PRICE, "country": ""}
    return StockSold(**{**facts, "customer_id": None, **changes})


def returned(**changes):
    return StockReturned(**sold(**changes).facts())


# Registering


def test_registering_an_item():
    scenario(Item, "22423").when(register()).then(registered).then_state(
        sku="22423",
        name="Cakestand",
        unit_price=PRICE,
        on_hand=10,
        reorder_level=2,
        discontinued=False,
        version=1,
    )


def test_a_sku_identifies_the_item():
    assert Item.register("22423", "Cakestand", PRICE).id == Item.id_of("22423")


@pytest.mark.parametrize("sku", ["A", "x" * 20, "é" * 20, " ", "85123a"])
def test_a_sku_is_any_text_of_1_to_20_characters(sku):
    scenario(Item, sku).when(register(sku=sku)).then_state(sku=sku)


@pytest.mark.parametrize("sku", ["", "x" * 21, "a\0b", "\ud800"], ids=ascii)
def test_another_sku_is_refused(sku):
    scenario(Item).when(register(sku=sku)).then_refused(InvalidSku(sku))


@pytest.mark.parametrize("name", ["", "  \t", "a\0b", "\udfff"], ids=ascii)
def test_a_name_that_is_no_text_is_refused(name):
    scenario(Item).when(register(name=name)).then_refused(InvalidName(name))


LONG = "1.0000000000000000000000000000000001"  # more digits than a product keeps
NO_PRICES = [
    Decimal(price) for price in ("-0.001", "1.0001", "1000000000.001", "NaN", "sNaN", "Infinity")
]


@pytest.mark.parametrize("price", ["0", "0.001", "2.550", "1E+3", "100000"])
def test_a_price_is_at_least_0_with_at_most_3_decimals(price):
    scenario(Item).when(register(price=Decimal(price))).then_state(unit_price=Decimal(price))


@pytest.mark.parametrize("price", NO_PRICES, ids=str)
def test_another_price_is_refused(price):
    with pytest.raises(InvalidPrice) as raised:
        Item.register("22423", "Cakestand", price)
    assert raised.value.price is price


@pytest.mark.parametrize("level", [-1, MAX_STOCK + 1])
def test_an_opening_stock_out_of_range_is_refused(level):
    scenario(Item).when(register(opening_stock=level)).then_refused(InvalidStock(level))


@pytest.mark.parametrize("level", [-1, MAX_STOCK + 1])
def test_a_reorder_level_out_of_range_is_refused(level):
    scenario(Item).when(register(reorder_level=level)).then_refused(InvalidStock(level))


# Renaming and repricing


def test_renaming_an_item():
    scenario(Item).given(registered).when(lambda item: item.rename("Stand")).then(
        ItemRenamed(name="Stand")
    ).then_state(name="Stand")


def test_an_empty_new_name_is_refused():
    scenario(Item).given(registered).when(lambda item: item.rename(" ")).then_refused(
        InvalidName(" ")
    )


def test_repricing_an_item():
    scenario(Item).given(registered).when(lambda item: item.reprice(Decimal(3))).then(
        ItemRepriced(unit_price=Decimal(3))
    ).then_state(unit_price=Decimal(3))


def test_a_negative_new_price_is_refused():
    scenario(Item).given(registered).when(lambda item: item.reprice(Decimal(-1))).then_refused(
        InvalidPrice(Decimal(-1))
    )


# Quantities


@pytest.mark.parametrize("quantity", [0, -1, MAX_QUANTITY + 1])
@pytest.mark.parametrize(
    "move",
    [
        lambda item, quantity: item.receive(quantity),
        lambda item, quantity: item.sell(quantity, "536365"),
        lambda item, quantity: item.take_back(quantity, "C536365"),
        lambda item, quantity: item.write_off(quantity, "broken"),
    ],
    ids=["receive", "sell", "take_back", "write_off"],
)
def test_a_quantity_is_a_positive_number(move, quantity):
    scenario(Item).given(registered).when(lambda item: move(item, quantity)).then_refused(
        InvalidQuantity(quantity)
    )


# Receiving


def test_receiving_stock():
    scenario(Item).given(registered).when(lambda item: item.receive(5)).then(
        StockReceived(quantity=5)
    ).then_state(on_hand=15)


def test_a_discontinued_item_receives_nothing():
    scenario(Item).given(registered, discontinued).when(lambda item: item.receive(5)).then_refused(
        ItemIsDiscontinued("22423")
    )


# Selling


def test_selling_stock_at_the_items_price():
    scenario(Item).given(registered).when(lambda item: item.sell(3, "536365")).then(
        sold()
    ).then_state(on_hand=7)


def test_selling_stock_with_all_its_facts():
    scenario(Item).given(registered).when(
        lambda item: item.sell(3, "536365", Decimal(2), "France", CUSTOMER, SOLD_AT)
    ).then(sold(unit_price=Decimal(2), country="France", customer_id=CUSTOMER, occurred_at=SOLD_AT))


def test_a_sale_takes_the_price_of_its_moment():
    scenario(Item).given(registered, ItemRepriced(unit_price=Decimal(3))).when(
        lambda item: item.sell(3, "536365")
    ).then(sold(unit_price=Decimal(3)))


def test_the_last_piece_is_sold():
    scenario(Item).given(registered).when(lambda item: item.sell(10, "536365")).then_state(
        on_hand=0
    )


def test_more_than_there_is_is_not_sold():
    scenario(Item).given(registered).when(lambda item: item.sell(11, "536365")).then_refused(
        InsufficientStock("22423", requested=11, available=10)
    )


def test_a_sale_at_an_invalid_price_is_refused():
    scenario(Item).given(registered).when(
        lambda item: item.sell(1, "536365", Decimal("0.0001"))
    ).then_refused(InvalidPrice(Decimal("0.0001")))


def test_a_discontinued_item_sells_nothing():
    scenario(Item).given(registered, discontinued).when(
        lambda item: item.sell(1, "536365")
    ).then_refused(ItemIsDiscontinued("22423"))


# Taking back


def test_taking_sold_stock_back():
    scenario(Item).given(registered, sold()).when(lambda item: item.take_back(3, "536365")).then(
        returned()
    ).then_state(on_hand=10)


def test_a_return_without_a_sale_before_is_taken():
    scenario(Item).given(registered).when(lambda item: item.take_back(3, "536365")).then(returned())


def test_a_discontinued_item_takes_returns():
    scenario(Item).given(registered, discontinued).when(
        lambda item: item.take_back(3, "536365")
    ).then(returned()).then_state(on_hand=13)


def test_a_return_at_an_invalid_price_is_refused():
    scenario(Item).given(registered).when(
        lambda item: item.take_back(1, "536365", Decimal(-1))
    ).then_refused(InvalidPrice(Decimal(-1)))


# Writing off


def test_writing_stock_off():
    scenario(Item).given(registered).when(lambda item: item.write_off(4, "broken")).then(
        StockWrittenOff(quantity=4, reason="broken")
    ).then_state(on_hand=6)


def test_more_than_there_is_is_not_written_off():
    scenario(Item).given(registered).when(lambda item: item.write_off(11, "broken")).then_refused(
        InsufficientStock("22423", requested=11, available=10)
    )


# Discontinuing


def test_discontinuing_an_item():
    scenario(Item).given(registered).when(Item.discontinue).then(discontinued).then_state(
        discontinued=True
    )


def test_an_item_is_discontinued_only_once():
    scenario(Item).given(registered, discontinued).when(Item.discontinue).then_refused(
        ItemIsDiscontinued("22423")
    )


@pytest.mark.parametrize(
    "move",
    [
        lambda item: item.rename("Stand", SOLD_AT),
        lambda item: item.reprice(PRICE, SOLD_AT),
        lambda item: item.receive(1, SOLD_AT),
        lambda item: item.sell(1, "536365", occurred_at=SOLD_AT),
        lambda item: item.take_back(1, "536365", occurred_at=SOLD_AT),
        lambda item: item.write_off(1, "broken", SOLD_AT),
        lambda item: item.discontinue(SOLD_AT),
    ],
)
def test_every_event_says_when_it_occurred(move):
    item = Item.register("22423", "Cakestand", PRICE, 10, 2, SOLD_AT)
    move(item)
    assert [event.occurred_at for event in item.collect_events()] == [SOLD_AT, SOLD_AT]


# Reorders


def test_opening_a_reorder():
    scenario(Reorder, "22423/1").when(lambda _: Reorder.open("22423", 1, 2, 3)).then(
        opened
    ).then_state(sku="22423", number=1, is_open=True, version=1)


def test_sku_and_number_identify_a_reorder():
    reorder = Reorder.open("22423", 2, 2, 3)
    assert reorder.id == Reorder.id_of("22423/2") == Reorder.id_of(Reorder.key_of("22423", 2))


def test_closing_a_reorder():
    scenario(Reorder).given(opened).when(lambda reorder: reorder.close(5)).then(
        ReorderClosed(received=5)
    ).then_state(is_open=False)


def test_a_reorder_is_closed_only_once():
    scenario(Reorder).given(opened, ReorderClosed(received=5)).when(
        lambda reorder: reorder.close(5)
    ).then_refused(ReorderIsClosed("22423", 1))


def test_every_event_of_a_reorder_says_when_it_occurred():
    reorder = Reorder.open("22423", 1, 2, 3, SOLD_AT)
    reorder.close(5, SOLD_AT)
    assert [event.occurred_at for event in reorder.collect_events()] == [SOLD_AT, SOLD_AT]
