"""Subscribers: effects outside of the store, at least once for each event."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from inspect import isawaitable, iscoroutinefunction
from typing import Any, TypeVar

from leftfold.application.errors import InvalidModelError
from leftfold.application.projection import Projection, aggregate_key, is_name, topics_of
from leftfold.domain import Event

E = TypeVar("E", bound=Event)

Effect = Callable[[E], Awaitable[None] | None]


class Subscriber:
    """Sends mail, calls webhooks, tells others: whatever cannot share the store's transaction.

        receipts = Subscriber("receipts")

        @receipts.on(StockSold)
        async def sold(event: StockSold) -> None:
            await mail(...)

    Each event comes at least once, those of one `key` in their order. After a crash some come
    again: they are told by their `originator_id` and `originator_version`. One whose effect fails
    is tried again, later and later, and then kept as a dead letter, with those of its key that
    come after it. It waits, with all behind it, if the effect raises what a `CircuitBreaker`
    does, or what a command answers while the store is away or the runtime closes. A new
    subscriber begins at the log's end, unless `from_beginning`; where views are rebuilt nothing
    comes again. With `needs`, events are held back until those views have seen them. Of several
    processes one tells it, unless it is `everywhere`: then each tells its own, of what happens
    while it runs, and an effect that keeps failing is only logged.
    """

    def __init__(
        self,
        name: str,
        *,
        version: int = 1,
        needs: Iterable[Projection[Any]] = (),
        from_beginning: bool = False,
        everywhere: bool = False,
        key: Callable[[Any], str] = aggregate_key,
    ) -> None:
        """Name a subscriber. Raises `InvalidModelError` for what does not fit together."""
        if not is_name(name) or version < 1:
            raise InvalidModelError(f"subscriber {name!r} version {version}: bad name or version")
        if everywhere and from_beginning:
            raise InvalidModelError(
                f"subscriber {name}: everywhere it begins with what happens now"
            )
        self.name = name
        self.version = version
        self.needs = tuple(needs)
        self.begins_now = not from_beginning
        self.everywhere = everywhere
        self.key = key
        self._effects: dict[type[Event], Effect[Any]] = {}
        self.renew: Callable[[], Awaitable[None]] | None = None
        """What is done when rows of the views that it needs may have changed without an event:
        after a retry or a rebuild, under another owner, and where the subscriber itself gets one.
        """

    @property
    def event_types(self) -> tuple[type[Event], ...]:
        """The event types that it is told of."""
        return tuple(self._effects)

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics of the events that it is told of, also those that they had before."""
        return topics_of(self._effects)

    @property
    def reads(self) -> str:
        """What it is told of may change: what is over is over."""
        return ""

    def on(self, event_type: type[E]) -> Callable[[Effect[E]], Effect[E]]:
        """Say what is done about events of one type: by a plain function, in a thread, or async."""

        def remember(effect: Effect[E]) -> Effect[E]:
            if event_type in self._effects:
                raise InvalidModelError(f"subscriber {self.name}: {event_type.__name__} twice")
            self._effects[event_type] = effect
            return effect

        return remember

    def is_of(self, event: Event) -> bool:
        """Tell whether something is done about an event."""
        return type(event) in self._effects

    async def tell(self, event: Event, in_thread: Callable[..., Awaitable[Any]]) -> None:
        """Do what is to be done about an event."""
        effect = self._effects[type(event)]
        begun = effect(event) if iscoroutinefunction(effect) else await in_thread(effect, event)
        if isawaitable(begun):
            await begun
