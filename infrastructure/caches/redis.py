"""The cache in Redis 7 or Valkey 8 and later."""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from asyncio import Semaphore, timeout
from collections.abc import Awaitable, Callable
from copy import copy
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import ConfigDict, PydanticUserError, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema

from leftfold.application.caching import InvalidCacheArgumentError, PersonalNotKeptError
from leftfold.domain import LeftfoldError
from leftfold.domain.personal import Noticing
from leftfold.infrastructure.caches.entries import NEVER, Change, Kept, Times
from leftfold.infrastructure.caches.globs import encoded, literal
from leftfold.infrastructure.caches.loading import Flight, LoadingCache
from leftfold.infrastructure.errors import CacheUnavailableError, MissingPackageError
from leftfold.infrastructure.platform import epoch_seconds, random_number
from leftfold.infrastructure.resilience import CircuitBreaker, Resilience
from leftfold.infrastructure.settings import masked

try:
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import ConnectionError, RedisError  # noqa: A004 - it is no OSError
except ImportError:
    raise MissingPackageError("RedisCache", "redis") from None

UNREACHABLE = (RedisError, OSError)
"""What is raised if Redis does not answer."""

T = TypeVar("T")
R = TypeVar("R")

SCANNED, UNLINKED, TAGGED = 1_000, 500, 100
"""Keys looked at, and removed, by one command: few enough not to hold up the server."""
TIMEOUT = 0.5
"""Seconds that a command, or connecting, may take."""
CONNECTIONS = 16
"""Commands under way at a time; further ones wait."""
LONGEST = 1e12
"""Seconds from which on a time to live is for ever: the server counts no further."""
FAILURES, RECOVERY = 5, 1.0
"""Failures in a row after which Redis is not asked, for so many seconds."""

# Each script is one step for the server, so that no reader sees a part of it.
PUT = """
local value, lease, generation, channel = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local document, milliseconds, token, of, message, now, ends = unpack(ARGV)
if token ~= '' then
    local is_ours = redis.call('GET', lease) == token
    if not is_ours or (redis.call('GET', generation) or '0') ~= of then return 0 end
end
if milliseconds == '' then redis.call('SET', value, document)
else redis.call('SET', value, document, 'PX', milliseconds) end
redis.call('UNLINK', lease)
for i = 5, #KEYS do
    local over = redis.call('ZRANGE', KEYS[i], '-inf', '(' .. now, 'BYSCORE', 'LIMIT', 0, 100)
    if #over > 0 then redis.call('ZREM', KEYS[i], unpack(over)) end
    redis.call('ZADD', KEYS[i], ends, ARGV[8])
    -- the set outlives by a second what it names
    local last = redis.call('ZRANGE', KEYS[i], -1, -1, 'WITHSCORES')[2]
    if last == 'inf' then redis.call('PERSIST', KEYS[i])
    else redis.call('PEXPIRE', KEYS[i], math.ceil((tonumber(last) - tonumber(now) + 1) * 1000)) end
end
redis.call('PUBLISH', channel, message)
return 1
"""
REMOVE_SCANNED = """
local cursor, keys = unpack(redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3]))
local count, most = 0, tonumber(ARGV[4])
for i = 1, #keys, most do
    count = count + redis.call('UNLINK', unpack(keys, i, math.min(i + most - 1, #keys)))
end
return {cursor, count}
"""
REMOVE_TAGGED = """
local popped = redis.call('ZPOPMIN', KEYS[1], ARGV[1])
local count = 0
local function has_tag(document)  -- a key may have been kept again, without the tag
    local ending = string.find(document, '\\n', 1, true)
    if not ending then return true end
    local is_read, head = pcall(cjson.decode, string.sub(document, 1, ending - 1))
    if not is_read or type(head) ~= 'table' or type(head[5]) ~= 'table' then return true end
    for _, tag in ipairs(head[5]) do if tag == ARGV[3] then return true end end
    return false
end
for i = 1, #popped, 2 do
    local key = ARGV[2] .. popped[i]
    if has_tag(redis.call('GETRANGE', key, 0, 1023)) then
        count = count + redis.call('UNLINK', key)
    end
end
return {count, #popped / 2}
"""


class Lease(NamedTuple):
    """The right to keep what is being loaded, until something newer is known."""

    token: str
    generation: str


class Codec(Generic[T]):
    """Values of a type as JSON, told from those of other types and versions."""

    def __init__(self, kind: type[T] | Any, version: int) -> None:
        """Write and read values of a type."""
        try:
            config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
            self._adapter: TypeAdapter[T] = TypeAdapter(kind, config=config)
        except PydanticUserError:  # a type with a configuration of its own
            self._adapter = TypeAdapter(kind)
        try:
            schema = json.dumps(self._adapter.json_schema(), sort_keys=True)
        except PydanticInvalidForJsonSchema:
            schema = ""
        self._kind = getattr(kind, "__qualname__", str(kind))
        print_of = f"{getattr(kind, '__module__', '')}.{self._kind} {version} {schema}"
        self._print = hashlib.sha256(print_of.encode()).hexdigest()[:16]

    def encode(self, kept: Kept[T]) -> bytes:
        """Return a document. Raises `InvalidCacheArgumentError` if it would not come back.

        For personal data that is a `PersonalNotKeptError`.
        """
        body, noticing = b"", Noticing()
        try:
            # Without warnings: they quote the value.
            body = self._adapter.dump_json(kept.value, warnings="none", context=noticing)
            is_the_same = self._adapter.validate_json(body) == kept.value
        except (ValueError, TypeError):  # pydantic's errors among them, which quote the value
            is_the_same = False
        if noticing.has_met_some:
            raise PersonalNotKeptError("value", "personal data is not kept outside")
        if not is_the_same:
            raise InvalidCacheArgumentError("value", f"JSON does not keep this {self._kind}")
        expires = None if kept.expires == NEVER else kept.expires
        head = [self._print, kept.created, expires, kept.position, sorted(kept.tags)]
        return json.dumps(head).encode() + b"\n" + body

    def decode(self, document: bytes) -> Kept[T] | None:
        """Read a document; None if it is damaged, or of another type or version."""
        head, _, body = document.partition(b"\n")
        try:
            print_, created, expires, position, tags = json.loads(head)
            if print_ != self._print:
                return None
            value = self._adapter.validate_json(body)
            return Kept(
                value, created, NEVER if expires is None else expires, position, frozenset(tags)
            )
        except (ValueError, TypeError, RecursionError):
            return None


class RedisTier(Generic[T]):
    """Values in Redis, under `prefix:v:` and their key; every change is told on a channel.

    All methods raise `CacheUnavailableError` if Redis does not answer.
    """

    def __init__(
        self,
        codec: Codec[T],
        url: str | Redis,
        prefix: str,
        times: Times,
        lease: float,
        guard: Resilience | None,
    ) -> None:
        """Keep values under a prefix; a lease ends after `lease` seconds."""
        self.client: Redis = url if isinstance(url, Redis) else _connect(url)
        if self.client.connection_pool.connection_kwargs.get("decode_responses"):
            raise InvalidCacheArgumentError("url", "is a client that decodes; values are bytes")
        self.name = masked(url) if isinstance(url, str) else f"Redis at {prefix}"
        self.channel = f"{prefix}:changed"
        self.origin = uuid.uuid4().hex
        self._codec = codec
        self._prefix = prefix
        self._times = times
        self._lease = max(1, math.ceil(lease * 1_000))
        self._places = Semaphore(CONNECTIONS)
        self.guard = guard or Resilience(
            self.name,
            timeout=2 * TIMEOUT,
            breaker=CircuitBreaker(FAILURES, RECOVERY, name=self.name, failures=_is_failure),
        )
        self._put = self.client.register_script(PUT)
        self._remove_scanned = self.client.register_script(REMOVE_SCANNED)
        self._remove_tagged = self.client.register_script(REMOVE_TAGGED)

    def apart(self) -> RedisTier[T]:
        """Return the same, whose changes this one hears of as another's."""
        other = copy(self)
        other.origin = uuid.uuid4().hex
        return other

    async def close(self) -> None:
        """Close the connections, once the commands under way are finished or have had their time.

        They are made anew when they are needed.
        """
        taken = 0
        try:
            async with timeout(2 * TIMEOUT):
                while taken < CONNECTIONS:
                    await self._places.acquire()
                    taken += 1
        except TimeoutError:
            pass
        finally:
            try:
                await self.client.aclose()
            finally:
                for _ in range(taken):
                    self._places.release()

    async def fetch(self, key: str) -> Kept[T] | None:
        """Return what is kept, also if it has expired."""
        document = await self._ask(lambda: self.client.get(self._key("v", key)))
        return None if document is None else self._codec.decode(document)

    async def lease(self, key: str) -> Lease:
        """Begin to load a value."""
        token = uuid.uuid4().hex

        async def begin() -> Any:
            async with self.client.pipeline(transaction=True) as steps:
                steps.set(self._key("l", key), token, px=self._lease)
                steps.get(self._generation)
                return await steps.execute()

        _, generation = await self._ask(begin)
        return Lease(token, "0" if generation is None else generation.decode())

    async def put(self, key: str, kept: Kept[T], lease: Lease | None = None) -> bool:
        """Keep a value: with a lease only if it still holds, which is answered."""
        document = self._codec.encode(kept)
        now = self._times.clock()
        milliseconds, ends = "", "+inf"
        if kept.expires != NEVER:
            left = kept.expires + self._times.stale_for - now
            if left <= 0:
                return False
            if left < LONGEST:
                milliseconds, ends = str(math.ceil(left * 1_000)), str(now + left)
        keys: list[bytes | str | memoryview] = [
            self._key("v", key),
            self._key("l", key),
            self._generation,
            self.channel,
        ]
        keys += [self._key("t", tag) for tag in sorted(kept.tags)]
        arguments: list[bytes | str] = [
            *(document, milliseconds, lease.token if lease else ""),
            *(lease.generation if lease else "", self.message(Change("key", key))),
            *(str(now), ends, encoded(key)),
        ]
        return bool(await self._ask(lambda: self._put(keys=keys, args=arguments)))

    async def remove(self, change: Change) -> int:
        """Keep it no longer; return how many values there were."""
        if change.kind == "key":
            return int(await self._ask(lambda: self._remove_key(change)))
        # What is being loaded anywhere is not kept: it may have been read before.
        await self._ask(lambda: self.client.incr(self._generation))
        if change.kind == "tag":
            count = await self._remove_all_tagged(change.what)
        elif change.kind == "pattern":
            count = await self._remove_matching(b"v", encoded(change.what))
        else:
            count = await self._remove_matching(b"v", b"*")
            await self._remove_matching(b"t", b"*")
        await self._ask(lambda: self.client.publish(self.channel, self.message(change)))
        return count

    def message(self, change: Change) -> bytes:
        """Return what is told of a change."""
        return json.dumps([self.origin, *change]).encode()

    def heard(self, message: bytes) -> Change | None:
        """Read what was told: the change, if another made it. What is no message changes all."""
        try:
            origin, kind, what = json.loads(message)
            change = Change(kind, what)
            change.concerns()
        except (ValueError, TypeError):
            return Change("all")
        return None if origin == self.origin else change

    async def _remove_key(self, change: Change) -> int:
        async with self.client.pipeline(transaction=True) as steps:
            steps.unlink(self._key("v", change.what))
            steps.unlink(self._key("l", change.what))
            steps.publish(self.channel, self.message(change))
            removed, *_ = await steps.execute()
        return int(removed)

    async def _remove_matching(self, kind: bytes, pattern: bytes) -> int:
        wanted = literal(self._prefix) + b":" + kind + b":" + pattern
        count, cursor = 0, b"0"
        while True:
            step = partial(self._remove_scanned, args=[cursor, wanted, SCANNED, UNLINKED])
            cursor, removed = await self._ask(step)
            count += int(removed)
            if cursor == b"0":
                return count

    async def _remove_all_tagged(self, tag: str) -> int:
        count = 0
        while True:
            removed, popped = await self._ask(
                lambda: self._remove_tagged(
                    keys=[self._key("t", tag)],
                    args=[TAGGED, self._key("v", ""), encoded(tag)],
                )
            )
            count += int(removed)
            if popped < TAGGED:
                return count

    def _key(self, kind: str, key: str) -> bytes:
        return encoded(f"{self._prefix}:{kind}:{key}")

    @property
    def _generation(self) -> bytes:
        return encoded(f"{self._prefix}:generation")

    async def _try(self, command: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await command()
        except ConnectionError:
            # The server may have ended the connections while they lay idle: all of them are made
            # anew. Each command may be repeated.
            await self.client.connection_pool.disconnect(inuse_connections=False)
            return await command()

    async def _ask(self, command: Callable[[], Awaitable[Any]]) -> Any:
        try:
            async with self._places:  # a command's time begins when it has a connection
                return await self.guard.call(self._try, command)
        except InvalidCacheArgumentError:
            raise
        except LeftfoldError as error:  # of the guard, which quotes no values
            raise CacheUnavailableError(self.name, str(error)) from None
        except UNREACHABLE as error:
            raise CacheUnavailableError(self.name, type(error).__name__) from None


class RedisCache(LoadingCache[T]):
    """Keeps values in Redis, for all processes that use the same prefix.

        cache = RedisCache(ItemRow, "redis://localhost", prefix="shop:item")

    Values are JSON, by pydantic. One of another type or `version` is as good as none. A deletion
    by any process wins over a load that any process began before it. If Redis does not answer,
    methods raise `CacheUnavailableError`, but those that load: they ask the source.

    It belongs to the event loop, and to the process, that it was first used on.
    """

    def __init__(  # noqa: PLR0913 - each has a default but two
        self,
        kind: type[T] | Any,
        url: str | Redis,
        *,
        prefix: str,
        version: int = 1,
        stale_for: float = 0.0,
        jitter: float = 0.0,
        lease: float = 60.0,
        guard: Resilience | None = None,
        clock: Callable[[], float] = epoch_seconds,
        random: Callable[[], float] = random_number,
    ) -> None:
        """Keep values of a type, which is one that pydantic knows, under a prefix.

        For `stale_for` seconds an expired value may stand in for a failing source; times to live
        are lengthened by up to `jitter` seconds. A load that takes longer than `lease` seconds is
        not kept. `guard` goes around each command, by default a timeout and a breaker. `clock`
        tells seconds since 1970. Raises `InvalidCacheArgumentError`.
        """
        times = Times(clock, random, stale_for, jitter)
        codec: Codec[T] = Codec(kind, version)
        self.tier: RedisTier[T] = RedisTier(codec, url, prefix, times, lease, guard)
        super().__init__(kind, times, self.tier.name)

    async def close(self) -> None:
        """Close the connections."""
        await self.tier.close()

    @property
    def _state(self) -> str:
        breaker = self.tier.guard.breaker
        return "in use" if breaker is None else breaker.state.value

    async def _fetch(self, key: str) -> Kept[T] | None:
        return await self._counted(self.tier.fetch(key))

    async def _put(self, key: str, kept: Kept[T]) -> None:
        await self._counted(self.tier.put(key, kept))

    async def _lease(self, key: str) -> object:
        return await self._counted(self.tier.lease(key))

    async def _put_loaded(self, key: str, kept: Kept[T], flight: Flight[T], lease: object) -> None:
        if isinstance(lease, Lease) and not flight.is_doomed:
            await self._counted(self.tier.put(key, kept, lease))

    async def _remove(self, change: Change) -> int:
        return await self._counted(self.tier.remove(change))

    async def _counted(self, answer: Awaitable[R]) -> R:
        try:
            return await answer
        except CacheUnavailableError:
            self.stats.failures += 1
            raise


def _connect(url: str) -> Redis:
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS + 1,  # and a subscription
            timeout=TIMEOUT,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 0),  # a retry is the guard's to decide
        )
        return Redis.from_pool(pool)
    except ValueError:
        raise InvalidCacheArgumentError("url", f"{masked(url)!r} is none of Redis") from None


def _is_failure(outcome: object) -> bool:
    return isinstance(outcome, UNREACHABLE)
