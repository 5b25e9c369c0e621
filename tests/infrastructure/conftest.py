from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from proxy import Proxy

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


@pytest.fixture
def proxy_type():
    """What stands between a test and its database; a module may have one of its own."""
    return Proxy


@pytest.fixture
def proxy(postgres_url, proxy_type):
    """A proxy before an empty database, with the URL that goes through it."""
    parts = urlsplit(postgres_url)
    directory = parse_qs(parts.query)["host"][0]
    proxy = proxy_type(next(Path(directory).glob(".s.PGSQL.*[0-9]")))
    proxy.url = f"postgresql://postgres@127.0.0.1:{proxy.port}{parts.path}"
    yield proxy
    proxy.close()
