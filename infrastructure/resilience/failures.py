"""What counts as a failure: for a breaker, and for a retry."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from leftfold.domain import Err
from leftfold.infrastructure.errors import InfrastructureError

Outcome: TypeAlias = object
"""What a call raised (an `Exception`), or what it returned."""

Counted: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Callable[[Outcome], bool]
"""Types of exceptions, raised or in an `Err`; or a question about each outcome."""


def raised(outcome: Outcome) -> bool:
    """Tell whether the call raised: the failures of whoever names no others."""
    return isinstance(outcome, Exception)


def asks(counted: Counted) -> Callable[[Outcome], bool]:
    """Return the question whether an outcome counts. Raises `InvalidPolicyError`."""
    if isinstance(counted, type) or (isinstance(counted, tuple) and counted):
        types = counted if isinstance(counted, tuple) else (counted,)
        if all(isinstance(each, type) and issubclass(each, Exception) for each in types):
            return lambda outcome: isinstance(
                outcome.error if isinstance(outcome, Err) else outcome, types
            )
    elif callable(counted):
        return counted
    raise InvalidPolicyError("failures", f"{counted!r} are no exceptions and no question")


class InvalidPolicyError(InfrastructureError, message="{name}: {reason}"):
    """An argument of a breaker, retry or pipeline makes no sense: an error in the program."""

    name: str
    reason: str


def checked_count(name: str, value: int, least: int = 1) -> int:
    """Return a whole number of at least `least`. Raises `InvalidPolicyError`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidPolicyError(name, f"{value!r} is no whole number from {least} up")
    return value


def checked_seconds(name: str, value: float, *, zero: bool = False) -> float:
    """Return finite seconds above zero, or zero if it may be. Raises `InvalidPolicyError`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 < value < float("inf") or (zero and value == 0)):
        raise InvalidPolicyError(name, f"{value!r} is no number of seconds")
    return float(value)
