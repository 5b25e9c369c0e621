"""What type checkers infer of breakers, retries, pipelines and caches."""

from __future__ import annotations

from typing import assert_type

from leftfold.application import CacheEntry, CacheProvider
from leftfold.infrastructure import CircuitBreaker, InMemoryCache, Resilience, RetryPolicy


async def fetch(sku: str, *, times: int = 1) -> int:
    return len(sku) * times


def count(sku: str) -> int:
    return len(sku)


async def calls(breaker: CircuitBreaker, retry: RetryPolicy, pipeline: Resilience) -> None:
    assert_type(await breaker.call(fetch, "A", times=2), int)
    assert_type(await retry.call(fetch, "A"), int)
    assert_type(await pipeline.call(fetch, "A"), int)
    assert_type(breaker.call_sync(count, "A"), int)
    assert_type(retry.call_sync(count, "A"), int)
    assert_type(pipeline.call_sync(count, "A"), int)
    assert_type(await breaker(fetch)("A"), int)
    assert_type(pipeline(count)("A"), int)
    await breaker.call(fetch, 3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    pipeline.call_sync(count)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def caches(cache: InMemoryCache[int]) -> None:
    provider: CacheProvider[int] = cache
    assert_type(await provider.get("a"), int | None)
    assert_type(await cache.get_or_load("a", lambda: fetch("a"), 30), int)
    assert_type(await cache.entry("a"), CacheEntry[int] | None)
    await cache.set("a", "text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
