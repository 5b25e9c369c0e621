"""Middleware for the buses: logging, timeout, conflict retry."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from leftfold.application.bus import Dispatch, Middleware, Outcome, Step
from leftfold.application.errors import Conflict, OutcomeUnknown
from leftfold.application.ports import Platform
from leftfold.domain import Err

FIRST_DELAY = 0.001
"""Seconds; the longest wait before the third attempt is four times that."""

_log = logging.getLogger("leftfold.bus")


def logged(platform: Platform) -> Middleware:
    """Log every message by its type, never by its data: refusals as info, bugs as errors."""

    async def around(dispatch: Dispatch[Any], call_next: Step) -> Outcome:
        begun = platform.monotonic()
        try:
            outcome = await call_next(dispatch)
        except Exception:
            _log.exception("%s %s failed", dispatch.name, dispatch.command_id)
            raise
        is_refused = isinstance(outcome, Err)
        if is_refused or _log.isEnabledFor(logging.DEBUG):
            level = logging.INFO if is_refused else logging.DEBUG
            done = f": {type(outcome.error).__name__}" if isinstance(outcome, Err) else " done"
            took = (platform.monotonic() - begun) * 1000
            _log.log(level, "%s %s%s (%.1f ms)", dispatch.name, dispatch.command_id, done, took)
        return outcome

    return around


def timeout(seconds: float) -> Middleware:
    """Answer `Err(OutcomeUnknown)` after some seconds; what was begun may still be committed."""
    limits = _Limits(seconds)

    async def around(dispatch: Dispatch[Any], call_next: Step) -> Outcome:
        limit = limits.begin()
        try:
            outcome = await call_next(dispatch)
        except asyncio.CancelledError:
            if limits.end(limit):
                return Err(OutcomeUnknown(dispatch.command_id))
            raise
        except BaseException:
            limits.end(limit)
            raise
        limits.end(limit)
        return outcome

    return around


class _Limit:
    __slots__ = ("cancelling", "is_over", "task", "until")

    def __init__(self, task: asyncio.Task[Any], until: float) -> None:
        self.task = task
        self.until = until
        self.cancelling = task.cancelling()
        self.is_over = False


class _Limits:
    """Cancels tasks some seconds after they began, in the way of `asyncio.timeout`.

    All have the same time, so they end in the order in which they began, and one timer serves all.
    A timer for each takes a fifteenth of a command's time.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: dict[_Limit, None] = {}  # oldest first
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> _Limit:
        """Limit what the running task does from now on, until `end`."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if task is None:
            msg = "a command is dispatched in a task"
            raise RuntimeError(msg)
        limit = _Limit(task, loop.time() + self._seconds)
        self._running[limit] = None
        if self._timer is None:
            self._timer = loop.call_at(limit.until, self._look, loop)
        return limit

    def end(self, limit: _Limit) -> bool:
        """Limit it no longer; tell whether it was cancelled for this and nothing else."""
        if limit.is_over:
            return limit.task.uncancel() <= limit.cancelling
        del self._running[limit]
        return False

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for limit in list(self._running):
            if limit.until > now:
                self._timer = loop.call_at(limit.until, self._look, loop)
                return
            del self._running[limit]
            limit.is_over = True
            limit.task.cancel()


def conflict_retry(
    platform: Platform, max_attempts: int = 10, max_delay: float = 0.25
) -> Middleware:
    """Handle a command again after a `Conflict`: up to `max_attempts` times in all.

    The first time at once: who was first is known to be done. Then after waits that grow
    exponentially with full jitter, up to `max_delay` seconds.
    """

    async def around(dispatch: Dispatch[Any], call_next: Step) -> Outcome:
        outcome = await call_next(dispatch)
        for attempt in range(1, max_attempts):
            if not isinstance(outcome, Err) or not isinstance(outcome.error, Conflict):
                return outcome
            if attempt > 1:
                await platform.sleep(platform.random() * min(max_delay, FIRST_DELAY * 2**attempt))
            outcome = await call_next(dispatch)
        return outcome

    return around
