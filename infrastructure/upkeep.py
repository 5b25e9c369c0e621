"""Upkeep of views: what was put aside, and building anew."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from eventsourcing.persistence import PersistenceError

from leftfold.application import EventStoreUnavailable, InvalidModelError, Projection
from leftfold.application.checkpoints import Checkpoint, Comparison, DeadLetter, full_name
from leftfold.application.ports import Access, Platform
from leftfold.infrastructure.access import may_pass
from leftfold.infrastructure.errors import (
    ViewBusyError,
    ViewChangedError,
    ViewInUseError,
)
from leftfold.infrastructure.follower import (
    FIRST_PAUSE,
    LEASE,
    RENEWED,
    SOON,
    Followed,
    Follower,
    give_back,
)
from leftfold.infrastructure.pages import (
    Fold,
    Outcome,
    Pages,
    fault_of,
)
from leftfold.infrastructure.resilience import RetryPolicy
from leftfold.infrastructure.subscriptions import Subscription

T = TypeVar("T")

REBUILD = 5_000
"""Events a page of a rebuild."""
RENEWAL = 1.0
"""Seconds that such a page may take at most: then its lease is renewed."""
ATTEMPTS = 6
"""Of a step of a rebuild where the store fails; they take some two seconds."""
TRIES = 1_000
"""To find a view and the one beside it equally far."""


def untold(_position: int, _head: int) -> None:
    """Nobody is told."""


@dataclass(frozen=True, slots=True)
class _NoRow:
    """A row of a view of which nothing is known but its table."""

    nothing: int


@dataclass(frozen=True, slots=True)
class Retried:
    """How a retry of dead letters went, in events."""

    released: int
    """Taken in now."""
    kept: int
    """Still put aside."""


Told = Callable[[int, int], object]
"""Is told how far a rebuild is, and how far the log."""


class Upkeep:
    """What may be done to views, processes and subscribers while they run, by anybody."""

    def __init__(
        self, follower: Follower, pages: Pages, platform: Platform, access: Access
    ) -> None:
        self._follower = follower
        self._pages = pages
        self._platform = platform
        self._read = access.read

    async def dead_letters(self, name: str) -> tuple[DeadLetter, ...]:
        """Return what was put aside by readers of a name, by position."""
        found: list[DeadLetter] = []
        for reader in self._named(name):
            found += await self._read(self._pages.views.dead_letters, reader.reader)
        return tuple(found)

    async def retry(self, name: str) -> Retried:
        """Take in what was put aside, in order; what stopped goes on."""
        released = kept = 0
        for reader in self._named(name):
            work = reader.work
            if isinstance(work, Subscription):
                well, ill = await work.retry()
            else:
                fold = Fold(work.reader, work.process)
                well, ill = await self._in_thread(self._pages.retry, fold)
            released, kept = released + well, kept + ill
            if not reader.is_local:
                # Whoever stopped sees it.
                await self._in_thread(self._pages.change, reader.reader, (), ())
            reader.may_go_on()
        self._follower.follow_again()
        return Retried(released, kept)

    async def drop(self, name: str, position: int | None = None) -> int:
        """Give up the dead letters of readers of a name, or one; return how many events."""
        dropped = 0
        for reader in self._named(name):
            given_up = await self._in_thread(self._pages.drop, reader.reader, position)
            if given_up:
                reader.may_go_on()
            dropped += given_up
        self._follower.follow_again()
        return dropped

    async def rebuild(self, name: str, told: Told = untold) -> Comparison:
        """Build a view anew beside itself, and give it the rows that came out differently.

        It is shown and kept up to date all the while, and goes on if it had stopped; what its own
        statements wrote is left as it is. One that was interrupted goes on where it was, if the
        code is the same. Of several versions it is the newest. Returns how many rows were the
        same, changed, added, removed.
        """
        reader = max(self._named(name), key=lambda reader: reader.reader.version)
        work = reader.work
        if isinstance(work, Subscription) or work.process is not None:
            raise InvalidModelError(f"{name} is no projection of its own, and cannot be built anew")
        rebuild = _Rebuild(work.reader, self._pages, self._platform, self._in_thread, told)
        try:
            compared = await rebuild.run()
        finally:
            await rebuild.release()
        reader.may_go_on()
        self._follower.follow_again()
        return compared

    async def compare(self, name: str) -> Comparison | None:
        """Compare the newest version of a view in this model with the one before it in the store.

        None if there is no other, if their columns differ, or if they are never equally far.
        """
        newest = max(self._named(name), key=lambda reader: reader.reader.version)
        return await self._follower.compare(newest, self._read)

    async def versions(self, name: str) -> dict[int, bool]:
        """Return the versions that are stored of a view, and whether a process keeps each.

        One of which a rebuild is under way is kept, too.
        """
        found = await self._read(self._pages.views.versions, name)
        return {v: is_held or found.get(-v, False) for v, is_held in found.items() if v > 0}

    async def drop_version(self, name: str, version: int) -> None:
        """Delete an old version of a view, which nobody keeps up to date any more.

        Raises `ViewInUseError` for one that a process holds, or that is this model's, and
        `InvalidModelError` for one that is not stored.
        """
        versions = await self.versions(name)
        table = full_name(name, version)
        if table in self._follower.readers or versions.get(version, False):
            raise ViewInUseError(table)
        if version not in versions:
            raise InvalidModelError(f"there is no projection {name} version {version}")
        old = Projection(name, version=version, row=_NoRow)
        await self._read(self._pages.views.drop, old.anew())  # a rebuild was interrupted
        await self._read(self._pages.views.drop, old)

    def _named(self, name: str) -> Sequence[Followed]:
        return named(self._follower.readers, (name,))

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Call what may not simply be called again. Raises `EventStoreUnavailable`."""
        try:
            return await self._platform.in_thread(function, *args)
        except PersistenceError as error:
            if not may_pass(error):
                raise
            raise EventStoreUnavailable(str(error)) from error


class _Rebuild:
    """One view as it is built anew beside itself."""

    def __init__(
        self,
        projection: Projection[Any],
        pages: Pages,
        platform: Platform,
        in_thread: Callable[..., Awaitable[Any]],
        told: Told,
    ) -> None:
        self._projection = projection
        self._pages = pages
        self._views = pages.views
        self._platform = platform
        self._in_thread = in_thread
        self._told = told
        self._anew = _beside(projection)
        self._fold = Fold(self._anew)
        self._owner = platform.new_id().hex
        self._held_at = 0.0
        self._limit = REBUILD
        self._retry = RetryPolicy(
            ATTEMPTS,
            FIRST_PAUSE,
            FIRST_PAUSE,
            retry_on=EventStoreUnavailable,
            clock=platform.monotonic,
            random=platform.random,
            sleep=platform.sleep,
        )

    async def _persistently(self, function: Callable[..., T], *args: Any) -> T:
        """Call what may be done twice: a page that was written is seen at the next look."""
        return await self._retry.call(self._in_thread, function, *args)

    async def run(self) -> Comparison:
        """Fold until both are equally far, and take over."""
        await self._begin()
        for _ in range(TRIES):
            live = await self._persistently(self._look)
            await self._get_to(live.position)
            if self._fold.checkpoint.position == live.position:
                compared: Comparison | None = await self._in_thread(
                    self._views.take_over, self._projection, self._anew
                )
                if compared is not None:
                    return compared
            elif self._fold.checkpoint.position > live.position:
                await self._platform.sleep(SOON)  # the view itself gets on, too
        raise ViewBusyError(self._projection.table)

    async def release(self) -> None:
        """Let others go on with it."""
        await give_back(self._views, self._owner, self._platform)

    async def _begin(self) -> None:
        """Make what is built anew, if it is not there, and hold it.

        Waits for a lease to run out: whoever had it may be gone.
        """
        latest = self._platform.monotonic() + 2 * LEASE
        while not await self._in_thread(self._take):
            if self._platform.monotonic() > latest:
                raise ViewBusyError(self._anew.table)
            await self._platform.sleep(RENEWED)

    def _take(self) -> bool:
        views, anew = self._views, self._anew
        try:
            views.define(anew)
        except ViewChangedError:  # by other code, which was interrupted
            if views.versions(anew.name).get(anew.version, False):
                return False
            views.drop(anew)
            views.define(anew)
        return self._hold()

    def _hold(self) -> bool:
        (held,) = self._views.hold([self._anew], self._owner, LEASE)
        self._held_at = self._platform.monotonic()
        return held.owner == self._owner

    def _look(self) -> Checkpoint:
        """Learn how far this is, and return how far the view itself is."""
        held, live = self._views.checkpoints([self._anew, self._projection])
        if held.owner != self._owner:
            raise ViewBusyError(self._anew.table)
        # Not built, whatever was reached: what cannot be folded halts it.
        self._fold.adopt(held._replace(is_built=False))
        return live

    async def _get_to(self, position: int) -> None:
        fold = self._fold
        while fold.checkpoint.position < position:
            began = self._platform.monotonic()
            if began - self._held_at > RENEWED:
                await self._persistently(self._hold)
            outcome: Outcome = await self._persistently(
                self._pages.fold_alone, fold, self._limit, position
            )
            if outcome.is_lost:
                return
            fault = fault_of(self._anew, fold.checkpoint)
            if fault is not None:
                raise fault
            is_slow = self._platform.monotonic() - began > RENEWAL
            self._limit = max(1, self._limit // 2) if outcome.failed or is_slow else REBUILD
            if not outcome.failed:
                self._told(fold.checkpoint.position, outcome.head)


def _beside(projection: Projection[Any]) -> Projection[Any]:
    """Return what is built of a view beside it: only rows, until they are the view's own.

    The view's own statements have run for these events, and not all rows are there that make
    those of a unique column different.
    """
    anew = projection.anew()
    anew.indexes = anew.unique = ()
    anew.writes = None
    return anew


def named(readers: Mapping[str, Followed], names: Sequence[str]) -> list[Followed]:
    """Return the readers with these names, in all their versions. Raises `InvalidModelError`."""
    found = [reader for reader in readers.values() if reader.reader.name in names]
    unknown = set(names) - {reader.reader.name for reader in found}
    if unknown:
        raise InvalidModelError(f"there is no projection {', '.join(sorted(unknown))}")
    return found
