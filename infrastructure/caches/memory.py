"""The cache in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from cachetools import TLRUCache

from leftfold.application.caching import InvalidCacheArgumentError
from leftfold.infrastructure.caches.entries import Change, Kept, Times
from leftfold.infrastructure.caches.loading import Flight, LoadingCache
from leftfold.infrastructure.platform import Lock, epoch_seconds, random_number

T = TypeVar("T")


class MemoryTier(Generic[T]):
    """Values in this process: the `size` that were used last. Safe for threads."""

    def __init__(self, size: int, times: Times) -> None:
        """Keep at most `size` values. Raises `InvalidCacheArgumentError`."""
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InvalidCacheArgumentError("size", f"{size!r} is no whole number from 1 up")
        stale_for = times.stale_for
        self._times = times
        self._kept: TLRUCache[str, Kept[T]] = TLRUCache(
            size, ttu=lambda _, kept, __: kept.expires + stale_for, timer=times.clock
        )
        self._lock = Lock()

    def look(self, key: str) -> Kept[T] | None:
        """Return what is kept, also if it has expired."""
        with self._lock:
            return self._kept.get(key)

    def keep(self, key: str, kept: Kept[T]) -> None:
        """Keep a value."""
        with self._lock:
            self._kept[key] = kept

    def remove(self, change: Change) -> int:
        """Keep it no longer; return how many values there were that had not expired."""
        with self._lock:
            if change.kind == "key":
                kept = self._kept.pop(change.what, None)
                return int(kept is not None and self._times.is_fresh(kept))
            if change.kind == "all":
                count = len(self._kept)
                self._kept.clear()
                return count
            concerns, count = change.concerns(), 0
            for key, kept in list(self._kept.items()):
                if concerns(key, kept.tags):
                    del self._kept[key]
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
