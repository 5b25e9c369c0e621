"""Waiting for what happens beside a test."""

from __future__ import annotations

import asyncio
from inspect import isawaitable
from time import monotonic


async def until(is_so, seconds=10.0):
    """Wait until something is so, which may be awaited; return how many seconds that took."""
    begun = monotonic()
    while not (await found if isawaitable(found := is_so()) else found):
        assert monotonic() - begun < seconds, "it took too long"
        await asyncio.sleep(0.005)
    return monotonic() - begun
