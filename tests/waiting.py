"""Waiting for what happens beside a test."""

from __future__ import annotations

import asyncio
from time import monotonic


async def until(is_so, seconds=10.0):
    """Wait until something is so; return how many seconds that took."""
    begun = monotonic()
    while not is_so():
        assert monotonic() - begun < seconds, "it took too long"
        await asyncio.sleep(0.005)
    return monotonic() - begun
