"""The facade for programs without asyncio."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest

from leftfold.application import Command, Receipt, Service, described
from leftfold.application.items import (
    FindItems,
    GetItem,
    ItemHistory,
    Items,
    RegisterItem,
    item_model,
)
from leftfold.domain import Err, Metadata, Ok
from leftfold.domain.items import InsufficientStock, ItemAlreadyRegistered, ItemNotFound
from leftfold.infrastructure import NotRunningError, Runtime, StoreUnavailableError
from leftfold.infrastructure.items import open_items


@pytest.fixture
def shop(store_url):
    with open_items(store_url).blocking() as shop:
        yield shop


def test_commands_and_queries_are_answered(shop, register, sell):
    shop.commands.dispatch(register("A", 3)).unwrap()
    receipt = shop.commands.dispatch(sell("A", 2)).unwrap()
    assert isinstance(receipt, Receipt)
    row = shop.queries.dispatch(GetItem(sku="A"), after=receipt).unwrap()
    assert (row.on_hand, row.revenue) == (1, Decimal("5.10"))


def test_refusals_are_answers(shop, register, sell):
    shop.commands.dispatch(register("A", 1))
    assert shop.commands.dispatch(register("A", 1)) == Err(ItemAlreadyRegistered("A"))
    assert shop.commands.dispatch(sell("A", 2)) == Err(InsufficientStock("A", 2, 1))
    assert shop.queries.dispatch(GetItem(sku="B")) == Err(ItemNotFound("B"))


def test_views_are_waited_for(shop, register):
    receipt = shop.commands.dispatch(register("A", 3)).unwrap()
    assert shop.wait_for(receipt) == Ok(None)
    assert shop.health().projections[0].position == receipt.position
    assert shop.catch_up() == Ok(None)


def test_a_wait_that_takes_too_long_is_an_answer(shop, register):
    receipt = shop.commands.dispatch(register("A", 3)).unwrap()
    ahead = Receipt(receipt.command_id, (), receipt.position + 1)
    assert not shop.wait_for(ahead, timeout=0.1).is_ok()


def test_outside_input_is_parsed(shop, register):
    data = {"sku": "A", "name": "Cup", "unit_price": "2.55", "opening_stock": 10}
    assert shop.commands.parse("RegisterItem", data) == Ok(register())
    assert shop.queries.parse("GetItem", '{"sku":"A"}') == Ok(GetItem(sku="A"))
    assert not shop.commands.parse("RegisterItem", {}).is_ok()


def test_a_batch_is_carried_out_whole(shop, register, sell):
    assert len(shop.commands.dispatch_all([register("A", 2), sell("A", 2)]).unwrap()) == 2
    assert not shop.commands.dispatch_all([register("B", 2), sell("B", 3)]).is_ok()
    shop.catch_up()
    assert [row.sku for row in shop.queries.dispatch(FindItems()).unwrap().rows] == ["A"]


def test_many_threads_may_use_it_at_once(shop, register, sell):
    shop.commands.dispatch(register("A", 100))
    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(lambda _: shop.commands.dispatch(sell("A")), range(120)))
    assert sum(outcome.is_ok() for outcome in outcomes) == 100
    shop.catch_up()
    assert shop.queries.dispatch(GetItem(sku="A")).unwrap().on_hand == 0


def test_a_handlers_bug_is_raised(store_url, register):
    class Buggy(Items):
        def register(self, command):
            raise ZeroDivisionError(command.sku)

    assert issubclass(Buggy, Service)
    assert issubclass(RegisterItem, Command)
    model = Runtime(item_model, store_url).model
    buggy = type(model)(model.aggregates, (Buggy,), model.projections, model.queries)
    with Runtime(buggy, store_url).blocking() as shop:
        with pytest.raises(ZeroDivisionError, match="A"):
            shop.commands.dispatch(register("A"))
        assert shop.health().is_healthy


def test_it_can_not_be_used_before_it_is_opened_or_after_it_is_closed(store_url, register):
    blocking = open_items(store_url).blocking()
    uses = [
        lambda: blocking.commands.dispatch(register()),
        lambda: blocking.queries.dispatch(FindItems()),
        blocking.catch_up,
        blocking.health,
    ]
    for use in uses:
        with pytest.raises(NotRunningError):
            use()
    with blocking:
        pass
    for use in uses:
        with pytest.raises(NotRunningError):
            use()


def test_a_store_that_cannot_be_opened_is_said_and_leaves_no_thread(tmp_path):
    import threading

    before = threading.active_count()
    with pytest.raises(StoreUnavailableError):
        open_items(f"sqlite:///{tmp_path}").blocking().__enter__()
    assert threading.active_count() == before


def test_it_ends_with_the_block_also_when_the_block_raises(sqlite_url, register):
    def fails():
        with open_items(sqlite_url).blocking() as shop:
            shop.commands.dispatch(register("A"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    with open_items(sqlite_url).blocking() as shop:
        assert shop.commands.dispatch(register("A")) == Err(ItemAlreadyRegistered("A"))


def test_what_is_said_in_a_thread_is_on_its_events(shop, register):
    with described(user="ann"):
        shop.commands.dispatch(register("A"))
    shop.commands.dispatch(register("B"), metadata=Metadata(user="bob"))
    for sku, user in (("A", "ann"), ("B", "bob")):
        (event,) = shop.queries.dispatch(ItemHistory(sku=sku)).unwrap()
        assert event.metadata.user == user


def test_a_subject_is_forgotten_and_receipts_are_purged(shop, register):
    shop.commands.dispatch(register("A"))
    assert shop.forget("nobody") is False
    shop.provide_keys(["somebody"])
    assert shop.forget("somebody") is True
    assert shop.purge_receipts() == 0
