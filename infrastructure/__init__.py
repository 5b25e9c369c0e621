"""The infrastructure layer: stores, runtime, CLI, test support. The only place that wires."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leftfold.infrastructure.blocking import BlockingRuntime
from leftfold.infrastructure.caches import InMemoryCache
from leftfold.infrastructure.errors import (
    CacheUnavailableError,
    ForkedRuntimeError,
    InfrastructureError,
    InvalidSettingsError,
    MissingPackageError,
    NotRunningError,
    ProjectionFailedError,
    SchemaMissingError,
    SchemaVersionError,
    StoreUnavailableError,
    TooManyDeadLettersError,
    ValueOutOfRangeError,
    ViewBusyError,
    ViewChangedError,
    ViewInUseError,
)
from leftfold.infrastructure.health import Health, PartHealth, ProjectionHealth, ReaderState
from leftfold.infrastructure.resilience import (
    CircuitBreaker,
    CircuitOpenError,
    CircuitState,
    Resilience,
    RetryPolicy,
)
from leftfold.infrastructure.runtime import Runtime
from leftfold.infrastructure.settings import Settings
from leftfold.infrastructure.upkeep import Retried

if TYPE_CHECKING:
    from leftfold.infrastructure.caches import RedisCache, TieredCache

__all__ = [
    "BlockingRuntime",
    "CacheUnavailableError",
    "CircuitBreaker",
    "CircuitOpenError",
    "CircuitState",
    "ForkedRuntimeError",
    "Health",
    "InMemoryCache",
    "InfrastructureError",
    "InvalidSettingsError",
    "MissingPackageError",
    "NotRunningError",
    "PartHealth",
    "ProjectionFailedError",
    "ProjectionHealth",
    "ReaderState",
    "RedisCache",
    "Resilience",
    "Retried",
    "RetryPolicy",
    "Runtime",
    "SchemaMissingError",
    "SchemaVersionError",
    "Settings",
    "StoreUnavailableError",
    "TieredCache",
    "TooManyDeadLettersError",
    "ValueOutOfRangeError",
    "ViewBusyError",
    "ViewChangedError",
    "ViewInUseError",
]


def __getattr__(name: str) -> Any:
    if name in {"RedisCache", "TieredCache"}:  # they need an extra
        from leftfold.infrastructure import caches

        return getattr(caches, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
