"""Subscribers: effects outside of the store, at least once for each event, in order by key."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import Event as Signal
from threading import current_thread, main_thread
from uuid import uuid4

import pytest
from waiting import until

from leftfold.application import Command, EventStoreUnavailable, Projection, Service, Subscriber
from leftfold.application.items import item_model, item_stock
from leftfold.application.ports import EncodedEvent, Group, Save
from leftfold.domain import DomainError, Err, Ok
from leftfold.domain.items import Item, StockReceived, StockSold
from leftfold.infrastructure import (
    CacheUnavailableError,
    CircuitBreaker,
    ReaderState,
    Runtime,
    Settings,
    follower,
    pages,
    runtime,
    subscriptions,
)

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True)
class Seen:
    quantity: int


class Told:
    """What a subscriber was told of, sales by their quantities; some of them fail."""

    def __init__(self, *failing, seconds=0.0):
        self.sales = []
        self.attempts = 0
        self.failing = set(failing)
        self.seconds = seconds

    async def sold(self, event):
        self.attempts += 1
        await asyncio.sleep(self.seconds)
        if event.quantity in self.failing:
            raise ConnectionError(event.invoice)
        self.sales.append(event.quantity)


def telling(effect, *event_types, name="tells", **options):
    tells = Subscriber(name, **options)
    for event_type in event_types or (StockSold,):
        tells.on(event_type)(effect)
    return tells


@asynccontextmanager
async def opened(url, *subscribers, projections=item_model.projections, **options):
    model = replace(item_model, projections=projections, subscribers=subscribers)
    async with Runtime(model, settings=Settings(store=url, **options)) as shop:
        yield shop


async def sold(shop, sell, *quantities, sku="A"):
    for quantity in quantities:
        (await shop.commands.dispatch(sell(sku, quantity))).unwrap()


def health(shop, name="tells"):
    return next(p for p in shop.health().projections if p.name == name)


@pytest.fixture
def _few_attempts(monkeypatch):
    monkeypatch.setattr(subscriptions, "ATTEMPTS", 2)
    monkeypatch.setattr(subscriptions, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(subscriptions, "JITTER", 0.0)


# What it is told of ---------------------------------------------------------------------------


async def test_it_is_told_of_each_event_in_order(store_url, register, sell, receive):
    told = Told()
    async with opened(store_url, telling(told.sold)) as shop:
        await shop.commands.dispatch_all([register("A", 100), register("B", 100)])
        await sold(shop, sell, *range(1, 8))
        await shop.commands.dispatch(receive("A"))
        await sold(shop, sell, 8, 9, sku="B")
        (await shop.catch_up()).unwrap()
        assert health(shop).lag == 0
    assert told.sales == [*range(1, 10)]


async def test_a_plain_function_is_called_in_a_thread(store_url, register, sell):
    threads = []
    async with opened(store_url, telling(lambda _: threads.append(current_thread()))) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1)
        (await shop.catch_up()).unwrap()
    assert len(threads) == 1
    assert threads[0] is not main_thread()


def apply(function, event):
    return function(event)


async def test_a_plain_function_that_answers_a_coroutine_is_awaited(store_url, register, sell):
    told = Told()
    plain = partial(apply, told.sold)
    async with opened(store_url, telling(plain)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1)
        (await shop.catch_up()).unwrap()
    assert told.sales == [1]


async def test_each_type_of_events_may_have_an_effect_of_its_own(
    store_url, register, sell, receive
):
    told = []
    tells = Subscriber("tells")
    tells.on(StockSold)(lambda event: told.append(f"sold {event.quantity}"))
    tells.on(StockReceived)(lambda event: told.append(f"received {event.quantity}"))
    async with opened(store_url, tells) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1)
        await shop.commands.dispatch(receive("A", 2))
        await sold(shop, sell, 3)
        (await shop.catch_up()).unwrap()
    assert told == ["sold 1", "received 2", "sold 3"]


async def test_an_effect_may_dispatch_commands(store_url, register, sell, receive):
    async def replace_it(event):
        (await shop.commands.dispatch(receive("A", event.quantity))).unwrap()

    async with opened(store_url, telling(replace_it)) as shop:
        await shop.commands.dispatch(register("A", 10))
        await sold(shop, sell, 2, 3)
        (await shop.catch_up()).unwrap()
        (await shop.catch_up()).unwrap()
        assert shop._store.views.get(item_stock, Item.id_of("A").hex).on_hand == 10


async def test_a_new_one_begins_at_the_logs_end(shared_url, register, sell):
    async with opened(shared_url) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1, 2)
    told = Told()
    async with opened(shared_url, telling(told.sold)) as shop:
        await sold(shop, sell, 3)
        (await shop.catch_up()).unwrap()
        assert health(shop).state == "live"
    async with opened(shared_url) as shop:
        await sold(shop, sell, 4)
    async with opened(shared_url, telling(told.sold)) as shop:
        (await shop.catch_up()).unwrap()
    assert told.sales == [3, 4]


async def test_a_new_one_may_begin_at_the_beginning(shared_url, register, sell):
    async with opened(shared_url) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1, 2)
    told = Told()
    async with opened(shared_url, telling(told.sold, from_beginning=True)) as shop:
        (await shop.catch_up()).unwrap()
        assert health(shop).state == "live"
    assert told.sales == [1, 2]


async def test_what_has_nothing_to_tell_does_not_ask_the_store_all_the_time(store_url, register):
    view_less = {"projections": ()}
    async with opened(store_url, telling(Told().sold), **view_less) as shop:
        await shop.commands.dispatch(register("A", 100))
        (await shop.catch_up()).unwrap()
        genuine, asked = shop._store.log.head, []

        def head():
            asked.append(1)
            return genuine()

        shop._store.log.head = head
        await asyncio.sleep(0.5)
    assert len(asked) < 20


# What fails -----------------------------------------------------------------------------------


async def test_an_effect_that_fails_is_tried_again_later_and_later(store_url, register, sell):
    times = []

    async def fails_twice(event):
        times.append(time.monotonic())
        if len(times) < 3:
            raise ConnectionError

    async with opened(store_url, telling(fails_twice)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1)
        (await shop.catch_up()).unwrap()
        assert await shop.dead_letters("tells") == ()
    assert len(times) == 3
    assert times[1] - times[0] >= 0.1
    assert times[2] - times[1] >= 0.2


@pytest.mark.usefixtures("_few_attempts")
async def test_what_keeps_failing_is_put_aside_with_what_follows_of_its_key(
    store_url, register, sell
):
    told = Told(3)
    async with opened(store_url, telling(told.sold)) as shop:
        await shop.commands.dispatch_all([register("A", 100), register("B", 100)])
        await sold(shop, sell, 1, 3, 4, 3)
        await sold(shop, sell, 5, 6, sku="B")
        (await shop.catch_up()).unwrap()
        assert told.sales == [1, 5, 6]
        assert told.attempts == 5
        letters = await shop.dead_letters("tells")
        assert [letter.version for letter in letters] == [3, 4, 5]
        assert {letter.key for letter in letters} == {Item.id_of("A").hex}
        assert "ConnectionError in sold" in letters[0].error
        assert "536365" not in letters[0].error
        assert [letter.error for letter in letters[1:]] == ["", ""]
        assert health(shop).dead_letters == 3
        assert shop.health().is_healthy


@pytest.mark.usefixtures("_few_attempts")
async def test_a_retry_tells_in_order_of_what_was_put_aside(store_url, register, sell):
    told = Told(3)
    async with opened(store_url, telling(told.sold)) as shop:
        await shop.commands.dispatch_all([register("A", 100), register("B", 100)])
        await sold(shop, sell, 3, 1, 2)
        await sold(shop, sell, 3, 4, sku="B")
        (await shop.catch_up()).unwrap()
        tried = await shop.retry("tells")
        assert (tried.released, tried.kept, told.sales) == (0, 5, [])
        told.failing.clear()
        tried = await shop.retry("tells")
        assert (tried.released, tried.kept) == (5, 0)
        assert told.sales == [3, 1, 2, 3, 4]
        await sold(shop, sell, 7)
        (await shop.catch_up()).unwrap()
        assert told.sales[-1] == 7
        assert await shop.dead_letters("tells") == ()


@pytest.mark.usefixtures("_few_attempts")
async def test_a_retry_stops_at_the_next_of_a_key_that_fails(store_url, register, sell):
    told = Told(3, 5)
    async with opened(store_url, telling(told.sold)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 3, 4, 5, 6)
        (await shop.catch_up()).unwrap()
        told.failing = {5}
        tried = await shop.retry("tells")
        assert (tried.released, tried.kept, told.sales) == (2, 2, [3, 4])
        five, six = await shop.dead_letters("tells")
        assert "ConnectionError" in five.error
        assert six.error == ""


@pytest.mark.usefixtures("_few_attempts")
async def test_what_is_given_up_lets_what_follows_be_told(store_url, register, sell):
    told = Told(3)
    async with opened(store_url, telling(told.sold)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 3, 4)
        (await shop.catch_up()).unwrap()
        first, *_ = await shop.dead_letters("tells")
        assert await shop.drop_dead_letters("tells", first.position) == 1
        assert (await shop.retry("tells")).released == 1
        await sold(shop, sell, 5)
        (await shop.catch_up()).unwrap()
        assert told.sales == [4, 5]


@pytest.mark.usefixtures("_few_attempts")
async def test_a_retry_tells_also_of_what_was_put_aside_behind_it_meanwhile(
    store_url, register, sell
):
    told = Told(3)
    async with opened(store_url, telling(told.sold)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 3, 1)
        (await shop.catch_up()).unwrap()
        told.failing.clear()
        told.seconds = 0.2
        retrying = asyncio.ensure_future(shop.retry("tells"))
        await until(lambda: told.attempts == 3)
        await sold(shop, sell, 2)  # behind those two
        await until(lambda: health(shop).dead_letters == 3)
        assert ((await retrying).released, told.sales) == (3, [3, 1, 2])
        assert await shop.dead_letters("tells") == ()


@pytest.mark.usefixtures("_few_attempts")
@pytest.mark.parametrize("other_process", [False, True])
async def test_what_is_being_told_is_not_told_again_because_dead_letters_change(
    shared_url, register, sell, other_process
):
    told = Told(3)
    told.failing.add(7)
    tells = telling(told.sold)
    async with opened(shared_url, tells) as shop, opened(shared_url, tells, follow=False) as cli:
        await shop.commands.dispatch_all([register("A", 100), register("B", 100)])
        await sold(shop, sell, 3)
        await sold(shop, sell, 7, sku="B")
        (await shop.catch_up()).unwrap()
        told.failing.clear()
        told.attempts, told.seconds = 0, 0.3
        await shop.commands.dispatch(register("C", 100))
        await sold(shop, sell, 1, sku="C")
        await until(lambda: told.attempts == 1)
        assert await (cli if other_process else shop).drop_dead_letters("tells") == 2
        await sold(shop, sell, 4)
        (await shop.catch_up()).unwrap()
        assert (told.sales, told.attempts) == ([1, 4], 2)


@pytest.mark.usefixtures("_few_attempts")
async def test_a_key_that_cannot_be_made_puts_its_event_aside(store_url, register, sell):
    def key(event):
        if event.quantity == 3:
            raise LookupError
        return event.invoice

    told = Told()
    async with opened(store_url, telling(told.sold, key=key)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1, 3, 2)
        (await shop.catch_up()).unwrap()
        (letter,) = await shop.dead_letters("tells")
        assert (letter.key, "LookupError in key" in letter.error) == (Item.id_of("A").hex, True)
    assert told.sales == [1, 2]


@pytest.mark.usefixtures("_few_attempts")
async def test_a_key_that_no_index_takes_puts_its_event_aside(store_url, register, sell):
    told = Told()
    subscriber = telling(told.sold, key=lambda event: event.invoice * (999 * (event.quantity == 3)))
    async with opened(store_url, subscriber) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1, 3, 2)
        (await shop.catch_up()).unwrap()
        (letter,) = await shop.dead_letters("tells")
        assert letter.key == Item.id_of("A").hex
    assert told.sales == [1, 2]


async def test_an_event_of_an_unknown_type_is_put_aside(store_url, register, sell):
    told = Told()
    async with opened(store_url, telling(told.sold), projections=()) as shop:
        await shop.commands.dispatch_all([register("A", 100), register("B", 100)])
        stored = shop._store.log.read(0, 1)[0]
        unknown = EncodedEvent(Item.id_of("B"), 2, "of.another.release", stored.state)
        save = Save(uuid4(), "Other", [unknown], ((unknown.aggregate_id, 2),), None)
        shop._store.log.commit([Group([save])])
        await sold(shop, sell, 1)
        (await shop.catch_up()).unwrap()
        (letter,) = await shop.dead_letters("tells")
        assert (letter.key, letter.topic) == (Item.id_of("B").hex, "of.another.release")
        tried = await shop.retry("tells")
        assert (tried.released, tried.kept) == (0, 1)
    assert told.sales == [1]


async def test_what_a_breaker_rejects_waits_and_is_not_put_aside(store_url, register, sell):
    told, breaker = Told(1), CircuitBreaker(2, 0.4, name="mail")

    async def mails(event):
        await breaker.call(told.sold, event)

    async with opened(store_url, telling(mails)) as shop:
        await shop.commands.dispatch_all([register("A", 100), register("B", 100)])
        await sold(shop, sell, 1)
        await sold(shop, sell, 2, 3, sku="B")
        await until(lambda: health(shop).state == "waiting")
        told.failing.clear()
        (await shop.catch_up()).unwrap()
        assert health(shop).state == "live"
        assert await shop.dead_letters("tells") == ()
    assert told.sales == [1, 2, 3]


@pytest.mark.usefixtures("_few_attempts")
async def test_what_the_store_cannot_take_now_waits_and_is_not_put_aside(store_url, register, sell):
    told, is_away = Told(), [True]

    async def writes(event):
        if is_away:
            Err(EventStoreUnavailable("it is away")).unwrap()
        await told.sold(event)

    async with opened(store_url, telling(writes)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1, 2)
        await until(lambda: health(shop).state == "waiting")
        is_away.clear()
        (await shop.catch_up()).unwrap()
        assert await shop.dead_letters("tells") == ()
    assert told.sales == [1, 2]


class Wait(Command[int, DomainError]):
    """Takes its time."""


class Waits(Service):
    def handlers(self):
        yield Wait.handled_by(self.wait)

    async def wait(self, _):
        await asyncio.sleep(0.6)
        return Ok(0)


@pytest.mark.usefixtures("_few_attempts")
async def test_an_effect_whose_command_is_refused_since_the_runtime_closes_comes_again(
    shared_url, register, sell, receive
):
    begun, told = asyncio.Event(), []

    async def replace_it(event):
        begun.set()
        await asyncio.sleep(0.1)
        told.append((await shop.commands.dispatch(receive("A", event.quantity))).unwrap())

    model = replace(
        item_model,
        services=(*item_model.services, Waits),
        subscribers=(telling(replace_it),),
    )
    async with Runtime(model, shared_url) as shop:
        await shop.commands.dispatch(register("A", 10))
        waiting = asyncio.ensure_future(shop.commands.dispatch(Wait()))
        await sold(shop, sell, 2)
        await begun.wait()  # and now the runtime closes, which waits for the command
    assert (await waiting, told) == (Ok(0), [])
    async with Runtime(model, shared_url) as shop:
        (await shop.catch_up()).unwrap()
        assert await shop.dead_letters("tells") == ()
    assert len(told) == 1


# Views that it needs --------------------------------------------------------------------------


async def test_an_event_is_held_back_until_the_views_have_seen_it(store_url, register, sell):
    """Whoever is told of an event may ask the view about it."""
    seen = []

    async def asks(event):
        row = await asyncio.to_thread(shop._store.views.get, item_stock, event.originator_id.hex)
        seen.append((event.quantity, row.units_sold >= event.quantity))

    async with opened(store_url, telling(asks, needs=[item_stock])) as shop:
        await shop.commands.dispatch(register("A", 1_000))
        for n in range(1, 16):
            await sold(shop, sell, n)
            if n % 5 == 0:
                await asyncio.sleep(0.02)
        (await shop.catch_up()).unwrap()
    assert seen == [(n, True) for n in range(1, 16)]


@dataclass(frozen=True, slots=True)
class Sales:
    sold: int


def slow_view(may_fold=None, version=1):
    """A view that folds sales, when it may."""
    view = Projection("slow", version=version, row=Sales, on_poison="halt")

    @view.on(StockSold)
    def fold(row, event):
        if may_fold is not None and not may_fold():
            raise ZeroDivisionError
        time.sleep(0.005)
        return Sales((row.sold if row else 0) + event.quantity)

    return view


async def test_a_view_that_stopped_holds_events_back_until_it_goes_on(store_url, register, sell):
    told, is_mended = Told(), []
    view = slow_view(lambda: is_mended)
    tells = telling(told.sold, needs=[view])
    async with opened(store_url, tells, projections=(view,)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1, 2)
        await until(lambda: health(shop, "slow").failure is not None)
        await asyncio.sleep(0.1)
        assert told.sales == []
        is_mended.append(True)
        await shop.retry("slow")
        (await shop.catch_up()).unwrap()
    assert told.sales == [1, 2]


async def test_while_a_view_is_built_nothing_that_needs_it_is_told(shared_url, register, sell):
    async with opened(shared_url) as shop:
        await shop.commands.dispatch(register("A", 10_000))
        await shop.commands.dispatch_all([sell("A", n) for n in range(1, 61)])
    told, states = Told(), set()

    async def asks(event):
        states.add(health(shop, "slow").state)
        await told.sold(event)

    view = slow_view()
    tells = telling(asks, needs=[view], from_beginning=True)
    async with opened(shared_url, tells, projections=(view,), page_size=4) as shop:
        (await shop.catch_up(timeout=20)).unwrap()
    assert told.sales == [*range(1, 61)]
    assert states == {"live"}


async def test_a_view_that_another_process_folds_holds_events_back_too(shared_url, register, sell):
    told, may_fold = Told(), Signal()
    views = [slow_view(lambda: may_fold.wait(10)) for _ in range(2)]
    async with opened(shared_url, projections=views[:1]) as folding:
        await folding.commands.dispatch(register("A", 100))
        (await folding.catch_up()).unwrap()
        tells = telling(told.sold, needs=views[1:])
        async with opened(shared_url, tells, projections=views[1:]) as shop:
            await sold(shop, sell, 1)
            await asyncio.sleep(0.3)
            assert (told.sales, health(shop, "slow").state) == ([], "watched")
            may_fold.set()
            (await shop.catch_up()).unwrap()
    assert told.sales == [1]


# Ends, and several processes ------------------------------------------------------------------


async def test_closing_waits_for_the_effect_under_way_and_begins_no_other(
    shared_url, register, sell
):
    told = Told(seconds=0.3)
    async with opened(shared_url, telling(told.sold)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await shop.commands.dispatch_all([sell("A", n) for n in (1, 2, 3)])
        await until(lambda: told.attempts == 1)
    assert (told.sales, told.attempts) == ([1], 1)
    async with opened(shared_url, telling(told.sold)) as shop:
        (await shop.catch_up()).unwrap()
    assert told.sales == [1, 2, 3]


async def test_an_effect_that_fails_while_the_runtime_closes_is_not_put_aside(
    shared_url, register, sell
):
    told = Told(1)
    async with opened(shared_url, telling(told.sold)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1)
        await until(lambda: told.attempts == 1)
    assert told.attempts == 2  # the one that it waited for
    told.failing.clear()
    async with opened(shared_url, telling(told.sold)) as shop:
        (await shop.catch_up()).unwrap()
        assert await shop.dead_letters("tells") == ()
    assert told.sales == [1]


async def test_an_effect_that_hangs_does_not_keep_a_runtime_from_closing(
    caplog, shared_url, register, sell, monkeypatch
):
    monkeypatch.setattr(runtime, "PATIENCE", 0.3)
    told = Told(seconds=30)
    async with opened(shared_url, telling(told.sold)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1)
        await until(lambda: told.attempts == 1)
        begun = time.monotonic()
    assert time.monotonic() - begun < 5
    assert "closing goes on without it" in caplog.text
    told.seconds = 0.0
    async with opened(shared_url, telling(told.sold)) as shop:
        (await shop.catch_up()).unwrap()
    assert told.sales == [1]


async def test_of_two_runtimes_one_tells_and_the_other_when_that_closes(shared_url, register, sell):
    one, two = Told(), Told()
    async with opened(shared_url, telling(two.sold)) as other:
        async with opened(shared_url, telling(one.sold)) as shop:
            await shop.commands.dispatch(register("A", 1_000))
            for n in range(1, 21):
                await sold(shop, sell, n)
            (await shop.catch_up()).unwrap()
            states = sorted(health(each).state for each in (shop, other))
            assert states == ["live", "watched"]
        await sold(other, sell, 21)
        (await other.catch_up()).unwrap()
    (teller,) = (told for told in (one, two) if 20 in told.sales)
    assert teller.sales[:20] == [*range(1, 21)]
    assert sorted(one.sales + two.sales) == [*range(1, 22)]


@pytest.mark.parametrize("is_failing", [False, True])
async def test_while_an_effect_takes_long_its_subscriber_stays_with_its_process(
    shared_url, register, sell, monkeypatch, is_failing
):
    monkeypatch.setattr(follower, "LEASE", 1.0)
    monkeypatch.setattr(follower, "IDLE", 0.1)
    monkeypatch.setattr(follower, "RENEWED", 0.1)
    monkeypatch.setattr(subscriptions, "FIRST_WAIT", 0.9)  # and then twice as long
    monkeypatch.setattr(subscriptions, "ATTEMPTS", 3)
    one, two = (Told(*[1] * is_failing, seconds=0.0 if is_failing else 2.5) for _ in range(2))
    async with opened(shared_url, telling(one.sold)) as shop, opened(shared_url, telling(two.sold)):
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1)
        (await shop.catch_up(timeout=20)).unwrap()
        letters = await shop.dead_letters("tells")
    assert sorted((one.attempts, two.attempts)) == [0, 3 if is_failing else 1]
    assert len(letters) == is_failing


async def test_the_checkpoint_moves_while_slow_effects_go_on(
    store_url, register, sell, monkeypatch
):
    monkeypatch.setattr(subscriptions, "WITHIN", 0.1)
    told = Told(seconds=0.05)
    async with opened(store_url, telling(told.sold)) as shop:
        await shop.commands.dispatch(register("A", 1_000))
        await shop.commands.dispatch_all([sell("A", n) for n in range(1, 21)])
        await until(lambda: len(told.sales) == 8)
        assert health(shop).position > 3
        (await shop.catch_up()).unwrap()
    assert told.sales == [*range(1, 21)]


TELLS = """
    import random
    from dataclasses import replace
    from leftfold.application import Subscriber
    from leftfold.infrastructure import follower, subscriptions

    follower.LEASE, follower.IDLE = 0.4, 0.1
    subscriptions.AT_ONCE, chance = 7, random.Random(int(sys.argv[2]))
    tells = Subscriber("tells", from_beginning=True)

    def dies(likely):
        if chance.random() < likely:
            os.kill(os.getpid(), signal.SIGKILL)

    @tells.on(StockSold)
    async def sold(event):
        dies(0.01)
        say("told", event.originator_id.hex, event.originator_version)
        dies(0.01)

    async def main():
        model = replace(item_model, projections=(), subscribers=(tells,))
        async with Runtime(model, url) as shop:
            genuine = shop._store.views.write

            def write(changes, position, **options):
                dies(0.03)
                is_written = genuine(changes, position, **options)
                dies(0.03)
                return is_written

            shop._store.views.write = write
            say("ready")
            if (await shop.catch_up(timeout=60)).is_ok():
                say("end")

    asyncio.run(main())
"""


@pytest.mark.long
def test_a_process_that_is_killed_tells_some_again_and_loses_none(
    shared_url, start, register, sell
):
    chance = random.Random(5)
    sales = [sell(f"S{chance.randint(0, 4)}") for _ in range(150)]

    async def happens():
        async with opened(shared_url, follow=False) as shop:
            await shop.commands.dispatch_all([register(f"S{n}", 1_000) for n in range(5)])
            await shop.commands.dispatch_all(sales)

    asyncio.run(happens())
    said, deaths = [], 0
    while "end" not in said:
        child = start(TELLS, shared_url, str(deaths))
        said += child.says_until_it_ends(60)
        assert child.ends() in (0, -9), child.errors
        deaths += 1
    told = [tuple(line.split()[1:]) for line in said if line.startswith("told")]
    versions = {}
    for aggregate_id, version in dict.fromkeys(told):  # as each came first
        versions.setdefault(aggregate_id, []).append(int(version))
    assert deaths > 3
    assert sum(map(len, versions.values())) == 150
    assert all(of == [*range(2, len(of) + 2)] for of in versions.values())
    assert 0 < len(told) - 150 <= 7 * deaths


# Everywhere -----------------------------------------------------------------------------------


async def test_one_that_is_everywhere_is_told_by_each_runtime(shared_url, register, sell):
    one, two = Told(), Told()
    async with opened(shared_url, telling(one.sold, everywhere=True)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1)
        (await shop.catch_up()).unwrap()
        tells = telling(two.sold, everywhere=True)
        async with opened(shared_url, tells, follow=False) as other:
            await sold(shop, sell, 2, 3)
            for each in (shop, other):
                (await each.catch_up()).unwrap()
    assert (one.sales, two.sales) == ([1, 2, 3], [2, 3])


async def test_one_that_is_everywhere_is_not_told_again_when_a_view_gets_a_new_version(
    shared_url, register, sell
):
    def version(number):
        view = Projection("sales", version=number, row=Seen)
        view.on(StockSold)(lambda row, event: Seen(event.quantity))
        return view

    async def told_by(view, told, quantity):
        tells = telling(told.sold, everywhere=True, needs=(view,))
        async with opened(shared_url, tells, projections=(view,)) as shop:
            if quantity == 1:
                await shop.commands.dispatch(register("A", 100))
            (await shop.catch_up()).unwrap()
            await sold(shop, sell, quantity)
            (await shop.catch_up()).unwrap()
            await until(lambda: told.sales)
        return told.sales

    assert await told_by(version(1), Told(), 1) == [1]
    assert await told_by(version(2), Told(), 2) == [2]


async def test_what_is_cancelled_in_an_effect_fails_as_any_effect_does(store_url, register, sell):
    told = []

    async def effect(event):
        if event.quantity == 13:
            cancelled = asyncio.get_running_loop().create_future()
            cancelled.cancel()
            await cancelled
        told.append(event.quantity)

    async with opened(store_url, telling(effect)) as shop:
        await shop.commands.dispatch_all([register("A", 100), register("B", 100)])
        await sold(shop, sell, 13)
        await sold(shop, sell, 2, sku="B")
        (await shop.catch_up()).unwrap()
        (letter,) = await shop.dead_letters("tells")
        assert letter.error.startswith("CancelledError in effect")
        assert told == [2]


@pytest.mark.usefixtures("_few_attempts")
async def test_a_cache_that_is_away_is_no_fault_of_the_event(
    store_url, register, sell, monkeypatch
):
    monkeypatch.setattr(follower, "FIRST_PAUSE", 0.001)
    is_away, told = True, []

    async def effect(event):
        if is_away:
            raise CacheUnavailableError("redis://", "away")
        told.append(event.quantity)

    async with opened(store_url, telling(effect)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1, 2)
        await until(lambda: health(shop).state is ReaderState.WAITING)
        is_away = False
        (await shop.catch_up()).unwrap()
        assert await shop.dead_letters("tells") == ()
    assert told == [1, 2]


@pytest.mark.usefixtures("_few_attempts")
async def test_one_that_can_be_told_of_nothing_stops_in_the_end(
    store_url, register, sell, monkeypatch
):
    monkeypatch.setattr(pages, "MAX_DEAD_LETTERS", 3)
    told = Told(7)
    async with opened(store_url, telling(told.sold)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, *[7] * 6)
        await until(lambda: health(shop).state == "halted")
        assert "3 dead letters" in health(shop).failure
        told.failing.clear()
        await shop.retry("tells")
        (await shop.catch_up()).unwrap()
        assert told.sales == [7] * 6


@pytest.mark.parametrize("everywhere", [True, False])
async def test_a_lost_hint_is_made_good(shared_url, register, sell, everywhere):
    told = Told()
    tells = telling(told.sold, everywhere=everywhere, needs=[item_stock])
    async with opened(shared_url, tells) as shop, opened(shared_url, follow=False) as other:
        (await other.commands.dispatch(register("A", 100))).unwrap()
        (await shop.catch_up()).unwrap()
        store = shop._store
        if store.hints:
            store._listener.execute("UNLISTEN *")
        else:
            store.has_changed = lambda: False
        await sold(other, sell, 1)
        begun = time.monotonic()
        while not told.sales:
            assert time.monotonic() - begun < 5
            await asyncio.sleep(0.01)
    assert told.sales == [1]


@pytest.mark.usefixtures("_few_attempts")
async def test_of_one_that_is_everywhere_what_keeps_failing_is_logged(
    caplog, store_url, register, sell
):
    caplog.set_level(logging.ERROR, "leftfold.subscriptions")
    told = Told(3)
    async with opened(store_url, telling(told.sold, everywhere=True)) as shop:
        await shop.commands.dispatch(register("A", 100))
        await sold(shop, sell, 1, 3, 2)
        (await shop.catch_up()).unwrap()
    assert told.sales == [1, 2]
    assert "tells was not told of 3: ConnectionError in sold" in caplog.text
