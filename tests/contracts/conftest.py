from __future__ import annotations

from contextlib import contextmanager

import pytest

from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.stores import make_store


@pytest.fixture
def opened():
    """Open the log of an empty store."""

    @contextmanager
    def opened(url):
        store = make_store(load_settings(store=url))
        store.open((), create_tables=True)
        yield store.log
        store.close()

    return opened
