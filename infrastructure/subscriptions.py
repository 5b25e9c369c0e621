"""Subscriptions: how subscribers are told of the log's events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from leftfold.application import (
    EventStoreUnavailable,
    KeysUnavailable,
    Overloaded,
    ShuttingDown,
)
from leftfold.application.checkpoints import Change, Checkpoint, DeadLetter
from leftfold.application.ports import LoggedEvent, Platform
from leftfold.application.subscriber import Subscriber
from leftfold.infrastructure.errors import CacheUnavailableError
from leftfold.infrastructure.pages import Outcome, Pages, Unreadable, described
from leftfold.infrastructure.resilience import CircuitOpenError, RetryPolicy
from leftfold.infrastructure.rows import indexable

_log = logging.getLogger("leftfold.subscriptions")

ATTEMPTS, FIRST_WAIT, JITTER = 5, 0.1, 0.1
"""To tell of an event, and seconds between them at first; then it is a dead letter."""
AT_ONCE, WITHIN = 100, 1.0
"""Events told of between two moves of the checkpoint, and seconds after which no other is begun:
so many may come again after a crash."""
NOT_NOW = (
    *(CacheUnavailableError, CircuitOpenError, EventStoreUnavailable, KeysUnavailable),
    *(Overloaded, ShuttingDown),
)
"""What effects raise though nothing is wrong with the event: later it may go well."""


Epochs: TypeAlias = Sequence[int]
"""Of the views that a subscriber needs: another one may mean other rows."""


class Subscription:
    """One subscriber as this program tells it: how far it is, which keys are stuck."""

    def __init__(self, subscriber: Subscriber, pages: Pages, platform: Platform) -> None:
        """Read pages for a subscriber."""
        self.reader = subscriber
        self.topics = frozenset(subscriber.topics)
        self.checkpoint = Checkpoint(0, -1)
        self.is_sparse = True
        self._pages = pages
        self._platform = platform
        self._stuck: set[str] | None = None
        self._epochs: Epochs | None = None
        self._is_stopping = False
        self._retry = RetryPolicy(
            ATTEMPTS,
            FIRST_WAIT,
            JITTER,
            retry_on=lambda outcome: isinstance(outcome, Exception) and not self._is_stopping,
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
        """Tell of no more events than the one under way, and that not again if it fails."""
        self._is_stopping = True

    def is_outdated(self, epochs: Epochs) -> bool:
        """Tell whether rows may have changed without an event since the last turn."""
        return self.reader.renew is not None and epochs != self._epochs

    async def turn(self, limit: int, until: int | None = None, epochs: Epochs = ()) -> Outcome:
        """Tell of the next events, none beyond a position, and move the checkpoint.

        Raises what is `NOT_NOW` if the first of them has to wait.
        """
        await self._renew(epochs)
        if until is not None and until <= self.checkpoint.position:
            return Outcome(0, has_more=True, head=until)  # when the views have got on
        in_thread, monotonic = self._platform.in_thread, self._platform.monotonic
        page = await in_thread(self._pages.read_for, self, min(limit, AT_ONCE), until)
        stuck = await in_thread(self._stuck_keys)
        parked: list[DeadLetter] = []
        told, latest = 0, monotonic() + WITHIN
        for at, event in zip(page.logged, page.events, strict=True):
            if self._is_stopping or monotonic() > latest:
                break
            try:
                error = await self._tell(event, stuck)
            except NOT_NOW:
                if told:
                    break
                raise
            if error and self._is_stopping:
                break  # it was not tried often enough
            told += 1
            if error is None:
                continue
            if self.reader.everywhere:
                _log.error("%s was not told of %s: %s", self.reader.name, at.position, error)
            else:
                parked.append(self._dead_letter(at, event, error))
                stuck.add(parked[-1].key)
        is_whole = told == len(page.logged)
        end = page.end if is_whole else page.logged[told].position - 1
        if end > self.checkpoint.position and not await self._move(end, parked, stuck, page.head):
            return Outcome(told, is_lost=True, head=page.head)
        return Outcome(told, has_more=end < page.head, head=page.head)

    async def _renew(self, epochs: Epochs) -> None:
        renew = self.reader.renew
        if renew is None or not self.is_outdated(epochs):
            return
        # What is everywhere begins here, with nothing that could be old.
        if self._epochs is not None or not self.reader.everywhere:
            error = await self._attempt(renew())
            if error is not None:
                _log.error("%s does not begin anew: %s", self.reader.name, error)
        self._epochs = epochs

    async def retry(self) -> tuple[int, int]:
        """Tell again of what is parked, in order; return how many went well, and how many stay."""
        in_thread, pages = self._platform.in_thread, self._pages
        stuck: set[str] = set()
        released = kept = tried = 0
        # Meanwhile others may have been parked behind those that are free now.
        while letters := [letter for letter in await self._parked() if letter.position > tried]:
            for letter in letters:
                tried = letter.position
                _, event = await in_thread(pages.read_at, letter.position)
                try:
                    error = await self._tell(event, stuck)
                except NOT_NOW as rejection:
                    error = described(rejection)
                if error is None:
                    released += 1
                    await in_thread(pages.change, self.reader, (letter,), ())
                    continue
                kept += 1
                stuck.add(letter.key)
                if error:
                    again = replace(letter, error=error)
                    await in_thread(pages.change, self.reader, (), (again,))
        return released, kept

    async def _move(
        self, end: int, parked: Sequence[DeadLetter], stuck: set[str], head: int
    ) -> bool:
        """Move the checkpoint; tell whether nobody else has."""
        in_thread, views = self._platform.in_thread, self._pages.views
        begun = at = self.checkpoint
        is_built = end >= head
        if not self.reader.everywhere:
            write = partial(views.write, is_built=is_built)
            while not await in_thread(write, [Change(self.reader, at, parked=parked)], end):
                # To lose it is to tell all again: not if only dead letters were changed. What was
                # parked behind them may be free now.
                (found,) = await in_thread(views.checkpoints, [self.reader])
                is_ours = (found.position, found.owner) == (begun.position, begun.owner)
                if not is_ours or not all(letter.error for letter in parked):
                    self._stuck = None
                    return False
                at = found
        self._stuck = stuck if at is begun else None
        self.checkpoint = at._replace(
            position=end,
            is_built=at.is_built or is_built,
            dead_letters=at.dead_letters + len(parked),
        )
        return True

    async def _parked(self) -> Sequence[DeadLetter]:
        return await self._platform.in_thread(self._pages.views.dead_letters, self.reader)

    def _stuck_keys(self) -> set[str]:
        if self._stuck is None and not self.reader.everywhere:
            self._stuck = {letter.key for letter in self._pages.views.dead_letters(self.reader)}
        return set(self._stuck or ())

    async def _tell(self, event: Any, stuck: set[str]) -> str | None:
        """Tell of an event; return why it could not be done, "" if others come first.

        Raises what is `NOT_NOW`.
        """
        if isinstance(event, Unreadable):
            return described(event.error) if event.concerns(self.topics) else None
        if not self.reader.is_of(event):
            return None
        return await self._attempt(self._told(event, stuck))

    async def _told(self, event: Any, stuck: set[str]) -> str | None:
        if self._key_of(event) in stuck:
            return ""
        await self._retry.call(self.reader.tell, event, self._platform.in_own_thread)
        return None

    async def _attempt(self, effect: Awaitable[str | None]) -> str | None:
        """Return what an effect says, or why it failed. Raises what is `NOT_NOW`."""
        try:
            return await effect
        except NOT_NOW:
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return described(error)  # it is what the effect waits for that was cancelled
        except Exception as error:  # noqa: BLE001 - whatever effects raise
            return described(error)

    def _dead_letter(self, at: LoggedEvent, event: Any, error: str) -> DeadLetter:
        key = at.aggregate_id.hex
        if not isinstance(event, Unreadable):
            with suppress(Exception):  # it may be what is wrong with the event
                key = self._key_of(event)
        now = self._platform.now()
        return DeadLetter(at.position, key, at.aggregate_id, at.version, at.topic, error, now)

    def _key_of(self, event: Any) -> str:
        return indexable(self.reader.key(event))
