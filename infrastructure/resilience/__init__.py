"""Circuit breaker, retry, and pipelines of them: calls that stay up while others fail."""

from leftfold.infrastructure.resilience.breaker import (
    BreakerStats,
    CircuitBreaker,
    CircuitOpenError,
    CircuitState,
    Transition,
)
from leftfold.infrastructure.resilience.failures import InvalidPolicyError
from leftfold.infrastructure.resilience.pipeline import (
    Bulkhead,
    BulkheadFullError,
    CallTimeoutError,
    Resilience,
)
from leftfold.infrastructure.resilience.retry import RetryPolicy, immediate_retries

__all__ = [
    "BreakerStats",
    "Bulkhead",
    "BulkheadFullError",
    "CallTimeoutError",
    "CircuitBreaker",
    "CircuitOpenError",
    "CircuitState",
    "InvalidPolicyError",
    "Resilience",
    "RetryPolicy",
    "Transition",
    "immediate_retries",
]
