from __future__ import annotations

from decimal import Decimal

import pytest

from leftfold.application.items import ReceiveStock, RegisterItem, SellStock


@pytest.fixture
def register():
    def register(sku="A", stock=10):
        return RegisterItem(sku=sku, name="Cup", unit_price=Decimal("2.55"), opening_stock=stock)

    return register


@pytest.fixture
def sell():
    def sell(sku="A", quantity=1):
        return SellStock(sku=sku, quantity=quantity, invoice="536365")

    return sell


@pytest.fixture
def receive():
    def receive(sku="A", quantity=1):
        return ReceiveStock(sku=sku, quantity=quantity)

    return receive
