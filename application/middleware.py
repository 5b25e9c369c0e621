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

    async def around(dispatch: Dispatch[Any], call_next: Step) -> Outcome:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await call_next(dispatch)
        except TimeoutError:
            if not limit.expired():
                raise  # the handler's own
            return Err(OutcomeUnknown(dispatch.command_id))

    return around


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
