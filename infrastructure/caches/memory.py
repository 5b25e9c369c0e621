"""The cache in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from cachetools import TLRUCache

from leftfold.application.caching import InvalidCacheArgumentError
from leftfold.infrastructure.caches.entries import Change, Kept, Times
from leftfold.infrastructure.caches.loading import Flight, LoadingCache
from leftfold.infrastructure.platform import Lock, epoch_seconds, random_number

T = TypeVar("T")

READS = 1_000
"""Reads between two writes that count for what was used last: the latest."""


class _Bounded(TLRUCache[str, float]):
    """When the keys that are kept leave; `values` loses those that have no place or time left."""

    def __init__(self, size: int, times: Times, values: dict[str, Any]) -> None:
        super().__init__(size, ttu=lambda _, leaves, __: leaves, timer=times.clock)
        self._of = values

    def expire(self, time: float | None = None) -> list[tuple[str, float]]:
        gone = super().expire(time)
        for key, _ in gone:
            self._of.pop(key, None)
        return gone

    def popitem(self) -> tuple[str, float]:
        item = super().popitem()
        self._of.pop(item[0], None)
        return item


class MemoryTier(Generic[T]):
    """Values in this process: the `size` that were used last. Safe for threads.

    A read takes no lock: it looks into a dictionary, and notes the key; who writes next tells
    the cache that decides which values stay.
    """

    def __init__(self, size: int, times: Times) -> None:
        """Keep at most `size` values. Raises `InvalidCacheArgumentError`."""
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InvalidCacheArgumentError("size", f"{size!r} is no whole number from 1 up")
        self._times = times
        self._values: dict[str, Kept[T]] = {}
        self._keys = _Bounded(size, times, self._values)
        self._read: deque[str] = deque(maxlen=READS)
        self._note = self._read.append
        self._lock = Lock()

    def look(self, key: str) -> Kept[T] | None:
        """Return what is kept, also if it has expired."""
        kept = self._values.get(key)
        if kept is not None:
            self._note(key)
        return kept

    def keep(self, key: str, kept: Kept[T]) -> None:
        """Keep a value."""
        with self._lock:
            while self._read:
                self._keys.get(self._read.popleft())
            self._keys[key] = kept.expires + self._times.stale_for
            if key in self._keys:
                self._values[key] = kept
            else:  # its time is over already
                self._values.pop(key, None)

    def remove(self, change: Change) -> int:
        """Keep it no longer; return how many values there were that had not expired."""
        concerns, count = change.concerns(), 0
        with self._lock:
            some = [change.what] if change.kind == "key" else list(self._values)
            for key in some:
                kept = self._values.get(key)
                if kept is not None and concerns(key, kept.tags):
                    self._keys.pop(key, None)
                    self._values.pop(key, None)
                    count += self._times.is_fresh(kept)
        return count


class InMemoryCache(LoadingCache[T]):
    """Keeps values in this process, at most `size` of them: those used last.

        cache = InMemoryCache(ItemRow, size=1_000)
        row = await cache.get_or_load("A", lambda: fetch("A"), ttl=30)

    May be used from several threads and event loops.
    """

    def __init__(
        self,
        kind: type[T] | Any,
        *,
        size: int = 10_000,
        stale_for: float = 0.0,
        jitter: float = 0.0,
        name: str = "memory",
        clock: Callable[[], float] = epoch_seconds,
        random: Callable[[], float] = random_number,
    ) -> None:
        """Keep values of a type, which is one that pydantic knows.

        For `stale_for` seconds an expired value may stand in for a failing source; times to live
        are lengthened by up to `jitter` seconds. `clock` tells seconds since 1970. Raises
        `InvalidCacheArgumentError`.
        """
        super().__init__(kind, Times(clock, random, stale_for, jitter), name)
        self.tier: MemoryTier[T] = MemoryTier(size, self.times)
        self._look = self.tier.look  # type: ignore[method-assign]  # a call less on each hit

    async def _fetch(self, key: str) -> Kept[T] | None:  # noqa: ARG002 - there is nothing else
        return None

    async def _put(self, key: str, kept: Kept[T]) -> None:
        self.tier.keep(key, kept)

    async def _put_loaded(
        self,
        key: str,
        kept: Kept[T],
        flight: Flight[T],
        lease: object,  # noqa: ARG002 - others need one
    ) -> None:
        with self._lock:  # or it could be doomed between the question and the keeping
            if not flight.is_doomed:
                self.tier.keep(key, kept)

    async def _remove(self, change: Change) -> int:
        return self.tier.remove(change)
