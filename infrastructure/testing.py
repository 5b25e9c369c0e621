"""Scenarios: given these events, when that is done, then those events follow, or a refusal.

Also strategies for Hypothesis, which is needed only where one is asked for: `specifications`,
`candidates`, `satisfying` and `violating`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from leftfold.domain import Aggregate, Created, DomainError, Event, clock

if TYPE_CHECKING:
    from leftfold.infrastructure.strategies import (
        candidates,
        satisfying,
        specifications,
        violating,
    )

__all__ = ["Scenario", "candidates", "satisfying", "scenario", "specifications", "violating"]

A = TypeVar("A", bound=Aggregate)

FIRST_MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
"""When the first event of a scenario is recorded; each further one a second later."""


class Scenario(Generic[A]):
    """One example of an aggregate's behaviour; see `scenario`."""

    def __init__(self, aggregate_type: type[A], key: str) -> None:
        self._type = aggregate_type
        self._id = aggregate_type.id_of(key)
        self._aggregate: A | None = None
        self._recorded: list[Event] = []
        self._refusal: DomainError | None = None
        self._seconds = 0

    def given(self, *events: Event) -> Self:
        """Let these events have happened, in order.

        Raises `AssertionError` if the first begins no aggregate.
        """
        with clock.clock(self._now):
            for example in events:
                if self._aggregate is None and not isinstance(example, Created):
                    name = type(example).__name__
                    raise AssertionError(f"{name} begins no {self._type.__name__}: give that first")
                version = self._aggregate.version + 1 if self._aggregate else 1
                event = example.model_copy(
                    update={"originator_version": 0}
                )  # may serve several times
                event.stamp(self._id, version, clock.now())
                self._aggregate = event.mutate(self._aggregate)
        return self

    def when(self, action: Callable[[A], A | None]) -> Self:
        """Do something with the aggregate; an action that makes a new one returns it."""
        self._refusal, self._recorded = None, []
        with clock.clock(self._now):
            try:
                # Before its first event there is no aggregate, and the action makes one.
                made = action(self._aggregate)  # type: ignore[arg-type]
            except DomainError as refusal:
                self._refusal = refusal
                made = None
            except AttributeError as error:
                if self._aggregate is None and error.obj is None:
                    reason = f"there is no {self._type.__name__} yet: give the event that begins it"
                    raise AssertionError(reason) from error
                raise
        if self._aggregate is None:
            self._aggregate = made
        if self._aggregate is not None:
            self._recorded = list(self._aggregate.collect_events())
        return self

    def then(self, *expected: Event) -> Self:
        """Expect exactly these events, compared by type and facts.

        An expected event whose `occurred_at` is given is compared by that too.
        Raises `AssertionError`.
        """
        if self._refusal is not None:
            raise AssertionError(f"expected {_list(expected)}, but it was refused: {self._refusal}")
        found = [_told(event, like) for event, like in _pairs(self._recorded, expected)]
        wanted = [_told(event, event) for event in expected]
        if found != wanted:
            raise AssertionError(f"expected {_list(expected)}, got {_list(tuple(self._recorded))}")
        return self

    def then_refused(self, error: DomainError | type[DomainError]) -> Self:
        """Expect this refusal, compared by its facts; a class, by that.

        Raises `AssertionError`.
        """
        wanted = error.__name__ if isinstance(error, type) else repr(error)
        if self._refusal is None:
            raise AssertionError(f"expected {wanted}, got {_list(tuple(self._recorded))}")
        is_it = (
            isinstance(self._refusal, error) if isinstance(error, type) else self._refusal == error
        )
        if not is_it:
            raise AssertionError(f"expected {wanted}, got {self._refusal!r}")
        if self._recorded:
            raise AssertionError(f"refused, but recorded {_list(tuple(self._recorded))}")
        return self

    def then_state(self, **attributes: object) -> Self:
        """Expect these attributes of the aggregate. Raises `AssertionError`."""
        if self._aggregate is None:
            reason = self._refusal or "nothing began one"
            raise AssertionError(f"expected {attributes}, but there is no aggregate: {reason}")
        found = {name: getattr(self._aggregate, name) for name in attributes}
        if found != attributes:
            raise AssertionError(f"expected {attributes}, got {found}")
        return self

    def _now(self) -> datetime:
        self._seconds += 1
        return FIRST_MOMENT + timedelta(seconds=self._seconds - 1)


def scenario(aggregate_type: type[A], key: str = "example") -> Scenario[A]:
    """Begin an example of an aggregate's behaviour.

    scenario(Item).given(registered).when(lambda item: item.sell(3, "536365")).then(sold)
    """
    return Scenario(aggregate_type, key)


def _pairs(found: list[Event], expected: tuple[Event, ...]) -> list[tuple[Event, Event]]:
    likes = [*expected, *found[len(expected) :]]
    return list(zip(found, likes, strict=False))


def _told(event: Event, like: Event) -> tuple[object, ...]:
    occurred = event.occurred_at if "occurred_at" in like.model_fields_set else None
    return type(event), event.facts(), occurred


def _list(events: tuple[Event, ...]) -> str:
    shown = [f"{type(event).__name__}({event.facts()})" for event in events]
    return ", ".join(shown) or "no event"


def __getattr__(name: str) -> object:
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from leftfold.infrastructure import strategies

    return getattr(strategies, name)
