"""Aggregates in memory, each in the hands of at most one dispatch at a time."""

from __future__ import annotations

import asyncio
from uuid import UUID

from cachetools import LRUCache

from leftfold.domain import Aggregate


class Memory:
    """Holds idle aggregates, bounded, and knows which are in a dispatch's hands."""

    def __init__(self, size: int) -> None:
        """Keep at most `size` idle aggregates; the least recently used go first."""
        self._idle: LRUCache[UUID, Aggregate] = LRUCache(size)
        self._waiting: dict[UUID, list[asyncio.Future[None]]] = {}

    def is_taken(self, aggregate_id: UUID) -> bool:
        """Tell whether a dispatch has the aggregate in hand."""
        return aggregate_id in self._waiting

    def take(self, aggregate_id: UUID) -> Aggregate | None:
        """Take a free aggregate in hand; None if it is not in memory."""
        self._waiting[aggregate_id] = []
        return self._idle.pop(aggregate_id, None)

    async def wait_for(self, aggregate_id: UUID) -> None:
        """Wait until nobody has the aggregate in hand."""
        while (waiting := self._waiting.get(aggregate_id)) is not None:
            free: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting.append(free)
            await free

    def let_go(self, aggregate_id: UUID, aggregate: Aggregate | None) -> None:
        """Let go of an aggregate, and keep it if it is given."""
        if aggregate is not None:
            self._idle[aggregate_id] = aggregate
        for free in self._waiting.pop(aggregate_id, ()):
            if not free.done():
                free.set_result(None)
