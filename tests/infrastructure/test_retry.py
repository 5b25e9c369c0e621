"""Retry: what is made again, and after how long."""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leftfold.domain import Err, Ok
from leftfold.infrastructure import CircuitBreaker, CircuitOpenError, RetryPolicy
from leftfold.infrastructure.resilience import InvalidPolicyError, immediate_retries

pytestmark = pytest.mark.anyio

seconds = st.floats(0, 1e6)


class Time:
    """A clock that waiting moves."""

    def __init__(self):
        self.now = 0.0
        self.waits = []

    def pass_(self, wait):
        self.waits.append(wait)
        self.now += wait

    async def sleep(self, wait):
        self.pass_(wait)


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def make(time):
    def make(max_attempts=4, base_delay=1.0, jitter=0.0, **options):
        return RetryPolicy(
            max_attempts,
            base_delay,
            jitter,
            clock=lambda: time.now,
            sleep=time.sleep,
            block=time.pass_,
            **options,
        )

    return make


@pytest.fixture(params=["async", "sync"])
def run(request):
    """Call through a policy, in both of its forms."""

    async def run(policy, func, *args):
        if request.param == "sync":
            return policy.call_sync(func, *args)

        async def asynchronous():
            await asyncio.sleep(0)
            return func(*args)

        return await policy.call(asynchronous)

    return run


class Flaky:
    """Fails with each of these, and then answers; an `Err` is returned."""

    def __init__(self, *failures):
        self.failures = list(failures)
        self.calls = 0

    def __call__(self, answer="answer"):
        self.calls += 1
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Err):
                return failure
            raise failure
        return answer


class Busy(Exception):
    def __init__(self, retry_after):
        super().__init__(retry_after)
        self.retry_after = retry_after


@given(
    base=seconds,
    jitter=seconds,
    n=st.integers(0, 60),
    chance=st.floats(0, 1, exclude_max=True),
    longest=st.none() | seconds,
)
def test_retry_backoff(base, jitter, n, chance, longest):
    policy = RetryPolicy(3, base, jitter, longest, random=lambda: chance)
    expected = base * 2**n + jitter * chance
    assert policy.delay(n) == (expected if longest is None else min(expected, longest))
    assert base * 2**n <= RetryPolicy(3, base, jitter).delay(n) <= base * 2**n + jitter


def test_a_delay_of_a_huge_number_is_endless_and_no_error():
    assert RetryPolicy(3, 1.0, 0.0).delay(5_000) == float("inf")
    assert RetryPolicy(3, 1.0, 0.0, max_delay=30).delay(5_000) == 30


async def test_a_call_that_succeeds_is_made_once(make, run, time):
    func = Flaky()
    assert await run(make(), func, "a") == "a"
    assert (func.calls, time.waits) == (1, [])


async def test_a_failure_is_made_again_with_growing_waits(make, run, time):
    func = Flaky(ValueError(), ValueError(), ValueError())
    assert await run(make(), func) == "answer"
    assert time.waits == [1, 2, 4]


async def test_the_last_failure_is_raised(make, run):
    last = ValueError("last")
    func = Flaky(ValueError("first"), ValueError(), last, ValueError("never"))
    with pytest.raises(ValueError, match="last") as raised:
        await run(make(3), func)
    assert raised.value is last
    assert func.calls == 3


async def test_only_named_failures_are_retried(make, run):
    func = Flaky(KeyError())
    with pytest.raises(KeyError):
        await run(make(retry_on=(ValueError, ConnectionError)), func)
    assert func.calls == 1


async def test_errors_in_results_are_retried_if_they_are_named(make, run):
    refused = Err(ConnectionError())
    func = Flaky(refused, refused)
    assert await run(make(retry_on=ConnectionError), func) == "answer"
    assert await run(make(2, retry_on=ConnectionError), Flaky(*[refused] * 3)) == refused
    assert await run(make(), Flaky(refused)) == refused


async def test_a_question_may_be_asked_of_results(make, run):
    answers = iter([Ok(1), Ok(2), Ok(3)])
    policy = make(retry_on=lambda outcome: outcome != Ok(3))
    assert await run(policy, lambda: next(answers)) == Ok(3)


async def test_a_wait_is_no_longer_than_the_longest(make, run, time):
    await run(make(5, max_delay=3), Flaky(*[ValueError()] * 4))
    assert time.waits == [1, 2, 3, 3]


async def test_what_says_retry_after_is_waited_for(make, run, time):
    await run(make(max_delay=2), Flaky(Busy(7), Busy(0.1), Busy(None)))
    assert time.waits == [7, 2, 2]


async def test_no_attempt_begins_after_the_deadline(make, run, time):
    func = Flaky(*[ValueError()] * 9)
    with pytest.raises(ValueError):  # noqa: PT011 - the one that was given
        await run(make(10, deadline=6), func)
    assert func.calls == 3
    assert time.waits == [1, 2]


async def test_the_deadline_counts_the_time_of_the_calls_too(make, run, time):
    def slow():
        time.now += 5
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - its own
        await run(make(10, deadline=5.5), slow)
    assert time.now == 5


async def test_a_cancelled_call_is_not_retried(make):
    func = Flaky(asyncio.CancelledError())

    async def call():
        return func()

    with pytest.raises(asyncio.CancelledError):
        await make(retry_on=lambda outcome: True).call(call)
    assert func.calls == 1


async def test_cancelling_ends_the_wait(make):
    policy = RetryPolicy(3, 60.0, 0.0)
    call = asyncio.ensure_future(policy.call(Flaky(ValueError())))
    await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_an_open_breaker_is_not_knocked_at_again(make, run, time):
    breaker = CircuitBreaker(1, 30.0)
    breaker.isolate()
    with pytest.raises(CircuitOpenError):
        await run(make(), lambda: breaker.call_sync(int))
    assert time.waits == []


async def test_retries_are_immediate_in_one_context_only(run):
    policy = RetryPolicy(2, 0.3, 0.0)

    async def took():
        begun = monotonic()
        await run(policy, Flaky(ValueError()))
        return monotonic() - begun

    with immediate_retries():
        at_once = asyncio.ensure_future(took())
    in_time = asyncio.ensure_future(took())
    assert await at_once < 0.2
    assert await in_time > 0.29


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_attempts": 0},
        {"max_attempts": 1.5},
        {"base_delay": -1},
        {"base_delay": float("nan")},
        {"jitter": -0.1},
        {"max_delay": -1},
        {"deadline": 0},
        {"retry_on": 3},
        {"retry_on": asyncio.CancelledError},
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(make, arguments):
    with pytest.raises(InvalidPolicyError):
        make(**arguments)


def test_a_policy_is_a_value():
    assert RetryPolicy(3, 1.0, 0.5) == RetryPolicy(3, 1.0, 0.5) != RetryPolicy(4, 1.0, 0.5)
    assert "max_attempts=3" in repr(RetryPolicy(3, 1.0, 0.5))
