"""Caches: in memory, in Redis, and in memory before Redis.

`RedisCache` and `TieredCache` need the extra `redis`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leftfold.infrastructure.caches.loading import CacheStats
from leftfold.infrastructure.caches.memory import InMemoryCache

if TYPE_CHECKING:
    from leftfold.infrastructure.caches.redis import RedisCache
    from leftfold.infrastructure.caches.tiered import TieredCache

__all__ = ["CacheStats", "InMemoryCache", "RedisCache", "TieredCache"]


def __getattr__(name: str) -> Any:
    if name == "RedisCache":
        from leftfold.infrastructure.caches.redis import RedisCache

        return RedisCache
    if name == "TieredCache":
        from leftfold.infrastructure.caches.tiered import TieredCache

        return TieredCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
