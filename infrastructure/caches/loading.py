"""What all caches share: one load a key, and what wins over it."""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from typing_extensions import override

from leftfold.application.caching import (
    CacheEntry,
    CacheProvider,
    Loaded,
    Loader,
    NotKept,
    PersonalNotKeptError,
)
from leftfold.infrastructure.caches.entries import Change, Kept, Times, copier
from leftfold.infrastructure.errors import CacheUnavailableError
from leftfold.infrastructure.health import PartHealth
from leftfold.infrastructure.platform import Lock, start_task

T = TypeVar("T")


@dataclass(slots=True)
class CacheStats:
    """What a cache has seen since it was made."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    stale: int = 0
    """Expired values that stood in for a failing source."""
    failures: int = 0
    """Times that what it is kept in did not answer."""


class Landed(NamedTuple, Generic[T]):
    """What a load brought: a value that was kept, or a new one."""

    kept: Kept[T]
    is_new: bool


class Flight(Generic[T]):
    """A load under way."""

    def __init__(self, number: int, tags: frozenset[str]) -> None:
        self.number = number
        self.tags = tags
        self.after = 0
        """The latest position that anybody who waits asks for."""
        self.is_doomed = False
        """What it loads is not to be kept: something newer is known."""
        self.answer: Future[Landed[T]] = Future()
        self.answer.set_running_or_notify_cancel()  # nobody who waits can cancel it


class _Abandoned(Exception):
    """The loop that a load ran on has ended; whoever waits loads himself."""


async def _answer(flight: Flight[T]) -> Landed[T]:
    """Wait for a load; who is cancelled does not cancel it."""
    answer = asyncio.wrap_future(flight.answer)
    answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # it was seen
    return await asyncio.shield(answer)


class LoadingCache(CacheProvider[T], ABC):
    """A cache, but for where it keeps its values. See `CacheProvider` for what the methods do."""

    def __init__(self, kind: type[T] | Any, times: Times, name: str) -> None:
        """Cache values of a type, which tells whether they have to be copied."""
        self.name = name
        self.times = times
        self.stats = CacheStats()
        self._own: Callable[[T], T] = copier(kind)
        self._flights: dict[str, Flight[T]] = {}
        self._numbers = itertools.count(1)
        self._lock = Lock()

    # Where values are kept

    def _look(self, key: str) -> Kept[T] | None:  # noqa: ARG002 - others do
        """Return what is in memory, also if it has expired."""
        return None

    @abstractmethod
    async def _fetch(self, key: str) -> Kept[T] | None:
        """Return what is kept outside of memory, also if it has expired."""

    @abstractmethod
    async def _put(self, key: str, kept: Kept[T]) -> None:
        """Keep a value."""

    async def _lease(self, key: str) -> object:  # noqa: ARG002 - others do
        """Begin a load."""
        return None

    @abstractmethod
    async def _put_loaded(self, key: str, kept: Kept[T], flight: Flight[T], lease: object) -> None:
        """Keep a value that was loaded, unless something newer is known."""

    @abstractmethod
    async def _remove(self, change: Change) -> int:
        """Keep it no longer; return how many values there were."""

    @property
    def _state(self) -> str:
        return "in use"

    # What others use

    @override
    async def get(self, key: str) -> T | None:
        kept = self._look(key)
        if kept is None or kept.expires <= self.times.clock():
            kept = await self._fetch(key)
            if kept is None or not self.times.is_fresh(kept):
                self.stats.misses += 1
                return None
        self.stats.hits += 1
        return self._own(kept.value)

    @override
    async def entry(self, key: str) -> CacheEntry[T] | None:
        kept = self._look(key) or await self._fetch(key)
        if kept is None or not self.times.is_fresh(kept):
            self.stats.misses += 1
            return None
        self.stats.hits += 1
        return self.times.entry(kept, self._own(kept.value))

    @override
    async def set(
        self,
        key: str,
        value: T,
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        position: int = 0,
    ) -> None:
        kept = self.times.keep(self._own(value), ttl, tags, position)
        self._doom(Change("key", key))
        await self._put(key, kept)
        self._doom(Change("key", key))  # as in `_invalidate`

    @override
    async def delete(self, key: str) -> None:
        await self._invalidate(Change("key", key))

    @override
    async def invalidate_pattern(self, pattern: str) -> int:
        return await self._invalidate(Change("pattern", pattern))

    @override
    async def invalidate_tag(self, tag: str) -> int:
        return await self._invalidate(Change("tag", tag))

    @override
    async def clear(self) -> None:
        await self._invalidate(Change("all"))

    @override
    async def get_or_load(
        self,
        key: str,
        loader: Loader[T],
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        after: int = 0,
    ) -> T:
        kept = self._look(key)
        if kept is not None and kept.position >= after and kept.expires > self.times.clock():
            self.stats.hits += 1
            return self._own(kept.value)
        entry = await self.entry_or_load(key, loader, ttl, tags=tags, after=after)
        return entry.value

    @override
    async def entry_or_load(
        self,
        key: str,
        loader: Loader[T],
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        after: int = 0,
    ) -> CacheEntry[T]:
        asked = next(self._numbers)
        # What is wrong with the arguments is said before the load; tags may be an iterator.
        labels = self.times.keep(None, ttl, tags, 0).tags
        kept = self._look(key)
        if kept is not None and self._serves(kept, after):
            self.stats.hits += 1
            return self.times.entry(kept, self._own(kept.value))
        while True:
            flight = self._join(key, loader, ttl, labels, after)
            try:
                landed = await _answer(flight)
            except _Abandoned:
                continue
            except NotKept:
                raise
            except Exception:
                kept = await self._fetched(key)  # what was deleted meanwhile is not served
                if kept is None or kept.position < after or not self.times.is_usable(kept):
                    raise
                self.stats.stale += 1
                return self.times.entry(kept, self._own(kept.value), is_stale=True)
            kept, is_new = landed
            # A load that began before this was asked for may not have seen `after`.
            if kept.position >= after or (is_new and flight.number > asked):
                if is_new:
                    self.stats.misses += 1
                else:
                    self.stats.hits += 1
                return self.times.entry(kept, self._own(kept.value))

    def health(self) -> PartHealth:
        """Tell what it has seen, as a runtime's health does."""
        return PartHealth(self.name, "cache", self._state, asdict(self.stats))

    # Loads

    def _serves(self, kept: Kept[T], after: int) -> bool:
        return kept.position >= after and self.times.is_fresh(kept)

    async def _fetched(self, key: str) -> Kept[T] | None:
        """Return what is kept; where that does not answer there is nothing."""
        try:
            return self._look(key) or await self._fetch(key)
        except CacheUnavailableError:
            return None

    def _join(
        self, key: str, loader: Loader[T], ttl: float | None, tags: frozenset[str], after: int
    ) -> Flight[T]:
        """Return the load of a key that is under way, or begin one."""
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                flight.after = max(flight.after, after)
                return flight
            flight = self._flights[key] = Flight(next(self._numbers), tags)
            flight.after = after
        loading = start_task(self._load(key, flight, loader, ttl))
        loading.add_done_callback(lambda _: self._abandon(key, flight))
        return flight

    def _abandon(self, key: str, flight: Flight[T]) -> None:
        """See to a load whose task was cancelled before it began: it could not do so itself."""
        if not flight.answer.done():
            self._land(key, flight)
            flight.answer.set_exception(_Abandoned())

    async def _load(
        self, key: str, flight: Flight[T], loader: Loader[T], ttl: float | None
    ) -> None:
        try:
            landed = await self._bring(key, flight, loader, ttl)
        except asyncio.CancelledError as error:
            self._land(key, flight)
            task = asyncio.current_task()
            is_ended = task is not None and task.cancelling() > 0  # or the loader raised it itself
            flight.answer.set_exception(_Abandoned() if is_ended else error)
            raise
        except BaseException as error:  # noqa: BLE001 - whoever waits raises it
            self._land(key, flight)
            flight.answer.set_exception(error)
        else:
            self._land(key, flight)
            flight.answer.set_result(landed)

    async def _bring(
        self, key: str, flight: Flight[T], loader: Loader[T], ttl: float | None
    ) -> Landed[T]:
        kept = await self._fetched(key)
        if kept is not None and self._serves(kept, flight.after):
            return Landed(kept, is_new=False)
        self.stats.loads += 1
        lease: object = None
        with suppress(CacheUnavailableError):  # it is answered all the same
            lease = await self._lease(key)
        answer: Any = await loader()  # a value of T, or one with its position
        loaded: Loaded[T] = answer if isinstance(answer, Loaded) else Loaded(answer, 0)
        kept = self.times.keep(self._own(loaded.value), ttl, flight.tags, loaded.position)
        with suppress(CacheUnavailableError, PersonalNotKeptError):
            await self._put_loaded(key, kept, flight, lease)
        return Landed(kept, is_new=True)

    def _land(self, key: str, flight: Flight[T]) -> None:
        with self._lock:
            if self._flights.get(key) is flight:
                del self._flights[key]

    async def _invalidate(self, change: Change) -> int:
        self._doom(change)
        count = await self._remove(change)
        self._doom(change)  # again: a load begun meanwhile may have found what was there
        return count

    def _doom(self, change: Change) -> None:
        """Let what is being loaded not be kept, and nobody else wait for it."""
        concerns = change.concerns()
        with self._lock:
            for key, flight in list(self._flights.items()):
                if concerns(key, flight.tags):
                    flight.is_doomed = True
                    del self._flights[key]
