"""Subscriptions: how subscribers are told of the log's events."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from leftfold.application.checkpoints import Change, Checkpoint, DeadLetter
from leftfold.application.ports import Platform
from leftfold.application.subscriber import Subscriber
from leftfold.infrastructure.pages import Outcome, Pages, Unreadable, described
from leftfold.infrastructure.resilience import RetryPolicy

_log = logging.getLogger("leftfold.subscriptions")

ATTEMPTS, FIRST_WAIT, JITTER = 5, 0.1, 0.1
"""To tell of an event, and seconds between them at first; then it is a dead letter."""
AT_ONCE = 100
"""Events told of between two moves of the checkpoint: so many may come again after a crash."""


class Subscription:
    """One subscriber as this program tells it: how far it is, which keys are stuck."""

    def __init__(
        self,
        subscriber: Subscriber,
        pages: Pages,
        platform: Platform,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Read pages for a subscriber."""
        self.reader = subscriber
        self.topics = frozenset(subscriber.topics)
        self.checkpoint = Checkpoint(0, -1)
        self.is_sparse = True
        self.until: int | None = None
        """Tell of no event beyond this position: views that it needs have not seen it."""
        self._pages = pages
        self._platform = platform
        self._stuck: set[str] | None = None
        self._is_stopping = False
        self._retry = retry or RetryPolicy(
            ATTEMPTS,
            FIRST_WAIT,
            JITTER,
            retry_on=Exception,
            clock=platform.monotonic,
            random=platform.random,
            sleep=platform.sleep,
        )

    def adopt(self, found: Checkpoint) -> None:
        """Go on from a checkpoint."""
        if found[:2] != self.checkpoint[:2]:
            self._stuck = None
        self.checkpoint = found

    def stop(self) -> None:
        """Tell of no more events than the one under way."""
        self._is_stopping = True

    async def turn(self, limit: int) -> Outcome:
        """Tell of the next events, and move the checkpoint."""
        in_thread = self._platform.in_thread
        at_once = min(limit, AT_ONCE)
        page = await in_thread(self._pages.read_for, self, at_once, self.until)
        parked: list[DeadLetter] = []
        stuck = await in_thread(self._stuck_keys)
        end = page.end
        for at, event in zip(page.logged, page.events, strict=True):
            if self._is_stopping:
                end = at.position - 1
                break
            error = await self._tell(event, stuck)
            if error is not None and self.reader.everywhere:
                _log.error("%s was not told of %s: %s", self.reader.name, at.position, error)
            elif error is not None:
                key = self._key_of(event)
                stuck.add(key)
                now = self._platform.now()
                letter = DeadLetter(
                    at.position, key, at.aggregate_id, at.version, at.topic, error, now
                )
                parked.append(letter)
        if end <= self.checkpoint.position:
            return Outcome(head=page.head)
        if self.reader.everywhere:
            self.checkpoint = self.checkpoint._replace(position=end)
            return Outcome(len(page.logged), page.has_more, head=page.head)
        change = Change(self.reader, self.checkpoint, parked=parked)
        if not await in_thread(self._pages.views.write, [change], end):
            self._stuck = None
            return Outcome(len(page.logged), is_lost=True, head=page.head)
        letters = self.checkpoint.dead_letters + len(parked)
        self.checkpoint = self.checkpoint._replace(position=end, dead_letters=letters)
        self._stuck = stuck
        return Outcome(len(page.logged), page.has_more, head=page.head)

    async def retry(self) -> tuple[int, int]:
        """Tell again of what is parked, in order; return how many went well, and how many stay."""
        in_thread, views = self._platform.in_thread, self._pages.views
        stuck: set[str] = set()
        released = kept = 0
        for letter in await in_thread(views.dead_letters, self.reader):
            _, event = await in_thread(self._pages.read_at, letter.position)
            error = await self._tell(event, stuck)
            if error is None:
                released += 1
                await in_thread(self._pages.change, self, (letter,), ())
            else:
                kept += 1
                stuck.add(letter.key)
                if error:
                    again = replace(letter, error=error)
                    await in_thread(self._pages.change, self, (), (again,))
        return released, kept

    def _stuck_keys(self) -> set[str]:
        if self._stuck is None and not self.reader.everywhere:
            self._stuck = {letter.key for letter in self._pages.views.dead_letters(self.reader)}
        return set(self._stuck or ())

    async def _tell(self, event: Any, stuck: set[str]) -> str | None:
        """Tell of an event; return why it could not be done, "" if others come first."""
        if isinstance(event, Unreadable):
            return str(event.error) if event.concerns(self.topics) else None
        if not self.reader.is_of(event):
            return None
        if stuck and self._key_of(event) in stuck:
            return ""
        try:
            await self._retry.call(self.reader.tell, event, self._platform.in_own_thread)
        except Exception as error:  # noqa: BLE001 - whatever effects raise
            return described(error)
        return None

    def _key_of(self, event: Any) -> str:
        return event.originator_id.hex if isinstance(event, Unreadable) else self.reader.key(event)
