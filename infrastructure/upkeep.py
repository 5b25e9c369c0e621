"""Upkeep of views: what was put aside, and building anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from leftfold.application import InvalidModelError
from leftfold.application.checkpoints import DeadLetter
from leftfold.application.ports import Access, Platform
from leftfold.infrastructure.follower import Followed, Follower
from leftfold.infrastructure.pages import Fold, Pages
from leftfold.infrastructure.subscriptions import Subscription


@dataclass(frozen=True, slots=True)
class Retried:
    """How a retry of dead letters went, in events."""

    released: int
    """Taken in now."""
    kept: int
    """Still put aside."""


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

    def _named(self, name: str) -> Sequence[Followed]:
        return named(self._follower.readers, (name,))


def named(readers: Mapping[str, Followed], names: Sequence[str]) -> list[Followed]:
    """Return the readers with these names, in all their versions. Raises `InvalidModelError`."""
    found = [reader for reader in readers.values() if reader.reader.name in names]
    unknown = set(names) - {reader.reader.name for reader in found}
    if unknown:
        raise InvalidModelError(f"there is no projection {', '.join(sorted(unknown))}")
    return found
