"""Pipelines: the order of their parts, and what each of them does."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import monotonic, sleep

import pytest

from leftfold.infrastructure import (
    CircuitBreaker,
    CircuitOpenError,
    PartHealth,
    Resilience,
    RetryPolicy,
)
from leftfold.infrastructure.resilience import (
    Bulkhead,
    BulkheadFullError,
    CallTimeoutError,
    InvalidPolicyError,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["async", "sync", "decorated"])
def run(request):
    """Call a sync function through a pipeline, in each of its forms."""

    async def run(pipeline, func, *args):
        async def asynchronous(*args):
            await asyncio.sleep(0)
            return func(*args)

        if request.param == "decorated":
            return await pipeline(asynchronous)(*args)
        if request.param == "async":
            return await pipeline.call(asynchronous, *args)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, lambda: pipeline.call_sync(func, *args))

    return run


def boom():
    raise ConnectionError


async def test_an_empty_pipeline_only_calls(run):
    assert await run(Resilience(), str, 3) == "3"


async def test_each_attempt_counts_for_the_breaker(run):
    breaker = CircuitBreaker(3, 30.0)
    pipeline = Resilience(breaker=breaker, retry=RetryPolicy(3, 0.0, 0.0))
    with pytest.raises(ConnectionError):
        await run(pipeline, boom)
    assert breaker.stats.failures == 3
    assert breaker.stats.opened == 1


async def test_while_the_breaker_is_open_nothing_is_retried(run):
    breaker = CircuitBreaker(2, 30.0)
    pipeline = Resilience(breaker=breaker, retry=RetryPolicy(10, 0.0, 0.0))
    begun = monotonic()
    with pytest.raises(CircuitOpenError):
        await run(pipeline, boom)
    assert breaker.stats.failures == 2
    assert breaker.stats.rejected == 1
    assert monotonic() - begun < 1


async def test_the_timeout_is_of_one_attempt_and_a_failure():
    breaker = CircuitBreaker(2, 30.0)
    calls = []

    async def slow_at_first():
        calls.append(1)
        if len(calls) == 1:
            await asyncio.sleep(60)
        return "answer"

    pipeline = Resilience("stock", timeout=0.05, breaker=breaker, retry=RetryPolicy(2, 0.0, 0.0))
    assert await pipeline.call(slow_at_first) == "answer"
    assert breaker.stats.failures == 1


async def test_a_call_that_takes_too_long_is_a_typed_error():
    pipeline = Resilience("stock", timeout=0.05)
    with pytest.raises(CallTimeoutError, match=r"stock did not answer within 0\.05 s"):
        await pipeline.call(asyncio.sleep, 60)
    with pytest.raises(TimeoutError):
        pipeline.call_sync(sleep, 0.3)


async def test_a_timeout_that_the_call_raises_itself_is_its_own(run):
    def late():
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await run(Resilience(timeout=5), late)


async def test_cancelling_is_no_timeout():
    call = asyncio.ensure_future(Resilience(timeout=5).call(asyncio.sleep, 60))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_a_fallback_answers_for_whatever_is_raised_in_the_end(run):
    breaker = CircuitBreaker(1, 30.0)
    pipeline = Resilience(breaker=breaker, fallback=lambda: "fallback")
    assert await run(pipeline, boom) == "fallback"
    assert breaker.stats.opened == 1
    assert await run(pipeline, boom) == "fallback"
    assert breaker.stats.rejected == 1


async def test_a_fallback_may_be_async():
    async def fallback(sku):
        return f"no {sku}"

    def fetch(sku):
        raise ConnectionError

    assert await Resilience(fallback=fallback).call(fetch, "A") == "no A"


async def test_a_cancelled_call_has_no_fallback():
    call = asyncio.ensure_future(Resilience(fallback=str).call(asyncio.sleep, 60))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_a_pipeline_tells_its_health():
    pipeline = Resilience(
        "stock",
        timeout=0.01,
        breaker=CircuitBreaker(2, 30.0),
        bulkhead=Bulkhead(1),
        fallback=lambda *_: None,
    )
    for _ in range(3):
        await pipeline.call(asyncio.sleep, 60)
    assert pipeline.health() == PartHealth(
        "stock",
        "pipeline",
        "open",
        {
            "timeouts": 2,
            "fallbacks": 3,
            "running": 0,
            "waiting": 0,
            "full": 0,
            "failures": 2,
            "rejected": 1,
            "opened": 1,
        },
    )


# Bulkheads


async def test_no_more_calls_run_than_may_and_no_more_wait():
    bulkhead = Bulkhead(2, 3, name="reports")
    pipeline = Resilience(bulkhead=bulkhead)
    gate = asyncio.Event()
    calls = [asyncio.ensure_future(pipeline.call(gate.wait)) for _ in range(7)]
    await asyncio.sleep(0.01)
    assert (bulkhead.running, bulkhead.waiting) == (2, 3)
    rejected = [call.exception() for call in calls if call.done()]
    assert rejected == [BulkheadFullError("reports", 2, 3)] * 2
    gate.set()
    await asyncio.wait(calls)
    assert (bulkhead.running, bulkhead.waiting) == (0, 0)


async def test_who_waits_longest_is_next():
    bulkhead, order = Bulkhead(1, 10), []

    async def note(number):
        order.append(number)
        await asyncio.sleep(0)

    pipeline = Resilience(bulkhead=bulkhead)
    await asyncio.gather(*(pipeline.call(note, n) for n in range(8)))
    assert order == list(range(8))


async def test_one_that_waits_and_is_cancelled_takes_no_place():
    bulkhead = Bulkhead(1, 2)
    pipeline = Resilience(bulkhead=bulkhead)
    gate = asyncio.Event()
    first, second, third = (asyncio.ensure_future(pipeline.call(gate.wait)) for _ in range(3))
    await asyncio.sleep(0)
    second.cancel()
    with suppress(asyncio.CancelledError):
        await second
    assert bulkhead.waiting == 1
    gate.set()
    await asyncio.gather(first, third)
    assert bulkhead.running == 0


async def test_one_cancelled_at_the_moment_of_its_turn_gives_the_place_on():
    bulkhead = Bulkhead(1, 2)
    await bulkhead.enter()
    waiting = [asyncio.ensure_future(bulkhead.enter()) for _ in range(2)]
    await asyncio.sleep(0)
    bulkhead.leave()
    waiting[0].cancel()
    with suppress(asyncio.CancelledError):
        await waiting[0]
    await asyncio.wait_for(waiting[1], 1)
    bulkhead.leave()
    assert bulkhead.running == 0


async def test_a_failing_call_gives_its_place_back(run):
    bulkhead = Bulkhead(1)
    for _ in range(3):
        with pytest.raises(ConnectionError):
            await run(Resilience(bulkhead=bulkhead), boom)
    assert bulkhead.running == 0


def test_threads_and_tasks_share_a_bulkhead():
    bulkhead, most, lock = Bulkhead(3, 100), [0, 0], threading.Lock()
    pipeline = Resilience(bulkhead=bulkhead)

    def work():
        with lock:
            most[0] += 1
            most[1] = max(most)
        sleep(0.002)
        with lock:
            most[0] -= 1

    async def tasks():
        loop = asyncio.get_running_loop()
        call = lambda: loop.run_in_executor(None, work)  # noqa: E731 - short
        await asyncio.gather(*(pipeline.call(call) for _ in range(30)))

    with ThreadPoolExecutor(10) as threads:
        other = threads.submit(asyncio.run, tasks())
        for call in [threads.submit(pipeline.call_sync, work) for _ in range(40)]:
            call.result()
        other.result()
    assert most == [0, 3]
    assert (bulkhead.running, bulkhead.waiting) == (0, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Resilience(timeout=0),
        lambda: Resilience(fallback=3),
        lambda: Bulkhead(0),
        lambda: Bulkhead(1, -1),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make):
    with pytest.raises(InvalidPolicyError):
        make()
