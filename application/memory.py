"""Aggregates in memory, each in the hands of at most one dispatch at a time."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from uuid import UUID

from leftfold.domain import Aggregate, Personal

IMMUTABLE = (
    *(str, int, float, bool, bytes, type(None), Decimal, date, time, timedelta, UUID),
    *(Enum, Personal),
)

NOT_THERE = (None, False)


class Hand:
    """An aggregate in a dispatch's hand, and how it was when it was taken."""

    __slots__ = (
        "_sealed_version",
        "_state",
        "aggregate",
        "is_current",
        "is_loaded",
        "is_saved",
        "is_taken",
        "version",
    )

    def __init__(
        self,
        aggregate: Aggregate | None,
        *,
        is_current: bool = True,
        is_loaded: bool = False,
        is_taken: bool = True,
    ) -> None:
        """Take an aggregate in hand; None if it does not exist, or is not in memory."""
        self.aggregate = aggregate
        self.is_current = is_current
        """It is not known that the store has a newer one."""
        self.is_loaded = is_loaded
        """The store was asked for it, so that it is not older than the dispatch."""
        self.is_taken = is_taken
        """Others wait for it; if not, the dispatch has made it and nobody knows of it."""
        self.is_saved = False
        """Events of it are to be written, on the condition that the store's is as it was taken."""
        self.version = 0
        self._sealed_version = 0
        self._state: dict[str, object] = {}
        if aggregate is not None:
            self.version = aggregate._version
            self._state = vars(aggregate).copy()

    def seal(self) -> None:
        """Note the version that the dispatch leaves it at."""
        if self.aggregate is not None:
            self._sealed_version = self.aggregate._version

    def after(self) -> Aggregate | None:
        """Return the aggregate if nobody changed it since it was sealed."""
        aggregate = self.aggregate
        if aggregate is None or aggregate._version != self._sealed_version:
            return None
        return None if aggregate._pending_events else aggregate

    def before(self) -> Aggregate | None:
        """Return the aggregate as it was taken; None if its parts may have been changed."""
        if not self.version:
            return None
        for name, value in self._state.items():
            if name != "_pending_events" and not isinstance(value, IMMUTABLE):
                return None
        assert self.aggregate is not None  # noqa: S101 - it has a version
        again: Aggregate = object.__new__(type(self.aggregate))
        vars(again).update(self._state, _pending_events=[])
        return again


class Memory:
    """Holds idle aggregates, bounded, and knows which are in a dispatch's hands."""

    def __init__(self, size: int) -> None:
        """Keep at most `size` idle aggregates; the least recently used go first."""
        self._size = size
        # Oldest first: what is taken leaves, and what is let go comes to the end.
        self._idle: OrderedDict[UUID, tuple[Aggregate, bool]] = OrderedDict()
        self._taken: dict[UUID, deque[asyncio.Future[None]] | None] = {}
        """What is in hand, and who waits for it, first come first served."""

    def is_taken(self, aggregate_id: UUID) -> bool:
        """Tell whether a dispatch has the aggregate in hand."""
        return aggregate_id in self._taken

    async def take(self, aggregate_id: UUID) -> tuple[Aggregate | None, bool]:
        """Take an aggregate when its turn comes.

        Return it if it is in memory, and whether it is not behind.
        """
        if aggregate_id not in self._taken:
            self._taken[aggregate_id] = None
        else:
            waiting = self._taken[aggregate_id]
            if waiting is None:
                waiting = self._taken[aggregate_id] = deque()
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting.append(turn)
            try:
                await turn
            except BaseException:
                if not turn.cancelled():  # its turn had come
                    self._pass_on(aggregate_id)
                raise
        return self._idle.pop(aggregate_id, NOT_THERE)

    def take_current(self, aggregate_id: UUID) -> Hand | None:
        """Take an aggregate in hand if it is free, in memory, and not known to be behind."""
        if aggregate_id in self._taken:
            return None
        aggregate, is_current = self._idle.pop(aggregate_id, NOT_THERE)
        if aggregate is None:
            return None
        if not is_current:
            self._idle[aggregate_id] = aggregate, False
            return None
        self._taken[aggregate_id] = None
        return Hand(aggregate)

    def let_go(
        self, aggregate_id: UUID, aggregate: Aggregate | None, *, is_current: bool = True
    ) -> None:
        """Let go of an aggregate, and keep it if it is given."""
        if aggregate is not None:
            self._idle[aggregate_id] = aggregate, is_current
            if len(self._idle) > self._size:
                self._idle.popitem(last=False)
        self._pass_on(aggregate_id)

    def _pass_on(self, aggregate_id: UUID) -> None:
        """Give an aggregate to who waits for it; free it if nobody does."""
        waiting = self._taken[aggregate_id]
        while waiting:
            turn = waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        del self._taken[aggregate_id]
