"""The infrastructure layer: stores, runtime, CLI, test support. The only place that wires."""

from leftfold.infrastructure.blocking import BlockingRuntime
from leftfold.infrastructure.errors import (
    ForkedRuntimeError,
    InfrastructureError,
    InvalidSettingsError,
    MissingPackageError,
    NotRunningError,
    ProjectionFailedError,
    SchemaMissingError,
    SchemaVersionError,
    StoreUnavailableError,
    ValueOutOfRangeError,
    ViewChangedError,
)
from leftfold.infrastructure.health import Health, PartHealth, ProjectionHealth
from leftfold.infrastructure.resilience import (
    CircuitBreaker,
    CircuitOpenError,
    CircuitState,
    Resilience,
    RetryPolicy,
)
from leftfold.infrastructure.runtime import Runtime
from leftfold.infrastructure.settings import Settings

__all__ = [
    "BlockingRuntime",
    "CircuitBreaker",
    "CircuitOpenError",
    "CircuitState",
    "ForkedRuntimeError",
    "Health",
    "InfrastructureError",
    "InvalidSettingsError",
    "MissingPackageError",
    "NotRunningError",
    "PartHealth",
    "ProjectionFailedError",
    "ProjectionHealth",
    "Resilience",
    "RetryPolicy",
    "Runtime",
    "SchemaMissingError",
    "SchemaVersionError",
    "Settings",
    "StoreUnavailableError",
    "ValueOutOfRangeError",
    "ViewChangedError",
]
