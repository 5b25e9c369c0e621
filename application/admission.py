"""Who is let in: as many dispatches as there is room for, and none any more once it is closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from leftfold.application.bus import Dispatch, Outcome, Step
from leftfold.application.errors import Overloaded, ShuttingDown
from leftfold.domain import Err


class Admission:
    """Middleware around the timeout and all that is inside of it: it knows what is under way."""

    def __init__(self, limit: int | None = None, unwritten: Callable[[], int] = int) -> None:
        """Let in at most `limit` dispatches at a time; none while as many are `unwritten`.

        Some of those may have been left behind by callers who went away.
        """
        self._limit = limit
        self._unwritten = unwritten
        self._running = 0
        self._is_closed = False
        self._idle: asyncio.Future[None] | None = None

    async def __call__(self, dispatch: Dispatch[Any], call_next: Step) -> Outcome:
        """Go on inward, or answer `Err(ShuttingDown)` or `Err(Overloaded)`."""
        if self._is_closed:
            return Err(ShuttingDown())
        limit = self._limit
        if limit is not None and (self._running >= limit or self._unwritten() >= limit):
            return Err(Overloaded(limit))
        self._running += 1
        try:
            return await call_next(dispatch)
        finally:
            self._running -= 1
            if self._idle is not None and not self._running and not self._idle.done():
                self._idle.set_result(None)

    async def drain(self) -> None:
        """Refuse new dispatches from now on, and wait for those under way."""
        self._is_closed = True
        if self._running and self._idle is None:
            self._idle = asyncio.get_running_loop().create_future()
        if self._idle is not None:
            await asyncio.shield(self._idle)
