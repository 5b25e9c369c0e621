"""The circuit breaker: what opens and closes it, and who may call."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import circuitbreaker
import pytest

from leftfold.domain import DomainError, Err, Ok
from leftfold.infrastructure import CircuitBreaker, CircuitOpenError, CircuitState
from leftfold.infrastructure.resilience import InvalidPolicyError

pytestmark = pytest.mark.anyio

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Refusal(DomainError, message="no"):
    pass


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(clock):
    def make(failure_threshold=3, recovery_timeout=10.0, **options):
        return CircuitBreaker(failure_threshold, recovery_timeout, clock=clock, **options)

    return make


def boom(error=ConnectionError):
    raise error


async def boom_async(error=ConnectionError):
    await asyncio.sleep(0)
    raise error


def fail(breaker, times=1, error=ConnectionError):
    for _ in range(times):
        with suppress(error):
            breaker.call_sync(boom, error)


@pytest.fixture
def opened(make, clock):
    """A breaker that is open; `clock.now += 10` makes it half-open."""
    breaker = make(1)
    fail(breaker)
    return breaker


# States


async def test_a_new_breaker_is_closed_and_lets_calls_pass(make):
    breaker = make()
    assert await breaker.call(asyncio.sleep, 0, "answer") == "answer"
    assert breaker.state is CLOSED
    assert breaker.retry_after == 0


async def test_it_opens_after_so_many_failures_in_a_row(make):
    breaker = make(3)
    for n in range(3):
        assert breaker.state is CLOSED, n
        with pytest.raises(ConnectionError):
            await breaker.call(boom_async)
    assert breaker.state is OPEN


def test_a_success_ends_the_row(make):
    breaker = make(3)
    fail(breaker, 2)
    breaker.call_sync(int)
    fail(breaker, 2)
    assert breaker.state is CLOSED
    fail(breaker)
    assert breaker.state is OPEN


def test_while_it_is_open_nothing_is_called_and_the_error_says_until_when(opened, clock):
    clock.now += 4
    called = []
    with pytest.raises(CircuitOpenError) as raised:
        opened.call_sync(called.append, 1)
    assert raised.value == CircuitOpenError("breaker", 6.0)
    assert str(raised.value) == "breaker is open for 6 s"
    assert called == []


def test_after_the_recovery_timeout_a_success_closes_it(opened, clock):
    clock.now += 10
    assert opened.state is HALF_OPEN
    assert opened.call_sync(int) == 0
    assert opened.state is CLOSED


def test_after_the_recovery_timeout_one_failure_opens_it_again(make, clock):
    breaker = make(3)
    fail(breaker, 3)
    clock.now += 10
    fail(breaker)
    assert breaker.state is OPEN
    assert breaker.retry_after == 10
    clock.now += 9.9
    assert breaker.state is OPEN


def test_a_fraction_of_a_second_is_a_recovery_timeout(make, clock):
    breaker = make(1, 0.25)
    fail(breaker)
    clock.now += 0.2
    assert breaker.state is OPEN
    clock.now += 0.06
    assert breaker.state is HALF_OPEN


async def test_it_may_be_isolated_and_reset_by_hand(make, clock):
    breaker = make()
    breaker.isolate()
    clock.now += 1000
    with pytest.raises(CircuitOpenError) as raised:
        await breaker.call(boom_async)
    assert raised.value.retry_after is None
    assert str(raised.value) == "breaker is open until it is reset"
    assert breaker.state is OPEN
    breaker.reset()
    assert breaker.state is CLOSED
    assert breaker.call_sync(int) == 0


def test_it_counts_what_it_has_seen(make, clock):
    breaker = make(2)
    fail(breaker, 2)
    fail(breaker, 3, CircuitOpenError)
    clock.now += 10
    fail(breaker)
    stats = breaker.stats
    assert (stats.failures, stats.rejected, stats.opened) == (3, 3, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"failure_threshold": 0},
        {"failure_threshold": -1},
        {"failure_threshold": 2.5},
        {"failure_threshold": True},
        {"recovery_timeout": 0},
        {"recovery_timeout": -1},
        {"recovery_timeout": float("nan")},
        {"recovery_timeout": float("inf")},
        {"recovery_timeout": "1"},
        {"probes": 0},
        {"probe_lease": 0},
        {"cancelled_after": -1},
        {"fallback": 3},
        {"failures": 3},
        {"failures": ()},
        {"failures": BaseException},
        {"failures": (ValueError, "x")},
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(make, arguments):
    with pytest.raises(InvalidPolicyError):
        make(**arguments)


# What counts


async def test_only_named_exceptions_are_failures(make):
    breaker = make(1, failures=(ConnectionError, TimeoutError))
    with suppress(ValueError):
        await breaker.call(boom_async, ValueError)
    assert breaker.state is CLOSED
    with suppress(TimeoutError):
        await breaker.call(boom_async, TimeoutError)
    assert breaker.state is OPEN


async def test_an_error_in_a_result_counts_if_it_is_named(make):
    breaker = make(1, failures=Refusal)
    assert await breaker.call(lambda: Err(Refusal())) == Err(Refusal())
    assert breaker.state is OPEN


async def test_by_default_what_is_returned_is_no_failure(make):
    breaker = make(1)
    await breaker.call(lambda: Err(Refusal()))
    assert breaker.state is CLOSED


async def test_a_question_is_asked_of_exceptions_and_results(make):
    asked = []
    breaker = make(2, failures=lambda outcome: asked.append(outcome) or outcome == Ok(500))
    await breaker.call(lambda: Ok(500))
    with suppress(ValueError):
        await breaker.call(boom_async, ValueError("x"))
    await breaker.call(lambda: Ok(500))
    assert breaker.state is OPEN
    assert [type(outcome).__name__ for outcome in asked] == ["Ok", "ValueError", "Ok"]


# Defects of the `circuitbreaker` package, none of which may come back


async def test_an_open_breaker_rejects_async_calls(opened):
    """`call_async` of the package calls whatever the state is."""
    with pytest.raises(CircuitOpenError):
        await opened.call(boom_async)


@pytest.mark.parametrize("is_async", [False, True])
async def test_with_on_an_open_breaker_raises_and_does_not_close_it(opened, is_async):
    async def enter():
        if is_async:
            async with opened:
                pytest.fail("it was entered")
        else:
            with opened:
                pytest.fail("it was entered")

    with pytest.raises(CircuitOpenError):
        await enter()
    assert opened.state is OPEN


@pytest.mark.parametrize("probes", [1, 3])
async def test_of_many_calls_at_once_only_the_probes_pass_half_open(make, clock, probes):
    breaker = make(1, probes=probes)
    fail(breaker)
    clock.now += 10
    gate = asyncio.Event()
    calls = [asyncio.ensure_future(breaker.call(gate.wait)) for _ in range(100)]
    await asyncio.sleep(0.01)
    rejected = [call.exception() for call in calls if call.done()]
    assert len(rejected) == 100 - probes
    assert {type(error) for error in rejected} == {CircuitOpenError}
    gate.set()
    await asyncio.gather(*(call for call in calls if not call.done()))
    assert breaker.state is CLOSED


async def test_of_many_threads_at_once_one_probes(opened, clock):
    clock.now += 10
    gate = threading.Event()
    with ThreadPoolExecutor(20) as threads:
        calls = [threads.submit(opened.call_sync, gate.wait) for _ in range(20)]
        while sum(call.done() for call in calls) < 19:  # noqa: ASYNC110 - they are threads
            await asyncio.sleep(0.001)
        gate.set()
    assert sum(call.exception() is None for call in calls) == 1


async def test_a_cancelled_probe_neither_closes_nor_opens_and_makes_room(opened, clock):
    clock.now += 10
    probe = asyncio.ensure_future(opened.call(asyncio.sleep, 60))
    await asyncio.sleep(0)
    probe.cancel()
    with suppress(asyncio.CancelledError):
        await probe
    assert opened.state is HALF_OPEN
    assert opened.call_sync(int) == 0
    assert opened.state is CLOSED


async def test_a_cancelled_call_does_not_end_the_row_of_failures(make):
    breaker = make(2)
    fail(breaker)
    call = asyncio.ensure_future(breaker.call(asyncio.sleep, 60))
    await asyncio.sleep(0)
    call.cancel()
    with suppress(asyncio.CancelledError):
        await call
    fail(breaker)
    assert breaker.state is OPEN


async def begun(breaker):
    """Begin a call; what is returned ends it."""
    outcome = asyncio.get_running_loop().create_future()
    call = asyncio.ensure_future(breaker.call(lambda: outcome))
    await asyncio.sleep(0)

    async def end(error=None):
        outcome.set_exception(error) if error else outcome.set_result(None)
        await asyncio.wait([call])
        call.exception()

    return end


async def test_a_late_success_of_an_earlier_state_does_not_close_it(make):
    breaker = make(1)
    end = await begun(breaker)
    fail(breaker)
    await end()
    assert breaker.state is OPEN


async def test_a_late_failure_does_not_begin_the_recovery_timeout_again(make, clock):
    breaker = make(1)
    end = await begun(breaker)
    fail(breaker)
    clock.now += 9
    await end(ConnectionError())
    assert breaker.retry_after == 1


async def test_a_late_failure_does_not_open_what_has_recovered(make, clock):
    breaker = make(1)
    end = await begun(breaker)
    fail(breaker)
    clock.now += 10
    breaker.call_sync(int)
    await end(ConnectionError())
    assert breaker.state is CLOSED


async def test_an_exception_that_is_no_failure_leaves_the_row_as_it_is(make):
    breaker = make(2, failures=ConnectionError)
    fail(breaker)
    fail(breaker, 1, ValueError)
    fail(breaker)
    assert breaker.state is OPEN


async def test_an_exception_that_is_no_failure_does_not_close_a_half_open_one(make, clock):
    breaker = make(1, failures=ConnectionError)
    fail(breaker)
    clock.now += 10
    fail(breaker, 1, ValueError)
    assert breaker.state is HALF_OPEN
    fail(breaker)
    assert breaker.state is OPEN


def test_zero_is_refused_and_does_not_become_a_default():
    with pytest.raises(InvalidPolicyError, match="failure_threshold: 0"):
        CircuitBreaker(0, 0)


class Callable:
    async def __call__(self, error=ConnectionError):
        await boom_async(error)


@pytest.mark.parametrize(
    "func",
    [
        lambda: boom_async(),  # noqa: PLW0108 - a lambda that answers a coroutine is the case
        Callable(),
        functools.partial(boom_async, ConnectionError),
        boom_async,
    ],
    ids=["lambda", "object", "partial", "function"],
)
async def test_whatever_answers_an_awaitable_counts_when_it_was_awaited(make, func):
    for guard in (lambda breaker: breaker(func), lambda breaker: lambda: breaker.call(func)):
        breaker = make(2)
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await guard(breaker)()
        assert breaker.state is OPEN


async def test_a_sync_fallback_answers_for_an_async_function(make):
    breaker = make(1, fallback=lambda sku: f"no {sku}")

    @breaker
    async def fetch(sku):
        raise ConnectionError(sku)

    with suppress(ConnectionError):
        await fetch("A")
    assert await fetch("A") == "no A"
    assert await breaker.call(fetch.__wrapped__, "B") == "no B"


async def test_an_outer_timeout_counts_if_the_call_had_its_time(make, clock):
    breaker = make(1, cancelled_after=5.0)
    for waited, state in ((4.0, CLOSED), (5.0, OPEN)):
        call = asyncio.ensure_future(breaker.call(asyncio.sleep, 60))
        await asyncio.sleep(0)
        clock.now += waited
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call
        assert breaker.state is state


async def test_a_probe_that_hangs_blocks_others_no_longer_than_its_lease(make, clock):
    breaker = make(1, probe_lease=2.0)
    fail(breaker)
    clock.now += 10
    end = await begun(breaker)
    with pytest.raises(CircuitOpenError) as raised:
        breaker.call_sync(int)
    assert raised.value.retry_after == 2
    clock.now += 2
    assert breaker.call_sync(int) == 0
    assert breaker.state is CLOSED
    await end(ConnectionError())
    assert breaker.state is CLOSED


def test_breakers_of_one_name_are_each_their_own(make):
    one, other = make(1, name="db"), make(1, name="db")
    one(boom), other(boom)
    fail(one)
    assert (one.state, other.state) == (OPEN, CLOSED)
    assert circuitbreaker.CircuitBreakerMonitor.circuit_breakers == {}


# Forms


def test_it_decorates_functions_and_keeps_what_they_are(make):
    @make(1)
    def double(number):
        """Twice."""
        return number * 2

    assert double(4) == 8
    assert (double.__name__, double.__doc__) == ("double", "Twice.")
    assert inspect.iscoroutinefunction(make()(boom_async))


@pytest.mark.parametrize("is_async", [False, True])
def test_a_generator_is_refused(make, is_async):
    def sync():
        yield

    async def asynchronous():
        yield

    with pytest.raises(TypeError, match="use `with`"):
        make()(asynchronous if is_async else sync)


async def test_a_block_counts_as_one_call(make, clock):
    breaker = make(2)
    for _ in range(2):
        with suppress(ConnectionError):
            async with breaker:
                raise ConnectionError
    assert breaker.state is OPEN
    clock.now += 10
    with breaker:
        assert breaker.state is HALF_OPEN
    assert breaker.state is CLOSED


def test_blocks_may_be_nested_and_of_several_breakers(make):
    one, other = make(1), make(1)
    with suppress(ConnectionError), one, other, one:
        raise ConnectionError
    assert (one.state, other.state) == (OPEN, OPEN)


def test_a_block_left_elsewhere_than_it_was_entered_is_told(make):
    breaker = make()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(breaker.__enter__).result()
    with pytest.raises(RuntimeError, match="another task or thread"):
        breaker.__exit__(None, None, None)


async def test_listeners_are_told_of_each_change_in_order(make, clock):
    breaker = make(1, name="db")
    told = []
    breaker.listen(lambda change: 1 / 0)  # harms nobody
    breaker.listen(told.append)
    breaker.listen(lambda change: breaker.state)  # may look at it
    fail(breaker)
    clock.now += 10
    breaker.call_sync(int)
    breaker.isolate()
    breaker.reset()
    assert [(t.before, t.after) for t in told] == [
        (CLOSED, OPEN),
        (OPEN, HALF_OPEN),
        (HALF_OPEN, CLOSED),
        (CLOSED, OPEN),
        (OPEN, CLOSED),
    ]
    assert isinstance(told[0].cause, ConnectionError)
    assert repr(told[0]) == "db: closed to open"


def test_a_listener_may_change_the_breaker(make):
    breaker = make(1)
    told = []
    breaker.listen(lambda change: change.after is OPEN and breaker.reset())
    breaker.listen(lambda change: told.append(change.after))
    fail(breaker)
    assert breaker.state is CLOSED
    assert told == [OPEN, CLOSED]
