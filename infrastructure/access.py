"""How the store is asked: in threads, with retry, and behind a breaker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from eventsourcing.persistence import (
    DataError,
    IntegrityError,
    PersistenceError,
    ProgrammingError,
)

from leftfold.application import EventStoreUnavailable, KeysUnavailable
from leftfold.application.ports import Commit, Failed, Group, Log, Platform, Verdict
from leftfold.infrastructure.resilience import (
    CircuitBreaker,
    CircuitOpenError,
    Resilience,
    RetryPolicy,
)

T = TypeVar("T")

ATTEMPTS, FIRST_WAIT, JITTER = 4, 0.05, 0.05
"""Of a call, and seconds: connections that were lost are replaced at once."""
FAILURES = 12
"""In a row that open the breaker: more than there are connections, which may be lost together."""
RECOVERY = 1.0
"""Seconds until an open breaker lets a call probe the store."""


class StoreAccess:
    """Asks a store, and keeps asking while it fails for a moment, but not while it is away."""

    def __init__(
        self,
        log: Log,
        platform: Platform,
        *,
        commit: Commit | None = None,
        name: str = "store",
        patience: float = 5.0,
    ) -> None:
        """Ask a store's log and views; begin no retry after `patience` seconds.

        `commit` writes without a thread, where a store can.
        """
        self._log = log
        self._platform = platform
        self._commit = commit or partial(platform.in_thread, log.commit)
        self.breaker = CircuitBreaker(
            FAILURES, RECOVERY, name=name, failures=_has_failed, clock=platform.monotonic
        )
        self._pipeline = Resilience(
            name,
            breaker=self.breaker,
            retry=RetryPolicy(
                ATTEMPTS,
                FIRST_WAIT,
                JITTER,
                deadline=patience,
                retry_on=_is_repeatable,
                clock=platform.monotonic,
                random=platform.random,
                sleep=platform.sleep,
            ),
        )

    async def read(self, function: Callable[..., T], *args: Any) -> T:
        """Call what reads, or what may be done twice, as to keep snapshots.

        Raises `EventStoreUnavailable` if the store does not answer.
        """
        if self._log.is_local:
            return function(*args)
        try:
            return await self._pipeline.call(self._platform.in_thread, function, *args)
        except CircuitOpenError as error:
            raise _unavailable(error) from None
        except PersistenceError as error:
            if not _is_away(error):
                raise
            raise EventStoreUnavailable(str(error)) from error

    async def commit(self, groups: Sequence[Group]) -> list[Verdict]:
        """Write groups; again only if nothing of any of them was written."""
        try:
            return await self._pipeline.call(self._committed, groups)
        except CircuitOpenError as error:
            return [Failed(_unavailable(error).reason, in_doubt=False)] * len(groups)

    async def _committed(self, groups: Sequence[Group]) -> _Verdicts:
        return _Verdicts(await self._commit(groups))


class _Verdicts(list[Verdict]):
    """What a commit answered: told from what a read did, which is never looked through."""


def may_pass(error: Exception) -> bool:
    """Tell whether tomorrow may do what failed: the store was away, or the keys were."""
    return isinstance(error, KeysUnavailable) or _is_away(error)


def _is_away(error: Exception) -> bool:
    """Tell whether it is the store that failed, for a while: it was lost, locked, read-only."""
    is_wrong = isinstance(error, (DataError, IntegrityError, ProgrammingError))
    return isinstance(error, PersistenceError) and not is_wrong


def _has_failed(outcome: object) -> bool:
    if isinstance(outcome, _Verdicts):
        return any(isinstance(verdict, Failed) and not verdict.is_refusal for verdict in outcome)
    return isinstance(outcome, Exception) and _is_away(outcome)


def _is_repeatable(outcome: object) -> bool:
    if isinstance(outcome, _Verdicts):
        return all(
            isinstance(verdict, Failed) and not verdict.in_doubt and not verdict.is_refusal
            for verdict in outcome
        )
    return isinstance(outcome, Exception) and _is_away(outcome)


def _unavailable(error: CircuitOpenError) -> EventStoreUnavailable:
    wait = error.retry_after
    then = "not asked until it is reset" if wait is None else f"asked again in {wait:.2g} s"
    return EventStoreUnavailable(f"it failed {FAILURES} times in a row, and is {then}")
