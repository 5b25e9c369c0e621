"""Retry: a call that failed is made again, after waits that grow."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ParamSpec, TypeVar, overload

from tenacity import AsyncRetrying, RetryCallState, Retrying

from leftfold.domain import Err
from leftfold.infrastructure.platform import asleep, blocking_sleep, monotonic, random_number
from leftfold.infrastructure.resilience.breaker import CircuitOpenError, awaited
from leftfold.infrastructure.resilience.failures import (
    Counted,
    InvalidPolicyError,
    asks,
    checked_count,
    checked_seconds,
    raised,
)

P = ParamSpec("P")
T = TypeVar("T")

_is_immediate: ContextVar[bool] = ContextVar("leftfold_immediate_retries", default=False)


@contextmanager
def immediate_retries() -> Iterator[None]:
    """Let retries wait for nothing inside the block: in tests, of this context only."""
    token = _is_immediate.set(True)
    try:
        yield
    finally:
        _is_immediate.reset(token)


@dataclass(frozen=True)
class RetryPolicy:
    """Makes a call up to `max_attempts` times, with exponential backoff.

        await RetryPolicy(4, base_delay=0.1, jitter=0.05, retry_on=ConnectionError).call(fetch)

    The wait after attempt n, counted from 0, is `base_delay * 2**n + U(0, jitter)` seconds, no
    more than `max_delay`; the jitter is uniform, so that those who failed together do not come
    back together. A failure that says `retry_after` (seconds) is waited for as long. No attempt
    begins later than `deadline` seconds after the first. The last failure is raised, or returned
    if it was a result. A cancelled call and a rejection by a breaker are never retried.
    """

    max_attempts: int
    base_delay: float
    jitter: float
    max_delay: float | None = None
    deadline: float | None = None
    retry_on: Counted = raised
    """Types of exceptions (raised, or in an `Err`), or a question about exceptions and results."""
    _: KW_ONLY
    clock: Callable[[], float] = field(default=monotonic, repr=False, compare=False)
    random: Callable[[], float] = field(default=random_number, repr=False, compare=False)
    """From 0 up to 1."""
    sleep: Callable[[float], Awaitable[None]] = field(default=asleep, repr=False, compare=False)
    block: Callable[[float], None] = field(default=blocking_sleep, repr=False, compare=False)
    """What `call_sync` waits with."""

    def __post_init__(self) -> None:
        """Check the arguments. Raises `InvalidPolicyError`."""
        checked_count("max_attempts", self.max_attempts)
        checked_seconds("base_delay", self.base_delay, zero=True)
        checked_seconds("jitter", self.jitter, zero=True)
        if self.max_delay is not None:
            checked_seconds("max_delay", self.max_delay, zero=True)
        if self.deadline is not None:
            checked_seconds("deadline", self.deadline)
        asks(self.retry_on)

    def delay(self, n: int) -> float:
        """Return the seconds to wait after attempt `n`, counted from 0."""
        if n < 0:
            raise InvalidPolicyError("n", f"{n} is below 0")
        try:
            backoff = math.ldexp(self.base_delay, n)
        except OverflowError:
            backoff = math.inf
        seconds = backoff + self.jitter * self.random()
        return seconds if self.max_delay is None else min(seconds, self.max_delay)

    @overload
    async def call(
        self, func: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    @overload
    async def call(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T: ...
    async def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function until it does not fail; await what it answers if that is awaitable."""
        begun = self.clock()
        first: BaseException | None = None
        result: Any = None
        try:
            result = await awaited(func, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - raised again unless it is retried
            first = error
        if not self._is_retried(first or result):
            if first is not None:
                raise first
            return result
        attempts = 0

        async def attempt() -> Any:
            # The first attempt was made: most calls need no more, and no machinery.
            nonlocal attempts
            attempts += 1
            if attempts == 1:
                if first is not None:
                    raise first
                return result
            return await awaited(func, *args, **kwargs)

        async def wait(seconds: float) -> None:
            await self.sleep(0.0 if _is_immediate.get() else seconds)

        return await AsyncRetrying(sleep=wait, **self._rules(begun))(attempt)

    def call_sync(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that blocks; as `call`, for programs and threads without asyncio."""

        def wait(seconds: float) -> None:
            self.block(0.0 if _is_immediate.get() else seconds)

        retrying = Retrying(sleep=wait, **self._rules(self.clock()))
        answer: T = retrying(func, *args, **kwargs)
        return answer

    def _is_retried(self, outcome: object) -> bool:
        if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
            return False  # a cancellation, or the interpreter's end
        is_rejection = isinstance(outcome, CircuitOpenError)
        return not is_rejection and asks(self.retry_on)(outcome)

    def _rules(self, begun: float) -> dict[str, Any]:
        def wait(state: RetryCallState) -> float:
            seconds = self.delay(state.attempt_number - 1)
            return max(seconds, _retry_after(_outcome(state)))

        def stop(state: RetryCallState) -> bool:
            if state.attempt_number >= self.max_attempts:
                return True
            late = self.clock() - begun + state.upcoming_sleep
            return self.deadline is not None and late > self.deadline

        return {
            "retry": lambda state: self._is_retried(_outcome(state)),
            "wait": wait,
            "stop": stop,
            "retry_error_callback": lambda state: state.outcome.result(),
        }


def _outcome(state: RetryCallState) -> object:
    assert state.outcome is not None  # noqa: S101 - an attempt was made
    return state.outcome.exception() if state.outcome.failed else state.outcome.result()


def _retry_after(outcome: object) -> float:
    failure = outcome.error if isinstance(outcome, Err) else outcome
    seconds = getattr(failure, "retry_after", None)
    return seconds if isinstance(seconds, int | float) and math.isfinite(seconds) else 0.0
