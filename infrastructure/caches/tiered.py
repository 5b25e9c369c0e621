"""The cache in memory before Redis."""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Any, Self, TypeVar

from leftfold.infrastructure.caches.entries import Change, Kept
from leftfold.infrastructure.caches.loading import Flight, LoadingCache
from leftfold.infrastructure.caches.memory import InMemoryCache
from leftfold.infrastructure.caches.redis import Lease, RedisCache
from leftfold.infrastructure.errors import CacheUnavailableError
from leftfold.infrastructure.platform import asleep, monotonic, random_number, start_task

T = TypeVar("T")

_log = logging.getLogger("leftfold.cache")

JOURNAL = 10_000
"""Changes remembered while Redis is away; beyond them all is removed when it is back."""
LOOK, PING, SILENCE = 0.1, 1.0, 2.0
"""Seconds between looks at the subscription, between pings, and of silence that end it."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0


class _Travel:
    """A value on its way to memory; `is_doomed` once something newer is known."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.is_doomed = False


class TieredCache(LoadingCache[T]):
    """Asks memory first and Redis next; what others change is dropped from memory.

        async with TieredCache(InMemoryCache(ItemRow), RedisCache(ItemRow, url, prefix=…)) as cache:

    While Redis is away it goes on with memory alone, and no method raises for that. What is
    changed meanwhile is removed from Redis as soon as it is back, before it is read again, and
    memory is dropped, so that nothing stale outlives the outage. Other processes do not learn of
    changes made during it before then; and a process that ends during it forgets them, for which
    `invalidating` has a remedy.

    It belongs to the event loop, and to the process, that it was opened on.
    """

    def __init__(self, memory: InMemoryCache[T], redis: RedisCache[T]) -> None:
        """Put a memory of its own before Redis, whose times to live hold."""
        super().__init__(object, redis.times, redis.name)
        self._own = memory._own
        self._memory = memory.tier
        self._redis = redis
        self._tier = redis.tier.apart()
        self._look = self._memory.look  # type: ignore[method-assign]  # a call less on each hit
        self._journal: dict[Change, None] = {}
        self._travels: set[_Travel] = set()
        self._is_connected = False
        self._listening: asyncio.Task[None] | None = None
        self._is_ready = asyncio.Event()
        self._is_closed = False

    @property
    def is_connected(self) -> bool:
        """It uses Redis, and hears of what others change; if not, memory alone."""
        return self._is_connected

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Begin to listen for what others change; return when it is known whether Redis is there.

        It happens at the first use, if not before; once it was closed, only here.
        """
        self._is_closed = False
        listening = self._listening
        if listening is not None and listening.cancelling():
            await asyncio.wait([listening])  # it is being closed, or that was given up
        await self._get_ready()

    async def _get_ready(self) -> None:
        if self._listening is None or self._listening.done():
            self._is_ready.clear()
            self._listening = start_task(self._listen())
        await self._is_ready.wait()

    async def close(self) -> None:
        """Listen no more, and close the connections; from then on it is memory alone."""
        self._is_closed = True
        self._is_ready.set()  # who waits for it goes on with memory alone
        listening = self._listening
        while listening is not None and not listening.done():
            listening.cancel()  # again and again: see `_is_to_end`
            await asyncio.wait([listening], timeout=LOOK)
        await self._redis.close()

    @property
    def _state(self) -> str:
        return "connected" if self._is_connected else "memory only"

    # Where values are kept

    async def _fetch(self, key: str) -> Kept[T] | None:
        if not await self._can_ask():
            return None
        travel = self._depart(key)
        try:
            kept = await self._tier.fetch(key)
        except CacheUnavailableError:
            self._fail()
            return None
        finally:
            self._travels.discard(travel)
        if kept is not None and not travel.is_doomed:
            self._memory.keep(key, kept)
        return kept

    async def _put(self, key: str, kept: Kept[T]) -> None:
        travel = self._depart(key)
        try:
            if await self._can_ask():
                await self._tier.put(key, kept)
        except CacheUnavailableError:
            self._fail()
            travel.is_doomed = False  # what was in memory is dropped, but this is new
        finally:
            self._travels.discard(travel)
        self._note(Change("key", key))
        self._arrive(travel, kept)

    async def _lease(self, key: str) -> object:
        if not await self._can_ask():
            return None
        try:
            return await self._tier.lease(key)
        except CacheUnavailableError:
            self._fail()
            return None

    async def _put_loaded(self, key: str, kept: Kept[T], flight: Flight[T], lease: object) -> None:
        if flight.is_doomed:
            return
        if isinstance(lease, Lease) and self._is_connected:
            travel = self._depart(key)
            try:
                if not await self._tier.put(key, kept, lease):
                    travel.is_doomed = True  # something newer is known elsewhere
            except CacheUnavailableError:
                self._fail()
            finally:
                self._travels.discard(travel)
            self._arrive(travel, kept)
        elif not self._is_connected:
            self._note(Change("key", key))
            self._memory.keep(key, kept)
        # Else it was begun while Redis was away: others may have changed it since.

    async def _remove(self, change: Change) -> int:
        count = self._drop(change)
        try:
            if await self._can_ask():
                count = await self._tier.remove(change)
        except CacheUnavailableError:
            self._fail()
        self._note(change)
        self._drop(change)  # again: it may have been fetched before Redis had removed it
        return count

    # On the way

    def _depart(self, key: str) -> _Travel:
        travel = _Travel(key)
        self._travels.add(travel)
        return travel

    def _arrive(self, travel: _Travel, kept: Kept[T]) -> None:
        """Keep in memory what Redis has taken, in place of all that is on its way here."""
        if not travel.is_doomed:
            self._doom_travels(Change("key", travel.key))
            self._memory.keep(travel.key, kept)

    def _drop(self, change: Change) -> int:
        self._doom_travels(change)
        return self._memory.remove(change)

    def _doom_travels(self, change: Change) -> None:
        # What tags a value has is not known before it is there: any may have this one.
        concerns = (lambda _, __: True) if change.kind == "tag" else change.concerns()
        for travel in self._travels:
            travel.is_doomed = travel.is_doomed or concerns(travel.key, frozenset())

    # Redis, and its absence

    async def _can_ask(self) -> bool:
        if self._is_closed:
            return False
        if not self._is_ready.is_set():
            await self._get_ready()
        return self._is_connected

    def _fail(self) -> None:
        self.stats.failures += 1
        self._lose()

    def _lose(self) -> None:
        """Go on with memory alone, and an empty one: others may have changed what it held."""
        if self._is_connected:
            self._is_connected = False
            self._forget()

    def _forget(self) -> None:
        # Loads go on: Redis takes what they bring only if their leases hold.
        self._drop(Change("all"))

    def _note(self, change: Change) -> None:
        """Remember what Redis has to be told when it is back."""
        if self._is_connected:
            return
        if len(self._journal) >= JOURNAL:
            self._journal = {Change("all"): None}
        if Change("all") not in self._journal:
            self._journal[change] = None

    async def _listen(self) -> None:
        pause = FIRST_PAUSE
        while True:
            begun = monotonic()
            try:
                await self._session()
            except Exception as error:  # noqa: BLE001 - whatever it is, nothing is heard any more
                _log.warning("%s is lost: %s", self.name, type(error).__name__)
            finally:
                self._lose()
            self._is_ready.set()
            if _is_to_end():
                return
            pause = FIRST_PAUSE if monotonic() - begun > LONGEST_PAUSE else pause
            await asleep(pause * (0.5 + random_number()))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _session(self) -> None:
        """Subscribe, tell Redis what it has missed, and listen until it is lost."""
        async with self._tier.client.pubsub() as subscription:
            async with asyncio.timeout(SILENCE):
                await subscription.subscribe(self._tier.channel)
            heard = monotonic()
            while await subscription.get_message(timeout=LOOK) is None:
                _check(heard)
            while self._journal:
                change = next(iter(self._journal))
                del self._journal[change]  # first: it may be made again while it is told
                try:
                    await self._tier.remove(change)
                except BaseException:
                    self._note(change)
                    raise
            # From here to the next `await` nothing else runs: no change can fall in between.
            self._forget()
            self._is_connected = True
            self._is_ready.set()
            await self._hear(subscription)

    async def _hear(self, subscription: Any) -> None:
        heard = asked = monotonic()
        while self._is_connected and not _is_to_end():
            message = await subscription.get_message(timeout=LOOK)
            if message is not None:
                heard = monotonic()
                if message["type"] == "subscribe":  # again: the client has connected anew
                    raise _Lost
                if message["type"] == "message":
                    change = self._tier.heard(message["data"])
                    if change is not None:
                        self._doom(change)
                        self._drop(change)
                continue
            _check(heard)
            if monotonic() - asked > PING:
                asked = monotonic()
                async with asyncio.timeout(SILENCE):
                    await subscription.ping()


class _Lost(Exception):
    """Redis does not answer pings, or others' changes went unheard for a while."""


def _is_to_end() -> bool:
    """Tell whether the task was cancelled: it may not have heard of it.

    Before Python 3.12 `asyncio.wait_for`, by which the client sends, swallows a cancellation that
    comes as it ends (CPython issue 86296).
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _check(heard: float) -> None:
    if monotonic() - heard > SILENCE:
        raise _Lost
