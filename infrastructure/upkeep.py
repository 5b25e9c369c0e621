"""Upkeep of views: what was put aside, and building anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from leftfold.application import InvalidModelError, Projection
from leftfold.application.checkpoints import Checkpoint, Comparison, DeadLetter
from leftfold.application.ports import Access, Platform
from leftfold.infrastructure.errors import ViewBusyError, ViewChangedError, ViewInUseError
from leftfold.infrastructure.follower import LEASE, SOON, Followed, Follower
from leftfold.infrastructure.pages import Fold, Pages, failure_of
from leftfold.infrastructure.subscriptions import Subscription

REBUILD = 5_000
"""Events a page of a rebuild."""
RENEWAL = 1.0
"""Seconds that such a page may take at most: then its lease is renewed."""
TRIES = 1_000
"""To find a view and the one beside it equally far."""
PAIR = 2


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
                well, ill = await self._platform.in_thread(self._pages.retry, fold)
            released, kept = released + well, kept + ill
            reader.failure = None
        self._follower.follow_again()
        return Retried(released, kept)

    async def drop(self, name: str, position: int | None = None) -> int:
        """Give up the dead letters of readers of a name, or one; return how many events."""
        dropped = 0
        for reader in self._named(name):
            dropped += await self._platform.in_thread(self._pages.drop, reader, position)
        self._follower.look()
        return dropped

    async def rebuild(self, name: str, told: Told = untold) -> Comparison:
        """Build a view anew beside itself, and give it the rows that came out differently.

        It is shown and kept up to date all the while. One that was interrupted goes on where it
        was, if the code is the same. Returns how many rows were the same, changed, added, removed.
        """
        (reader,) = self._named(name)
        projection = reader.reader
        if not isinstance(projection, Projection) or not projection.version > 0:
            raise InvalidModelError(f"{name} is no projection, and cannot be built anew")
        if isinstance(reader.work, Fold) and reader.work.process is not None:
            raise InvalidModelError(f"{name} is a process's, and cannot be built anew")
        in_thread, views, anew = self._platform.in_thread, self._pages.views, projection.anew()
        owner = self._platform.new_id().hex
        try:
            await self._read(views.define, anew)
        except ViewChangedError:  # by other code, which was interrupted
            await self._read(views.drop, anew)
            await self._read(views.define, anew)
        fold, limit = Fold(anew), REBUILD
        for _ in range(TRIES):
            held, live = await in_thread(self._hold, anew, projection, owner)
            if held.owner != owner:
                raise ViewBusyError(anew.table)
            fold.adopt(held)
            if held.position == live.position:
                compared = await in_thread(views.take_over, projection, anew)
                if compared is not None:
                    self._follower.look()
                    return compared
            limit = await self._rebuild(fold, owner, limit, live.position, told)
        raise ViewBusyError(projection.table)

    async def _rebuild(
        self, fold: Fold[Any], owner: str, limit: int, until: int, told: Told
    ) -> int:
        """Fold up to a position; return how many events a page may have."""
        in_thread = self._platform.in_thread
        while fold.checkpoint.position < until:
            began = self._platform.monotonic()
            outcome = await in_thread(self._pages.fold, [fold], limit, until)
            if fold in outcome.failed:
                error = outcome.failed[fold]
                if limit == 1:
                    raise failure_of(fold.reader.table, error)
                limit = max(1, limit // 2)  # so that it is found which event it is
                continue
            if outcome.is_lost:
                break
            told(fold.checkpoint.position, outcome.head)
            seconds = self._platform.monotonic() - began
            limit = REBUILD if seconds < RENEWAL else max(1, limit // 2)
            await in_thread(self._pages.views.hold, [fold.reader], owner, LEASE)
        if fold.checkpoint.position >= until:
            await self._platform.sleep(SOON)  # the view itself gets on, too
        return limit

    def _hold(
        self, anew: Projection[Any], projection: Projection[Any], owner: str
    ) -> tuple[Checkpoint, Checkpoint]:
        (held,) = self._pages.views.hold([anew], owner, LEASE)
        (live,) = self._pages.views.checkpoints([projection])
        return held, live

    async def compare(self, name: str) -> Comparison | None:
        """Compare the newest version of a view with the one before it in this model.

        None if there is no other, if their columns differ, or if they are never equally far.
        """
        versions = [r.reader for r in self._named(name) if isinstance(r.reader, Projection)]
        versions.sort(key=attrgetter("version"))
        if len(versions) < PAIR or versions[-1].column_types != versions[-2].column_types:
            return None
        for _ in range(TRIES):
            compared = await self._read(self._pages.views.compare, versions[-1], versions[-2])
            if compared is not None:
                return compared
            await self._platform.sleep(SOON)
        return None

    async def versions(self, name: str) -> dict[int, bool]:
        """Return the versions that are stored of a view, and whether a process keeps each."""
        return await self._read(self._pages.views.versions, name)

    async def drop_version(self, name: str, version: int) -> None:
        """Delete an old version of a view, which nobody keeps up to date any more.

        Raises `ViewInUseError` for one that a process holds, or that is this model's.
        """
        versions = await self.versions(name)
        is_ours = f"{name}_v{version}" in self._follower.readers
        if is_ours or versions.get(version, False):
            raise ViewInUseError(f"{name}_v{version}")
        if version in versions:
            old = Projection(name, version=version, row=_NoRow)
            await self._read(self._pages.views.drop, old)

    def _named(self, name: str) -> Sequence[Followed]:
        return named(self._follower.readers, (name,))


def named(readers: Mapping[str, Followed], names: Sequence[str]) -> list[Followed]:
    """Return the readers with these names, in all their versions. Raises `InvalidModelError`."""
    found = [reader for reader in readers.values() if reader.reader.name in names]
    unknown = set(names) - {reader.reader.name for reader in found}
    if unknown:
        raise InvalidModelError(f"there is no projection {', '.join(sorted(unknown))}")
    return found
