"""The circuit breaker: what a closed one adds to a call, and how fast an open one rejects.

The figures are times, asked for as such: a ratio to an empty call would say nothing. Beside each
stands the empty call of the same round.

    python benchmarks/resilience.py [--quick]
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from _measure import QUICK

from leftfold.infrastructure import CircuitBreaker, CircuitOpenError

ROUNDS = 3 if QUICK else 15
CALLS = 2_000 if QUICK else 50_000


async def nothing() -> None:
    """Do nothing."""


async def timed(call: Callable[[], Awaitable[None]]) -> float:
    begun = time.perf_counter()
    for _ in range(CALLS):
        with suppress(CircuitOpenError):
            await call()
    return (time.perf_counter() - begun) / CALLS * 1e6


async def main() -> None:
    closed, opened = CircuitBreaker(5, 30.0), CircuitBreaker(5, 30.0)
    opened.isolate()
    empty, passed, rejected = [], [], []
    for _ in range(ROUNDS):
        empty.append(await timed(nothing))
        passed.append(await timed(lambda: closed.call(nothing)))
        rejected.append(await timed(lambda: opened.call(nothing)))
    base = statistics.median(empty)
    adds = statistics.median(p - e for p, e in zip(passed, empty, strict=True))
    rejects = statistics.median(rejected)
    print(f"an empty call takes {base:.2f} µs")
    print(f"a closed breaker adds {adds:.2f} µs, {adds / 3:.2f}x of 3 µs")
    print(f"an open breaker rejects in {rejects:.2f} µs, {rejects / 2:.2f}x of 2 µs")


asyncio.run(main())
