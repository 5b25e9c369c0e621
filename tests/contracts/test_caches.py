"""What every cache does: in memory, in Redis, and in memory before Redis."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from leftfold.application.caching import InvalidCacheArgumentError, Loaded, NotKept
from leftfold.infrastructure.caches import InMemoryCache, RedisCache, TieredCache
from leftfold.infrastructure.caches.entries import Change
from leftfold.infrastructure.caches.globs import matcher
from leftfold.infrastructure.errors import CacheUnavailableError
from leftfold.infrastructure.resilience import CircuitBreaker, Resilience
from leftfold.infrastructure.strategies import TEXTS

if TYPE_CHECKING:
    from fractions import Fraction

pytestmark = pytest.mark.anyio

START = 1_900_000_000.0


class Clock:
    def __init__(self):
        self.now = START

    def __call__(self):
        return self.now


class Colour(Enum):
    RED = "red"


class City(BaseModel, frozen=True):
    name: str


@dataclass(frozen=True)
class Row:
    sku: str
    price: Decimal
    stock: int | None = None
    seen: datetime | None = None
    day: date | None = None
    ratio: float = 0.0
    ident: UUID | None = None
    colour: Colour = Colour.RED
    city: City | None = None
    sizes: tuple[int, ...] = ()
    names: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Unknown:
    part: Fraction  # a type that is not there at run time


class Source:
    """Where values are loaded from; it counts, may wait, and may fail."""

    def __init__(self, value="loaded"):
        self.value = value
        self.loads = 0
        self.error = None
        self.gate = None
        self.begun = asyncio.Event()

    async def __call__(self):
        self.loads += 1
        value = self.value
        self.begun.set()
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return value


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def prefix():
    return f"t*[{uuid4().hex}"  # signs of globs in a prefix stand for themselves


@pytest.fixture
async def make_redis(valkey, prefix, clock):
    made = []

    def make(kind=str, **options):
        options = {"prefix": prefix, "clock": clock, **options}
        cache = RedisCache(kind, options.pop("url", valkey.url), **options)
        made.append(cache)
        return cache

    yield make
    for cache in made:
        await cache.close()


@pytest.fixture
async def make_tiered(make_redis, clock):
    made = []

    def make(kind=str, size=10_000, **options):
        memory = InMemoryCache(kind, size=size, clock=clock)
        cache = TieredCache(memory, make_redis(kind, **options))
        made.append(cache)
        return cache

    yield make
    for cache in made:
        await cache.close()


@pytest.fixture(params=["memory", "redis", "tiered"])
def make(request, clock):
    if request.param == "memory":
        return lambda kind=str, **options: InMemoryCache(kind, clock=clock, **options)
    return request.getfixturevalue(f"make_{request.param}")


@pytest.fixture
def cache(make):
    return make(stale_for=60.0)


# Round trips

rows = st.builds(
    Row,
    sku=st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=["Cs"])),
    price=st.decimals(allow_nan=False, allow_infinity=False),
    stock=st.none() | st.integers(),
    seen=st.none() | st.datetimes(timezones=st.just(UTC)),
    day=st.none() | st.dates(),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    ident=st.none() | st.uuids(),
    city=st.none() | st.builds(City, name=st.sampled_from(TEXTS)),
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    names=st.frozensets(st.sampled_from(TEXTS), max_size=3),
)
keys = st.text(max_size=12) | st.sampled_from(["", "a:b", "*", "é", "x" * 5_000])


async def examples(strategy, count, check):
    """Draw examples and check each of them on the loop that runs."""
    loop = asyncio.get_running_loop()

    @settings(max_examples=count, suppress_health_check=list(HealthCheck), database=None)
    @given(strategy)
    def law(drawn):
        asyncio.run_coroutine_threadsafe(check(drawn), loop).result(30)

    await loop.run_in_executor(None, law)


async def test_cache_round_trip(make):
    cache = make(Row)

    async def check(drawn):
        key, row, ttl = drawn
        await cache.set(key, row, ttl)
        assert await cache.get(key) == row
        entry = await cache.entry(key)
        assert entry.value == row
        assert type(entry.value.price) is Decimal
        assert not entry.is_expired
        assert (entry.expires_at is None) == (ttl is None)

    await examples(st.tuples(keys, rows, st.none() | st.floats(0.5, 1e6)), 300, check)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int | None, None),
        (bytes, b"\xff\x00"),
        (list[dict[str, int]], [{"a": 1}]),
        (set[int], {3, 1}),
        (tuple[int, str], (1, "a")),
        (bool, False),
        (dict[str, Decimal], {"a": Decimal("2.50")}),
        (Colour, Colour.RED),
        (float, -0.0),
    ],
    ids=str,
)
async def test_what_comes_back_equals_what_went_in(make, kind, value):
    cache = make(kind)
    await cache.set("a", value)
    entry = await cache.entry("a")
    assert entry.value == value
    assert type(entry.value) is type(value)


async def test_a_value_that_json_does_not_keep_is_refused(make_redis):
    cache = make_redis(float)
    with pytest.raises(InvalidCacheArgumentError, match="does not keep this float"):
        await cache.set("a", float("nan"))
    assert await cache.entry("a") is None


async def test_a_stored_none_is_told_from_a_miss(make):
    cache = make(int | None)
    await cache.set("a", None)
    assert await cache.get("a") is await cache.get("b") is None
    assert (await cache.entry("a")).value is None
    assert await cache.entry("b") is None
    assert await cache.get_or_load("a", Source(3)) is None


async def test_a_value_is_the_callers_own(make):
    cache = make(list[int])
    mine = [1]
    await cache.set("a", mine)
    mine.append(2)
    theirs = await cache.get("a")
    theirs.append(3)
    one, other = await asyncio.gather(*(cache.get_or_load("b", Source([1])) for _ in range(2)))
    one.append(2)
    assert await cache.get("a") == other == await cache.get("b") == [1]


async def test_what_nobody_can_change_is_not_copied(clock):
    cache = InMemoryCache(Row, clock=clock)
    row = Row("A", Decimal(1), city=City(name="Graz"))
    await cache.set("a", row)
    assert await cache.get("a") is row


async def test_what_may_be_changed_for_all_that_is_known_is_copied(clock):
    cache = InMemoryCache(Unknown, clock=clock)
    value = Unknown(1)
    await cache.set("a", value)
    assert await cache.get("a") == value
    assert await cache.get("a") is not value


# Times


async def test_a_value_expires_after_its_time_to_live(cache, clock):
    await cache.set("a", "value", 2.5)
    entry = await cache.entry("a")
    assert entry.created_at == datetime.fromtimestamp(START, UTC)
    assert (entry.expires_at - entry.created_at).total_seconds() == 2.5
    clock.now += 2.4
    assert await cache.get("a") == "value"
    clock.now += 0.1
    assert await cache.get("a") is None
    assert await cache.entry("a") is None
    assert entry.is_expired


async def test_without_a_time_to_live_a_value_stays(cache, clock):
    await cache.set("a", "value")
    clock.now += 1e8
    assert await cache.get("a") == "value"
    assert (await cache.entry("a")).expires_at is None


async def test_a_time_to_live_may_be_longer_than_the_calendar(cache, clock):
    await cache.set("a", "value", 1e300, tags=["t"])
    await cache.set("b", "value", 1e17)
    clock.now += 1e8
    assert [(await cache.entry(key)).value for key in "ab"] == ["value"] * 2


async def test_a_new_value_has_a_time_of_its_own(cache, clock):
    await cache.set("a", "old", 1)
    await cache.set("a", "new", 10)
    clock.now += 5
    assert await cache.get("a") == "new"


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), True, "5", Decimal(5)])
async def test_a_time_to_live_of_nothing_is_refused(cache, ttl):
    source = Source()
    with pytest.raises(InvalidCacheArgumentError):
        await cache.set("a", "value", ttl)
    with pytest.raises(InvalidCacheArgumentError):
        await cache.get_or_load("a", source, ttl)
    assert source.loads == 0


async def test_jitter_only_lengthens_the_time_to_live(make, clock):
    cache = make(jitter=10.0)
    for number in range(30):
        await cache.set(str(number), "value", 5)
    lives = [((await cache.entry(str(n))).expires_at.timestamp() - START) for n in range(30)]
    assert all(5 <= life <= 15 for life in lives)
    assert len(set(lives)) > 20


async def test_an_expired_value_stands_in_for_a_failing_source_up_to_an_age(cache, clock):
    await cache.set("a", "old", 10)
    source = Source()
    source.error = ConnectionError()
    clock.now += 69
    entry = await cache.entry_or_load("a", source, 10)
    assert (entry.value, entry.is_stale) == ("old", True)
    assert await cache.get("a") is None
    assert cache.stats.stale == 1
    clock.now += 1
    with pytest.raises(ConnectionError):
        await cache.get_or_load("a", source, 10)


async def test_a_value_that_was_deleted_stands_in_for_nothing(cache, clock):
    await cache.set("a", "old", 10)
    clock.now += 20
    await cache.delete("a")
    source = Source()
    source.error = ConnectionError()
    with pytest.raises(ConnectionError):
        await cache.get_or_load("a", source, 10)


# Loads


async def test_what_is_there_is_not_loaded(cache):
    source = Source()
    assert await cache.get_or_load("a", source) == "loaded"
    assert await cache.get_or_load("a", source) == "loaded"
    assert await cache.get("a") == "loaded"
    assert source.loads == 1
    assert (cache.stats.loads, cache.stats.misses) == (1, 1)


async def test_a_thousand_misses_at_once_are_one_load(cache):
    source = Source()
    answers = await asyncio.gather(*(cache.get_or_load("a", source) for _ in range(1_000)))
    assert set(answers) == {"loaded"}
    assert source.loads == 1


async def test_cancelling_one_caller_harms_no_other(cache):
    source = Source()
    source.gate = asyncio.Event()
    callers = [asyncio.ensure_future(cache.get_or_load("a", source)) for _ in range(3)]
    await source.begun.wait()
    await asyncio.sleep(0.02)
    callers[0].cancel()
    await asyncio.wait([callers[0]])
    source.gate.set()
    assert await asyncio.gather(*callers[1:]) == ["loaded"] * 2
    assert source.loads == 1


async def test_a_load_goes_on_though_all_who_waited_were_cancelled(cache):
    source = Source()
    source.gate = asyncio.Event()
    callers = [asyncio.ensure_future(cache.get_or_load("a", source)) for _ in range(3)]
    await source.begun.wait()
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    again = asyncio.ensure_future(cache.get_or_load("a", source))
    await asyncio.sleep(0.02)
    source.gate.set()
    assert await again == await cache.get("a") == "loaded"
    assert source.loads == 1


async def test_a_failing_load_fails_for_all_who_wait_and_is_tried_anew(cache):
    source = Source()
    source.error = ConnectionError("down")
    outcomes = await asyncio.gather(
        *(cache.get_or_load("a", source) for _ in range(5)), return_exceptions=True
    )
    assert {str(outcome) for outcome in outcomes} == {"down"}
    assert source.loads == 1
    source.error = None
    assert await cache.get_or_load("a", source) == "loaded"


async def test_a_loader_that_is_cancelled_cancels_those_who_wait(cache):
    source = Source()
    source.error = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(cache.get_or_load("a", source), 5)
    assert source.loads == 1


async def test_an_answer_that_is_not_to_be_kept_is_neither_kept_nor_replaced(cache, clock):
    await cache.set("a", "old", 10)
    clock.now += 20
    source = Source()
    source.error = NotKept("gone")
    with pytest.raises(NotKept, match="gone"):
        await cache.get_or_load("a", source, 10)
    assert await cache.entry("a") is None


async def removed_by(cache, way):
    await {
        "delete": lambda: cache.delete("a"),
        "pattern": lambda: cache.invalidate_pattern("[a-c]"),
        "tag": lambda: cache.invalidate_tag("letters"),
        "clear": cache.clear,
        "set": lambda: cache.set("a", "set"),
    }[way]()


WAYS = ["delete", "pattern", "tag", "clear", "set"]


async def load_meanwhile(cache, act):
    """Do something while a value is loaded; return what is kept in the end."""
    source = Source("read before")
    source.gate = asyncio.Event()
    load = asyncio.ensure_future(cache.get_or_load("a", source, tags=["letters"]))
    await source.begun.wait()
    await act()
    source.gate.set()
    assert await load == "read before"
    return await cache.get("a")


@pytest.mark.parametrize("way", WAYS)
async def test_a_change_during_a_load_wins(cache, way):
    kept = await load_meanwhile(cache, lambda: removed_by(cache, way))
    assert kept == ("set" if way == "set" else None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["redis", "tiered"])
async def test_a_change_by_another_process_during_a_load_wins(make_redis, make_tiered, kind, way):
    make = {"redis": make_redis, "tiered": make_tiered}[kind]
    cache, other = make(), make()
    await cache.get("a")
    kept = await load_meanwhile(cache, lambda: removed_by(other, way))
    assert kept == ("set" if way == "set" else None)


async def test_who_asks_after_a_change_does_not_get_what_was_read_before(cache):
    source = Source("read before")
    source.gate = asyncio.Event()
    first = asyncio.ensure_future(cache.get_or_load("a", source))
    await source.begun.wait()
    await cache.delete("a")
    assert await cache.get_or_load("a", Source("read after")) == "read after"
    source.gate.set()
    await first
    assert await cache.get("a") == "read after"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["redis", "tiered"])
async def test_who_asks_after_a_change_does_not_get_what_was_found_during_it(
    make_redis, make_tiered, kind, way
):
    cache = {"redis": make_redis, "tiered": make_tiered}[kind]()
    tier = cache.tier if kind == "redis" else cache._tier
    await cache.set("a", "before", 10, tags=["letters"])
    if kind == "tiered":
        cache._memory.remove(Change("all"))
    fetch, remove, put = tier.fetch, tier.remove, tier.put
    is_found, may_pass = asyncio.Event(), asyncio.Event()

    async def fetch_late(key):
        found = await fetch(key)
        is_found.set()
        await may_pass.wait()
        return found

    async def remove_late(change):
        await is_found.wait()
        return await remove(change)

    async def put_late(*args):
        await is_found.wait()
        return await put(*args)

    tier.fetch, tier.remove, tier.put = fetch_late, remove_late, put_late
    async with asyncio.timeout(10):
        change = asyncio.ensure_future(removed_by(cache, way))
        await asyncio.sleep(0)
        during = asyncio.ensure_future(cache.get_or_load("a", Source("during"), tags=["letters"]))
        await change
        tier.fetch = fetch
        after = asyncio.ensure_future(cache.get_or_load("a", Source("after")))
        await asyncio.sleep(0.02)
        may_pass.set()
        await during
        assert await after == ("set" if way == "set" else "after")


async def test_a_value_read_too_early_is_loaded_anew(cache):
    await cache.set("a", "at 5", position=5)
    source = Source(Loaded("at 9", 9))
    assert await cache.get_or_load("a", source, after=5) == "at 5"
    assert await cache.get_or_load("a", source, after=6) == "at 9"
    assert (await cache.entry("a")).position == 9
    assert await cache.get_or_load("a", source, after=9) == "at 9"
    assert source.loads == 1


async def test_a_load_that_began_before_is_no_answer_to_who_asks_for_later(cache):
    source = Source(Loaded("at 5", 5))
    source.gate = asyncio.Event()
    first = asyncio.ensure_future(cache.get_or_load("a", source))
    await source.begun.wait()
    second = asyncio.ensure_future(cache.get_or_load("a", source, after=7))
    await asyncio.sleep(0.02)
    source.value = Loaded("at 7", 7)
    source.gate.set()
    assert await asyncio.gather(first, second) == ["at 5", "at 7"]
    assert source.loads == 2


async def test_a_load_begun_afterwards_is_believed_whatever_its_position(cache):
    source = Source("unknown")
    assert await cache.get_or_load("a", source, after=7) == "unknown"
    assert source.loads == 1


async def test_a_stale_value_from_before_is_not_served_to_who_asks_for_later(cache, clock):
    await cache.set("a", "at 5", 10, position=5)
    clock.now += 20
    source = Source()
    source.error = ConnectionError()
    with pytest.raises(ConnectionError):
        await cache.get_or_load("a", source, after=6)
    assert await cache.get_or_load("a", source, after=5) == "at 5"


# Removal


async def test_what_is_deleted_is_gone(cache):
    await cache.set("a", "value")
    await cache.delete("a")
    await cache.delete("never there")
    assert await cache.entry("a") is None


async def test_a_pattern_removes_what_fits_and_counts_it(cache):
    for key in ("item:1", "item:2", "item:20", "order:1", "ITEM:1", "item:é"):
        await cache.set(key, "value")
    assert await cache.invalidate_pattern("item:?") == 2
    assert await cache.invalidate_pattern("*:1") == 2
    assert [k for k in ("item:20", "item:é") if await cache.get(k)] == ["item:20", "item:é"]
    assert await cache.invalidate_pattern("nothing*") == 0
    assert await cache.invalidate_pattern("*") == 2


async def test_a_tag_removes_what_was_kept_with_it(cache):
    await cache.set("a", "value", tags=["one", "two"])
    await cache.set("b", "value", 60, tags=["two"])
    await cache.set("c", "value")
    assert (await cache.entry("a")).tags == {"one", "two"}
    assert await cache.invalidate_tag("two") == 2
    assert await cache.invalidate_tag("two") == 0
    assert [key for key in "abc" if await cache.get(key)] == ["c"]


async def test_a_value_kept_again_without_a_tag_has_it_no_more(cache):
    await cache.set("a", "old", tags=["one"])
    await cache.set("a", "new")
    assert await cache.invalidate_tag("one") == 0
    assert await cache.get("a") == "new"


async def test_tags_may_be_an_iterator(cache):
    await cache.get_or_load("a", Source(), tags=iter(["one"]))
    await cache.set("b", "value", tags=iter(["one"]))
    assert await cache.invalidate_tag("one") == 2


async def test_many_values_of_a_tag_are_removed(cache):
    await asyncio.gather(*(cache.set(str(n), "value", tags=["t"]) for n in range(250)))
    assert await cache.invalidate_tag("t") == 250


async def test_one_text_is_no_list_of_tags(cache):
    with pytest.raises(InvalidCacheArgumentError, match="not one text"):
        await cache.set("a", "value", tags="one")


async def test_all_can_be_cleared(cache):
    for key in "abc":
        await cache.set(key, "value", tags=["t"])
    await cache.clear()
    assert [key for key in "abc" if await cache.get(key)] == []


# Globs

patterns = st.text("*?[]^-\\abc!é", max_size=8)
short_keys = st.text("*?[]^-\\abc!é", max_size=6)


async def test_patterns_mean_what_they_mean_to_the_server(valkey, prefix):
    client = Redis.from_url(valkey.url)
    root = prefix.encode().replace(b"*", b"\\*").replace(b"[", b"\\[")

    async def check(drawn):
        pattern, wanted = drawn
        client.mset({f"{prefix}:{key}": "" for key in wanted})
        found = client.keys(root + b":" + pattern.encode())
        client.delete(*(f"{prefix}:{key}" for key in wanted))
        assert {key for key in wanted if matcher(pattern)(key)} == {
            key.decode().removeprefix(f"{prefix}:") for key in found
        }

    cases = st.tuples(patterns, st.sets(short_keys, min_size=1, max_size=12))
    await examples(cases, 1_500, check)
    client.close()


async def test_memory_and_redis_agree_on_patterns(make_redis, clock):
    memory, redis = InMemoryCache(str, clock=clock), make_redis()

    async def check(drawn):
        pattern, wanted = drawn
        for key in wanted:
            await memory.set(key, key)
            await redis.set(key, key)
        assert await memory.invalidate_pattern(pattern) == await redis.invalidate_pattern(pattern)
        for key in wanted:
            assert await memory.get(key) == await redis.get(key)
        await memory.clear()
        await redis.clear()

    await examples(st.tuples(patterns, st.sets(short_keys, max_size=5)), 150, check)


def test_a_hostile_pattern_takes_no_long_time():
    assert not matcher("*a" * 200)("a" * 199 + "b" * 5_000)


# In memory


async def test_memory_is_bounded_and_keeps_what_was_used_last(clock):
    cache = InMemoryCache(int, size=3, clock=clock)
    for number in range(3):
        await cache.set(str(number), number)
    await cache.get("0")
    await cache.set("3", 3)
    assert [key for key in "0123" if await cache.entry(key)] == ["0", "2", "3"]


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 1.5}, {"jitter": -1}, {"stale_for": -1}])
def test_arguments_that_make_no_sense_are_refused(options):
    with pytest.raises(InvalidCacheArgumentError):
        InMemoryCache(int, **options)


def test_memory_may_be_used_from_several_threads_and_loops():
    cache = InMemoryCache(int, size=50)
    loads = Counter()

    async def use():
        async def load():
            loads["shared"] += 1
            await asyncio.sleep(0.05)
            return 7

        assert await cache.get_or_load("shared", load) == 7
        for number in range(2_000):
            await cache.set(str(number % 100), number)
            await cache.get(str(number % 77))
            if number % 50 == 0:
                await cache.invalidate_pattern("1*")

    async def main():
        await asyncio.gather(*(asyncio.to_thread(asyncio.run, use()) for _ in range(6)))

    asyncio.run(main())
    assert loads["shared"] == 1


def test_a_load_whose_loop_ends_before_it_begins_is_made_by_who_asks_next():
    cache, asked = InMemoryCache(int), []

    async def load():
        return 1

    async def ask():
        return await cache.get_or_load("a", load)

    async def leave():
        asked.append(asyncio.ensure_future(ask()))  # it is cancelled before its load has begun

    async def ask_in_time():
        return await asyncio.wait_for(ask(), 5)

    asyncio.run(leave())
    assert asyncio.run(ask_in_time()) == 1


def test_a_load_whose_loop_ends_is_made_by_who_still_waits():
    cache = InMemoryCache(int)

    async def never():
        await asyncio.sleep(60)

    async def abandoned():
        asyncio.ensure_future(cache.get_or_load("a", never))  # noqa: RUF006 - it is to be lost
        await asyncio.sleep(0.3)

    async def main():
        first = asyncio.ensure_future(asyncio.to_thread(asyncio.run, abandoned()))
        await asyncio.sleep(0.1)
        assert await asyncio.wait_for(cache.get_or_load("a", Source(3)), 5) == 3
        await first

    asyncio.run(main())


# In Redis


async def test_another_type_or_version_is_a_miss(make_redis):
    await make_redis(int).set("a", 3)
    assert await make_redis(int).get("a") == 3
    assert await make_redis(int | str).get("a") is None
    assert await make_redis(int, version=2).get("a") is None


@pytest.mark.parametrize(
    "document", [b"", b"{", b"null", b"[]\n3", b"\xff\n\xff", b"[1,2,3,4,5]\n", b"[" * 100_000]
)
async def test_a_damaged_value_is_a_miss(make_redis, valkey, prefix, document):
    cache = make_redis(int)
    await cache.set("a", 3)
    client = Redis.from_url(valkey.url)
    key = f"{prefix}:v:a"
    whole = client.get(key)
    for damaged in (document, whole[:-1], whole + b"}"):
        client.set(key, damaged)
        assert await cache.get("a") is None
    assert await cache.get_or_load("a", Source(4)) == 4
    client.close()


async def test_values_lie_in_redis_as_json_with_an_expiry(make_redis, valkey, prefix):
    cache = make_redis(Row, stale_for=10.0)
    await cache.set("a", Row("A", Decimal("2.50")), 100, tags=["t"], position=7)
    client = Redis.from_url(valkey.url)
    head, body = client.get(f"{prefix}:v:a").split(b"\n")
    assert json.loads(head)[1:] == [START, START + 100, 7, ["t"]]
    assert json.loads(body)["price"] == "2.50"
    assert 109 < client.pttl(f"{prefix}:v:a") / 1_000 <= 110
    client.close()


async def test_what_has_expired_leaves_the_sets_of_tags(make_redis, valkey, prefix, clock):
    cache = make_redis()
    for number in range(50):
        await cache.set(str(number), "value", 10, tags=["t"])
    clock.now += 20
    await cache.set("new", "value", 10, tags=["t"])
    client = Redis.from_url(valkey.url)
    assert client.zcard(f"{prefix}:t:t") == 1
    client.close()


async def test_a_set_of_a_tag_leaves_after_the_last_of_its_values(
    make_redis, valkey, prefix, clock
):
    cache = make_redis(stale_for=10.0)
    client = Redis.from_url(valkey.url)
    await cache.set("a", "value", 100, tags=["t"])
    clock.now += 50
    await cache.set("b", "value", 20, tags=["t"])
    assert 60 < client.pttl(f"{prefix}:t:t") / 1_000 <= 61
    await cache.set("c", "value", tags=["t"])
    assert client.pttl(f"{prefix}:t:t") == -1
    client.close()


async def test_connections_that_the_server_ended_are_replaced(make_redis, valkey):
    cache = make_redis()
    await asyncio.gather(*(cache.set(str(n), "value") for n in range(20)))
    client = Redis.from_url(valkey.url)
    client.client_kill_filter(_type="normal", skipme=True)
    client.close()
    assert await asyncio.gather(*(cache.get(str(n)) for n in range(20))) == ["value"] * 20


async def test_errors_are_typed_and_show_no_password_and_loads_go_on(make_redis):
    cache = make_redis(url="redis://:s3cret@127.0.0.1:1")
    asks = [
        lambda: cache.get("a"),
        lambda: cache.set("a", "value"),
        lambda: cache.delete("a"),
        lambda: cache.invalidate_pattern("*"),
        lambda: cache.invalidate_tag("t"),
        cache.clear,
    ]
    for ask in asks:
        with pytest.raises(CacheUnavailableError) as raised:
            await ask()
        assert "s3cret" not in str(raised.value)
    assert await cache.get_or_load("a", Source()) == "loaded"
    assert cache.stats.failures >= len(asks)
    assert "s3cret" not in repr(cache.health())


async def test_a_refusal_quotes_no_value_not_even_in_a_warning(make_redis, recwarn):
    with pytest.raises(InvalidCacheArgumentError) as raised:
        await make_redis(int).set("a", "s3cret")
    told = [str(raised.value), *(str(each.message) for each in recwarn)]
    assert not [each for each in told if "s3cret" in each]


async def test_an_open_breaker_is_as_good_as_no_redis(make_redis):
    breaker = CircuitBreaker(1, 60.0)
    cache = make_redis(
        url="redis://127.0.0.1:1", guard=Resilience("ours", timeout=1.0, breaker=breaker)
    )
    for _ in range(2):
        with pytest.raises(CacheUnavailableError):
            await cache.get("a")
    assert breaker.state.value == "open"
    assert await cache.get_or_load("a", Source()) == "loaded"


async def test_a_client_that_decodes_is_refused(valkey):
    client = AsyncRedis.from_url(valkey.url, decode_responses=True)
    with pytest.raises(InvalidCacheArgumentError, match="bytes"):
        RedisCache(int, client, prefix="t")
    await client.aclose()


def test_an_address_that_is_none_is_refused_without_its_password():
    with pytest.raises(InvalidCacheArgumentError) as raised:
        RedisCache(int, "http://:s3cret@here", prefix="t")
    assert "s3cret" not in str(raised.value)
