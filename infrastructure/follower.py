"""Following the log: a page of events becomes a page of rows, in one transaction."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from cachetools import LRUCache
from eventsourcing.persistence import PersistenceError

from leftfold.application import EventMapper, Projection, ViewBehind, ViewStopped
from leftfold.application.ports import Log, Platform, ViewStore
from leftfold.domain import DomainError, LeftfoldError
from leftfold.infrastructure.access import may_pass
from leftfold.infrastructure.errors import ProjectionFailedError

R = TypeVar("R")

_log = logging.getLogger("leftfold.follower")

CACHED_ROWS = 20_000
"""Rows kept between pages; they are as the last page left them, or are dropped."""
CHUNK = 500
"""Events decoded at a time: few enough to stay in the processor's caches."""
IDLE = 1.0
"""Seconds after which the log is looked at without a hint: hints may be lost."""
LONGEST_PAUSE = 5.0
"""Seconds to wait at most after a failing database."""


class Follower(Generic[R]):
    """Keeps one view as new as the log.

    A page is folded from rows as they stood at the checkpoint, and written together with the
    new checkpoint on the condition that the old one still holds. So no event is skipped or
    folded twice, whoever else follows the same view, and the write lock is held for the writing
    only.
    """

    def __init__(
        self,
        projection: Projection[R],
        log: Log,
        views: ViewStore,
        mapper: EventMapper,
        platform: Platform,
        page_size: int,
        poll_interval: float = 0.1,
        paged: Callable[[Projection[Any], int, float], object] = lambda *_: None,
    ) -> None:
        """Fold at most `page_size` events in one transaction, and tell `paged` how many, how long.

        Where another process folds, look every `poll_interval` seconds while it is behind.
        """
        self.projection = projection
        self.position = 0
        """Up to where the view is folded, as far as this process knows."""
        self.head = 0
        """The log's last position, as of the last look."""
        self.folds = False
        """It folds the view; if not, it only watches how far another process is."""
        self.failure: LeftfoldError | None = None
        """Why the view stopped, if it did."""
        self._log = log
        self._views = views
        self._mapper = mapper
        self._platform = platform
        self._page_size = page_size
        self._poll_interval = poll_interval
        self._paged = paged
        topics = {topic for e in projection.event_types for topic in (e.TOPIC, *e.ALIASES)}
        # An event that the model does not know is not passed over: it may have been meant for it.
        self._without = tuple(topic for topic in mapper.event_topics() if topic not in topics)
        self._rows: LRUCache[str, R] = LRUCache(CACHED_ROWS)
        self._rows_at = -1
        self._hint = asyncio.Event()
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._is_stopping = False

    def wake(self) -> None:
        """Look at the log now, or soon where nobody waits for it and others fold."""
        self._hint.set()

    def stop(self) -> None:
        """End after the page under way."""
        self._is_stopping = True
        self._hint.set()

    async def run(self) -> None:
        """Follow the log, or whoever folds it, until stopped or an event cannot be folded."""
        pause, is_behind = 0.0, False
        while not self._is_stopping:
            self._hint.clear()
            try:
                step = self.fold_page if self.folds else self._look
                is_behind = await self._platform.in_thread(step)
            except Exception as error:  # noqa: BLE001 - a bug in the projection stops it, and is said
                if may_pass(error):
                    pause = min(max(2 * pause, 0.05), LONGEST_PAUSE)
                    _log.warning("%s waits %.2f s: %s", self.projection.table, pause, error)
                    await self._platform.sleep(pause)
                    continue
                self.failure = self._failure_of(error)
                _log.error("%s stopped: %s", self.projection.table, self.failure)
                self._answer()
                return
            pause = 0.0
            self._answer()
            if not is_behind:
                await self._wait_for_hint()
                if not (self.folds or self._waiting or self._is_stopping):
                    await self._platform.sleep(self._poll_interval)  # one look for many commits
        self._answer()

    async def wait_for(self, position: int, timeout: float) -> None:
        """Return when the view has seen a position. Raises `ViewBehind` after some seconds."""
        if self.position >= position:
            return
        if self.failure is not None or self._is_stopping:
            raise self._behind(position)
        seen: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((position, seen))
        self.wake()
        try:
            async with asyncio.timeout(timeout):
                await seen
        except TimeoutError:
            pass
        if self.position < position:
            raise self._behind(position)

    def _behind(self, wanted: int) -> ViewBehind:
        name, position = self.projection.name, self.position
        if self.failure is None:
            return ViewBehind(name, position, wanted)
        return ViewStopped(name, position, wanted, str(self.failure))

    def _failure_of(self, error: Exception) -> LeftfoldError:
        if isinstance(error, LeftfoldError) and not isinstance(error, DomainError):
            return error
        return ProjectionFailedError(self.projection.table, _described(error))

    def fold_page(self) -> bool:
        """Fold the next events into the view; tell whether there may be more to do."""
        projection, views, began = self.projection, self._views, self._platform.monotonic()
        begun = views.checkpoint(projection)
        if begun != self._rows_at:
            self._rows.clear()
        head = self.head = self._log.head()
        logged = (
            self._log.read(begun, self._page_size, without=self._without) if head > begun else []
        )
        is_full = len(logged) == self._page_size
        end = begun
        if logged:
            end = logged[-1].position if is_full else max(head, logged[-1].position)
        elif head > begun:
            end = head
        if end > begun:
            decode = self._mapper.decode
            changed: dict[str, R | None] = {}

            def load(keys: set[str]) -> dict[str, R | None]:
                return {**self._load(keys - changed.keys()), **_picked(changed, keys)}

            for begin in range(0, len(logged), CHUNK):
                chunk = logged[begin : begin + CHUNK]
                events = [decode(i, version, topic, state) for _, i, version, topic, state in chunk]
                changed.update(projection.fold(events, load))
            if not views.write(projection, changed, begun, end):
                self._rows_at = -1
                return True
            self._rows_at = end
            self._paged(projection, len(logged), self._platform.monotonic() - began)
            for key, row in changed.items():
                if row is None:
                    self._rows.pop(key, None)
                else:
                    self._rows[key] = row
        self.position, self.head = end, max(head, end)
        return is_full

    def _look(self) -> bool:
        self.position = self._views.checkpoint(self.projection)
        self.head = max(self.position, self._log.head())
        return False

    def _load(self, keys: set[str]) -> dict[str, R | None]:
        cached = self._rows
        rows: dict[str, R | None] = {key: cached[key] for key in keys if key in cached}
        missing = [key for key in keys if key not in rows]
        if missing:
            loaded = self._views.load(self.projection, missing)
            rows.update(loaded)
        return rows

    def _answer(self) -> None:
        still: list[tuple[int, asyncio.Future[None]]] = []
        for position, seen in self._waiting:
            if seen.done():
                continue
            if self.position >= position or self.failure is not None or self._is_stopping:
                seen.set_result(None)
            else:
                still.append((position, seen))
        self._waiting = still

    async def _wait_for_hint(self) -> None:
        # A page that another process writes gives no hint; only a commit to the log does.
        is_expected = bool(self._waiting) or self.position < self.head
        try:
            async with asyncio.timeout(self._poll_interval if is_expected else IDLE):
                await self._hint.wait()
        except TimeoutError:
            pass


def _picked(rows: dict[str, R | None], keys: set[str]) -> dict[str, R | None]:
    return {key: rows[key] for key in keys if key in rows}


def _described(error: Exception) -> str:
    """Say what stopped a projection, for logs and health, without what it was about.

    The stores' errors quote no values. The texts of others may: they are not shown.
    """
    name = type(error).__name__
    if isinstance(error, PersistenceError):
        return f"{name}: {error}"
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    code = frame.f_code
    return f"{name} in {code.co_name}, line {line} of {Path(code.co_filename).name}"
