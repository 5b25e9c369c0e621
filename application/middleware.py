"""Middleware for the buses: logging, timeout, conflict retry."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_result, stop_after_attempt

from leftfold.application.bus import Dispatch, Middleware, Outcome, Step
from leftfold.application.errors import Conflict, OutcomeUnknown
from leftfold.application.ports import Platform
from leftfold.domain import Err

FIRST_DELAY = 0.001
"""Seconds; the longest first wait after a conflict is twice that."""

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
        took = (platform.monotonic() - begun) * 1000
        if isinstance(outcome, Err):
            error = type(outcome.error).__name__
            _log.info("%s %s: %s (%.1f ms)", dispatch.name, dispatch.command_id, error, took)
        else:
            _log.debug("%s %s done (%.1f ms)", dispatch.name, dispatch.command_id, took)
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

    The waits grow exponentially with full jitter, up to `max_delay` seconds.
    """

    async def around(dispatch: Dispatch[Any], call_next: Step) -> Outcome:
        outcome = await call_next(dispatch)
        if not _is_conflict(outcome) or max_attempts < 2:  # noqa: PLR2004 - one attempt was made
            return outcome

        async def attempt() -> Outcome:
            return await call_next(dispatch)

        def wait(state: RetryCallState) -> float:
            longest: float = min(max_delay, FIRST_DELAY * 2**state.attempt_number)
            return platform.random() * longest

        retrying = AsyncRetrying(
            stop=stop_after_attempt(max_attempts - 1),
            wait=wait,
            retry=retry_if_result(_is_conflict),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else outcome,
            sleep=platform.sleep,
        )
        return await retrying(attempt)

    return around


def _is_conflict(outcome: Outcome) -> bool:
    return isinstance(outcome, Err) and isinstance(outcome.error, Conflict)
