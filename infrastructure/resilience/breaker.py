"""The circuit breaker: a call that keeps failing is not made for a while."""

from __future__ import annotations

import functools
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from enum import Enum
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, overload

import circuitbreaker

from leftfold.infrastructure.errors import InfrastructureError
from leftfold.infrastructure.health import PartHealth
from leftfold.infrastructure.platform import Lock, monotonic
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

_log = logging.getLogger("leftfold.breaker")


class CircuitState(Enum):
    """Where a breaker stands."""

    CLOSED = "closed"
    """Calls pass."""
    OPEN = "open"
    """Calls are rejected."""
    HALF_OPEN = "half_open"
    """A few calls pass, to probe whether it may close."""


class CircuitOpenError(InfrastructureError):
    """A breaker is open, or all its probes are under way: the call was not made."""

    name: str
    """The breaker's."""
    retry_after: float | None
    """Seconds until a call may pass; None if not before the breaker is reset by hand."""

    def __str__(self) -> str:
        if self.retry_after is None:
            return f"{self.name} is open until it is reset"
        return f"{self.name} is open for {self.retry_after:.3g} s"


@dataclass(frozen=True, slots=True)
class Transition:
    """A change of a breaker's state, as listeners are told of it."""

    name: str
    before: CircuitState
    after: CircuitState
    cause: Exception | None
    """The failure that opened it, if one did; it may quote data, so it is not in the `repr`."""

    def __repr__(self) -> str:
        return f"{self.name}: {self.before.value} to {self.after.value}"


@dataclass(frozen=True, slots=True)
class BreakerStats:
    """What a breaker has seen since it was made."""

    failures: int
    """Calls that failed."""
    rejected: int
    """Calls that were not made."""
    opened: int
    """How often it opened."""


class _Machine(circuitbreaker.CircuitBreaker):  # type: ignore[misc]  # it has no types
    """The state machine of the `circuitbreaker` package, on a clock that can be injected.

    What it lacks is who may call, and whose outcome counts: that is for `CircuitBreaker`.
    """

    def __init__(self, threshold: int, timeout: float, clock: Callable[[], float]) -> None:
        super().__init__(failure_threshold=threshold, recovery_timeout=timeout)
        self._clock = clock
        self._timeout = timeout
        self._opened_at = 0.0

    @property
    def open_remaining(self) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]  # the package rounds
        return self._opened_at + self._timeout - self._clock()

    def fail(self) -> bool:
        """Count a failure; tell whether the circuit is open now."""
        self.__exit__(_Failure, _FAILURE, None)  # the true one is not kept, nor all it refers to
        is_open: bool = self._state == circuitbreaker.STATE_OPEN
        if is_open:
            self._opened_at = self._clock()
        return is_open


class _Failure(Exception):
    """Stands for any failure in the state machine."""


_FAILURE = _Failure()


class CircuitBreaker:
    """Rejects calls for a while after too many failures in a row.

        breaker = CircuitBreaker(5, 30.0, name="warehouse")
        stock = await breaker.call(fetch_stock, "A")

    After `failure_threshold` consecutive failures it is OPEN; after `recovery_timeout` seconds
    HALF_OPEN, when `probes` calls pass at a time: the first to succeed closes it, the first to
    fail opens it again. Only the outcome of a call that was let in under the present state
    counts. A cancelled call is neither success nor failure, nor is one that raised what is no
    failure. Safe for tasks and threads; never holds a lock while it calls.
    """

    def __init__(  # noqa: PLR0913 - each has a default but two
        self,
        failure_threshold: int,
        recovery_timeout: float,
        *,
        name: str = "breaker",
        failures: Counted = raised,
        probes: int = 1,
        probe_lease: float | None = None,
        cancelled_after: float | None = None,
        fallback: Callable[..., Any] | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Make a closed breaker.

        `failures` says which outcomes are: types of exceptions (raised, or in an `Err`), or a
        question about the exception or the result; by default whatever is raised. A probe that
        has not ended after `probe_lease` seconds (default: the recovery timeout) makes room for
        another. A call cancelled from outside, as by a timeout, after it ran for
        `cancelled_after` seconds is a failure; by default none is. `fallback` answers in place
        of a rejected call, with its arguments. Raises `InvalidPolicyError`.
        """
        checked_count("failure_threshold", failure_threshold)
        checked_seconds("recovery_timeout", recovery_timeout)
        if fallback is not None and not callable(fallback):
            raise InvalidPolicyError("fallback", f"{fallback!r} cannot be called")
        self.name = name
        self._is_failure = asks(failures)
        self._probes = checked_count("probes", probes)
        self._lease = checked_seconds(
            "probe_lease", recovery_timeout if probe_lease is None else probe_lease
        )
        self._cancelled_after = (
            None
            if cancelled_after is None
            else checked_seconds("cancelled_after", cancelled_after, zero=True)
        )
        self._fallback = fallback
        self._clock = clock
        self._machine = _Machine(failure_threshold, float(recovery_timeout), clock)
        self._lock = Lock()
        # A ticket is the number of the state that a call was let in under, or, of a probe, its
        # own number below zero. `_open_to` is the ticket while all calls pass, else 0.
        self._generation = 1
        self._open_to = 1
        self._last_probe = 0
        self._probing: dict[int, float] = {}
        """Probes under way, and when their leases end."""
        self._is_isolated = False
        self._told = CircuitState.CLOSED
        self._failed = self._rejected = self._opened = 0
        self._listeners: list[Callable[[Transition], object]] = []
        self._untold: deque[Transition] = deque()
        self._is_telling = False

    @property
    def state(self) -> CircuitState:
        """Where it stands now."""
        if self._is_isolated:
            return CircuitState.OPEN
        return CircuitState(self._machine.state)

    @property
    def stats(self) -> BreakerStats:
        """What it has seen."""
        with self._lock:
            return BreakerStats(self._failed, self._rejected, self._opened)

    @property
    def retry_after(self) -> float | None:
        """Seconds until a call may pass: 0 if it may now, None if not before a reset."""
        with self._lock:
            return self._wait()

    def health(self) -> PartHealth:
        """Tell its state and what it has seen, as a runtime's health does."""
        return PartHealth(self.name, "breaker", self.state.value, asdict(self.stats))

    def isolate(self) -> None:
        """Reject all calls until `reset`."""
        with self._lock:
            self._is_isolated = True
            self._begin(CircuitState.OPEN)
        self._tell()

    def reset(self) -> None:
        """Close it; calls that are under way do not count any more."""
        with self._lock:
            self._is_isolated = False
            self._machine.reset()
            self._begin(CircuitState.CLOSED)
        self._tell()

    def listen(self, listener: Callable[[Transition], object]) -> None:
        """Call this after each change of state, in their order, on the thread that noticed it.

        What it raises is logged. That it is half-open is noticed when the first probe is let in.
        """
        self._listeners.append(listener)

    # Calls

    @overload
    async def call(
        self, func: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    @overload
    async def call(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T: ...
    async def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function, and await what it answers if that is awaitable.

        Raises what it raises, and `CircuitOpenError` if it is not called and there is no fallback.
        """
        ticket = self._open_to
        begun = 0.0
        if not ticket:
            admitted = self._admit()
            if not isinstance(admitted, int):
                if self._fallback is None:
                    raise admitted
                return await awaited(self._fallback, *args, **kwargs)
            ticket = admitted
        if self._cancelled_after is not None:
            begun = self._clock()
        try:
            result = func(*args, **kwargs)
            if inspect.isawaitable(result):
                result = await result
        except BaseException as error:
            self._end(ticket, error, begun)
            raise
        if ticket < 0 or self._machine.failure_count or self._is_failure is not raised:
            self._end(ticket, result, begun)
        return result

    def call_sync(self, func: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that blocks; as `call`, for programs and threads without asyncio."""
        answer: T = self._call(func, args, kwargs)
        return answer

    @overload
    def __call__(self, func: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]: ...
    @overload
    def __call__(self, func: Callable[P, T]) -> Callable[P, T]: ...
    def __call__(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with the breaker around it: a decorator.

        An async one stays async; of any other that answers an awaitable, that is what counts.
        Raises `TypeError` for a generator, around whose use `with` belongs.
        """
        if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            msg = f"{func!r} is a generator; use `with` around its use"
            raise TypeError(msg)
        if is_async(func):

            @functools.wraps(func, updated=())
            async def guarded_async(*args: Any, **kwargs: Any) -> Any:
                return await self.call(func, *args, **kwargs)

            return guarded_async

        @functools.wraps(func, updated=())
        def guarded(*args: Any, **kwargs: Any) -> Any:
            return self._call(func, args, kwargs)

        return guarded

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ticket = self._open_to or self._admit()
        if not isinstance(ticket, int):
            if self._fallback is None:
                raise ticket
            return self._fallback(*args, **kwargs)
        begun = 0.0 if self._cancelled_after is None else self._clock()
        try:
            result = func(*args, **kwargs)
        except BaseException as error:
            self._end(ticket, error, begun)
            raise
        if inspect.isawaitable(result):
            return self._awaited(ticket, result, begun)
        self._end(ticket, result, begun)
        return result

    async def _awaited(self, ticket: int, answer: Awaitable[Any], begun: float) -> Any:
        try:
            result = await answer
        except BaseException as error:
            self._end(ticket, error, begun)
            raise
        self._end(ticket, result, begun)
        return result

    def __enter__(self) -> Self:
        """Let the block in as one call, or raise `CircuitOpenError`; `async with` is the same."""
        ticket = self._open_to or self._admit()
        if not isinstance(ticket, int):
            raise ticket
        _entered.set((*_entered.get(), (self, ticket, self._clock())))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        entered = _entered.get()
        own = next((each for each in reversed(entered) if each[0] is self), None)
        if own is None:
            msg = f"{self.name} was left in another task or thread than it was entered in"
            raise RuntimeError(msg) from exc
        _entered.set(tuple(each for each in entered if each is not own))
        self._end(own[1], exc, own[2])

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(exc_type, exc, traceback)

    # States

    def _admit(self) -> int | CircuitOpenError:
        """Return a ticket for a call, or why there is none."""
        with self._lock:
            wait = self._wait()
            if wait != 0:
                self._rejected += 1
                return CircuitOpenError(self.name, wait)
            if self._open_to:  # it has closed meanwhile
                return self._open_to
            now = self._clock()
            self._probing = {n: end for n, end in self._probing.items() if end > now}
            self._last_probe = ticket = self._last_probe - 1
            self._probing[ticket] = now + self._lease
            self._note(CircuitState.HALF_OPEN)
        self._tell()
        return ticket

    def _wait(self) -> float | None:
        if self._is_isolated:
            return None
        if self._open_to:
            return 0.0
        remaining = self._machine.open_remaining
        if remaining > 0:
            return remaining
        now = self._clock()
        ends = [end for end in self._probing.values() if end > now]
        return min(ends) - now if len(ends) >= self._probes else 0.0

    def _end(self, ticket: int, outcome: object, begun: float) -> None:
        """Let the outcome of a call count, if it was let in under the present state."""
        failure = self._failure_of(outcome, begun)
        is_success = failure is None and not isinstance(outcome, BaseException)
        if ticket > 0 and failure is None and not (is_success and self._machine.failure_count):
            return  # nothing changes: the common case takes no lock
        with self._lock:
            if failure is not None:
                self._failed += 1
            is_probe = self._probing.pop(ticket, None) is not None
            if not is_probe and ticket != self._open_to:
                return  # of an earlier state
            if failure is not None:
                if self._machine.fail():
                    self._opened += 1
                    self._begin(CircuitState.OPEN, failure)
            elif is_success:
                self._machine.reset()
                if is_probe:
                    self._begin(CircuitState.CLOSED)
        self._tell()

    def _failure_of(self, outcome: object, begun: float) -> Exception | None:
        if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
            limit = self._cancelled_after
            is_late = limit is not None and self._clock() - begun >= limit
            return TimeoutError("cancelled") if is_late else None
        if not self._is_failure(outcome):
            return None
        return outcome if isinstance(outcome, Exception) else _FAILURE

    def _begin(self, state: CircuitState, cause: Exception | None = None) -> None:
        """Begin a new state: calls let in before do not count any more."""
        self._generation += 1
        self._open_to = self._generation if state is CircuitState.CLOSED else 0
        self._probing.clear()
        self._note(state, cause)

    def _note(self, state: CircuitState, cause: Exception | None = None) -> None:
        if state is not self._told:
            self._untold.append(Transition(self.name, self._told, state, cause))
            self._told = state

    def _tell(self) -> None:
        """Tell the listeners, outside the lock, one thread at a time."""
        while self._untold:
            with self._lock:
                if self._is_telling or not self._untold:
                    return
                self._is_telling = True
                transition = self._untold.popleft()
            try:
                for listener in tuple(self._listeners):
                    try:
                        listener(transition)
                    except Exception:  # noqa: BLE001 - a listener harms no call
                        _log.exception("a listener of %s failed", self.name)
            finally:
                self._is_telling = False


_entered: ContextVar[tuple[tuple[CircuitBreaker, int, float], ...]] = ContextVar(
    "leftfold_entered", default=()
)


async def awaited(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, and await what it answers if that is awaitable."""
    answer = func(*args, **kwargs)
    return await answer if inspect.isawaitable(answer) else answer


def is_async(func: Callable[..., Any]) -> bool:
    """Tell whether calling it makes a coroutine: a function, or an object's async `__call__`."""
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(
        getattr(func, "__call__", None)  # noqa: B004 - it is looked at, not only for
    )
