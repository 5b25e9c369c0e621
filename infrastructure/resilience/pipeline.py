"""Pipelines: timeout, breaker, retry, bulkhead and fallback around one call."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import asdict
from typing import Any, ParamSpec, TypeVar, overload

from leftfold.infrastructure.errors import InfrastructureError
from leftfold.infrastructure.health import PartHealth
from leftfold.infrastructure.platform import Lock, start_thread
from leftfold.infrastructure.resilience.breaker import CircuitBreaker, awaited, is_async
from leftfold.infrastructure.resilience.failures import (
    InvalidPolicyError,
    checked_count,
    checked_seconds,
)
from leftfold.infrastructure.resilience.retry import RetryPolicy

P = ParamSpec("P")
T = TypeVar("T")


class CallTimeoutError(
    InfrastructureError, TimeoutError, message="{name} did not answer within {seconds:.3g} s"
):
    """A call took too long, and is not waited for any longer."""

    name: str
    seconds: float


class BulkheadFullError(
    InfrastructureError,
    message="{name} is full: {concurrency} calls are under way, and {queue} wait",
):
    """As many calls are under way, and wait, as may: the call was not made."""

    name: str
    concurrency: int
    queue: int


class Bulkhead:
    """Lets a bounded number of calls run at a time, and a bounded number wait, in their order."""

    def __init__(self, concurrency: int, queue: int = 0, *, name: str = "bulkhead") -> None:
        """Let `concurrency` calls run and `queue` wait. Raises `InvalidPolicyError`."""
        self.name = name
        self.concurrency = checked_count("concurrency", concurrency)
        self.queue = checked_count("queue", queue, 0)
        self.rejected = 0
        """Calls that found no place to wait."""
        self._running = 0
        self._waiting: deque[Future[None]] = deque()
        self._lock = Lock()

    @property
    def running(self) -> int:
        """Calls that run now."""
        return self._running

    @property
    def waiting(self) -> int:
        """Calls that wait now."""
        return len(self._waiting)

    async def enter(self) -> None:
        """Wait for a place. Raises `BulkheadFullError`; `leave` gives it back."""
        turn = self._turn()
        if turn is None:
            return
        try:
            await asyncio.wrap_future(turn)
        except asyncio.CancelledError:
            self._give_up(turn)
            raise

    def enter_sync(self) -> None:
        """Block until there is a place; as `enter`."""
        turn = self._turn()
        if turn is None:
            return
        try:
            turn.result()
        except BaseException:  # the interpreter's own, as KeyboardInterrupt
            self._give_up(turn)
            raise

    def leave(self) -> None:
        """Give the place to the one that has waited longest."""
        with self._lock:
            while self._waiting:
                turn = self._waiting.popleft()
                if turn.set_running_or_notify_cancel():
                    turn.set_result(None)
                    return
            self._running -= 1

    def _turn(self) -> Future[None] | None:
        with self._lock:
            if self._running < self.concurrency:
                self._running += 1
                return None
            if len(self._waiting) >= self.queue:
                self.rejected += 1
                raise BulkheadFullError(self.name, self.concurrency, self.queue)
            turn: Future[None] = Future()
            self._waiting.append(turn)
            return turn

    def _give_up(self, turn: Future[None]) -> None:
        with self._lock:
            if turn in self._waiting:
                self._waiting.remove(turn)
                return
        if not turn.cancelled():  # the place was given already
            self.leave()


class Resilience:
    """A pipeline around calls; each of its parts may be left out.

    From the outside in: fallback, bulkhead, retry, breaker, timeout. So the timeout is of one
    attempt, and a failure for the breaker; each attempt counts; while the breaker is open nothing
    is retried; a call keeps its place in the bulkhead while it waits to be retried; the fallback
    answers for whatever is raised in the end, with the call's arguments.
    """

    def __init__(
        self,
        name: str = "call",
        *,
        timeout: float | None = None,
        breaker: CircuitBreaker | None = None,
        retry: RetryPolicy | None = None,
        bulkhead: Bulkhead | None = None,
        fallback: Callable[..., Any] | None = None,
    ) -> None:
        """Make a pipeline; `timeout` is in seconds. Raises `InvalidPolicyError`."""
        if timeout is not None:
            checked_seconds("timeout", timeout)
        if fallback is not None and not callable(fallback):
            raise InvalidPolicyError("fallback", f"{fallback!r} cannot be called")
        self.name = name
        self.timeout = timeout
        self.breaker = breaker
        self.retry = retry
        self.bulkhead = bulkhead
        self.fallback = fallback
        self._timeouts = self._fallbacks = 0

    def health(self) -> PartHealth:
        """Tell its breaker's state and what it has seen, as a runtime's health does."""
        counters = {"timeouts": self._timeouts, "fallbacks": self._fallbacks}
        if self.bulkhead is not None:
            counters |= {"running": self.bulkhead.running, "waiting": self.bulkhead.waiting}
            counters["full"] = self.bulkhead.rejected
        state = "in use"
        if self.breaker is not None:
            state = self.breaker.state.value
            counters |= asdict(self.breaker.stats)
        return PartHealth(self.name, "pipeline", state, counters)

    @overload
    async def call(
        self, func: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    @overload
    async def call(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T: ...
    async def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function, and await what it answers if that is awaitable.

        Raises what it raises in the end, `CallTimeoutError`, `CircuitOpenError` and
        `BulkheadFullError`.
        """
        try:
            if self.bulkhead is None:
                return await self._attempts(func, *args, **kwargs)
            await self.bulkhead.enter()
            try:
                return await self._attempts(func, *args, **kwargs)
            finally:
                self.bulkhead.leave()
        except Exception:
            if self.fallback is None:
                raise
            self._fallbacks += 1
            return await awaited(self.fallback, *args, **kwargs)

    def call_sync(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that blocks; as `call`, for programs and threads without asyncio.

        With a timeout it runs in a thread of its own, which is left behind if it takes too long.
        """
        try:
            if self.bulkhead is None:
                return self._attempts_sync(func, *args, **kwargs)
            self.bulkhead.enter_sync()
            try:
                return self._attempts_sync(func, *args, **kwargs)
            finally:
                self.bulkhead.leave()
        except Exception:
            if self.fallback is None:
                raise
            self._fallbacks += 1
            answer: T = self.fallback(*args, **kwargs)
            return answer

    @overload
    def __call__(self, func: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]: ...
    @overload
    def __call__(self, func: Callable[P, T]) -> Callable[P, T]: ...
    def __call__(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with the pipeline around it: a decorator."""
        if is_async(func):

            @functools.wraps(func, updated=())
            async def guarded_async(*args: Any, **kwargs: Any) -> Any:
                return await self.call(func, *args, **kwargs)

            return guarded_async

        @functools.wraps(func, updated=())
        def guarded(*args: Any, **kwargs: Any) -> Any:
            return self.call_sync(func, *args, **kwargs)

        return guarded

    async def _attempts(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inner: Callable[..., Any] = functools.partial(func, *args, **kwargs)
        if self.timeout is not None:
            inner = functools.partial(self._in_time, self.timeout, inner)
        if self.breaker is not None:
            inner = functools.partial(self.breaker.call, inner)
        return await (awaited(inner) if self.retry is None else self.retry.call(inner))

    def _attempts_sync(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        inner: Callable[[], T] = functools.partial(func, *args, **kwargs)
        if self.timeout is not None:
            inner = functools.partial(self._in_time_sync, self.timeout, inner)
        if self.breaker is not None:
            inner = functools.partial(self.breaker.call_sync, inner)
        answer: T = inner() if self.retry is None else self.retry.call_sync(inner)
        return answer

    async def _in_time(self, seconds: float, func: Callable[[], Any]) -> Any:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await awaited(func)
        except TimeoutError:
            if limit.expired():
                self._timeouts += 1
                raise CallTimeoutError(self.name, seconds) from None
            raise  # its own

    def _in_time_sync(self, seconds: float, func: Callable[[], T]) -> T:
        _, answer = start_thread(functools.partial(copy_context().run, func))
        try:
            return answer.result(seconds)
        except TimeoutError:
            if answer.done():
                raise  # its own
            self._timeouts += 1
            raise CallTimeoutError(self.name, seconds) from None
