"""Caches: what is kept for a while, what must be known of it, and answers of queries in them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from leftfold.application.bus import Dispatch, Middleware, Outcome, Step
from leftfold.application.errors import EventStoreUnavailable
from leftfold.application.messages import Query
from leftfold.application.projection import Projection
from leftfold.application.reading import ReadAt, current_read
from leftfold.application.subscriber import Subscriber
from leftfold.domain import Err, Event, LeftfoldError, Ok
from leftfold.domain.clock import now
from leftfold.domain.personal import Noticing, Personal, note, noting

T = TypeVar("T")
Q = TypeVar("Q", bound=Query[Any, Any])


class InvalidCacheArgumentError(LeftfoldError, message="{name} of a cache: {reason}"):
    """A time to live, a size or a key that no cache takes: an error in the program."""

    name: str
    reason: str


class PersonalNotKeptError(InvalidCacheArgumentError):
    """A value with personal data, for a cache outside the process: where it could not be erased."""


class NotKept(Exception):
    """Raised by a loader whose answer is not to be kept, nor replaced by an older one.

    All who wait for the load get it raised.
    """


@dataclass(frozen=True, slots=True)
class CacheEntry(Generic[T]):
    """A value in a cache, with what is known of it."""

    value: T
    created_at: datetime
    """When it was put there (UTC)."""
    expires_at: datetime | None
    """When it is no longer served, unless its source fails; None if never."""
    position: int = 0
    """The position in the log that it was read at or after; 0 if unknown."""
    tags: frozenset[str] = frozenset()
    is_stale: bool = False
    """It has expired, and is served all the same, since its source fails."""
    now: Callable[[], datetime] = field(default=now, repr=False, compare=False)
    """The clock that its times are of."""

    @property
    def is_expired(self) -> bool:
        """Tell whether its time is over."""
        return self.expires_at is not None and self.now() >= self.expires_at


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """What a loader answers that knows at which position of the log it has read."""

    value: T
    position: int


Loader: TypeAlias = Callable[[], Awaitable[T | Loaded[T]]]


class CacheProvider(Protocol[T]):
    """Keeps values of one type under text keys.

    What comes back equals what went in, and is the caller's own. Times to live are seconds,
    fractions allowed; None is for ever; zero and less raise `InvalidCacheArgumentError`.
    """

    async def get(self, key: str) -> T | None:
        """Return the value, or None if there is none, or if it has expired."""
        ...

    async def entry(self, key: str) -> CacheEntry[T] | None:
        """Return the value with what is known of it; this tells a stored None from a miss."""
        ...

    async def set(
        self,
        key: str,
        value: T,
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        position: int = 0,
    ) -> None:
        """Keep a value in place of what is there."""
        ...

    async def delete(self, key: str) -> None:
        """Keep nothing under a key, not even what is being loaded."""
        ...

    async def invalidate_pattern(self, pattern: str) -> int:
        """Delete all keys that fit a glob as Redis has it; return how many values there were."""
        ...

    async def invalidate_tag(self, tag: str) -> int:
        """Delete all that was kept with a tag; return how many values there were."""
        ...

    async def clear(self) -> None:
        """Delete all."""
        ...

    async def get_or_load(
        self,
        key: str,
        loader: Loader[T],
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        after: int = 0,
    ) -> T:
        """Return the value; load it, once for all who ask, if there is none or too old a one.

        `after` is the position in the log that the value must have been read at, at least. If
        the loader fails, a value that expired not too long ago is served in its place.
        """
        ...

    async def entry_or_load(
        self,
        key: str,
        loader: Loader[T],
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        after: int = 0,
    ) -> CacheEntry[T]:
        """Do as `get_or_load`, and return the value with what is known of it."""
        ...


def cached(
    query_type: type[Q],
    cache: CacheProvider[Any],
    ttl: float | None,
    *,
    key: Callable[[Q], str] | None = None,
    tags: Callable[[Q], Iterable[str]] | None = None,
) -> Middleware:
    """Answer queries of a type from a cache, which is one of what they answer.

    An answer is kept for `ttl` seconds under its `key` (by default the query's name and fields),
    with `tags`; refusals are not kept. A query with personal data needs a `key` that shows none:
    without one its answers are not kept. It is kept with the position in the log that it was read
    at, so that `after=receipt` holds: an older one is not served. While the event store cannot be
    reached the cache may answer with one that has expired. What reveals personal data is not kept.
    """

    async def around(dispatch: Dispatch[Any], call_next: Step) -> Outcome:
        query = dispatch.message
        if type(query) is not query_type:
            return await call_next(dispatch)
        name = _default_key(query) if key is None else key(query)
        if name is None:
            return await call_next(dispatch)

        async def load() -> Loaded[Any]:
            read_at = ReadAt()
            token = current_read.set(read_at)
            try:
                with noting() as revealed:
                    outcome = await call_next(dispatch)
            finally:
                current_read.reset(token)
            if revealed:  # it could be forgotten, and a cache would not know
                raise _Refused(outcome, revealed)
            if isinstance(outcome, Err):
                failed = isinstance(outcome.error, EventStoreUnavailable)
                raise (_Failed if failed else _Refused)(outcome)
            return Loaded(outcome.value, read_at.position)

        try:
            value = await cache.get_or_load(
                name,
                load,
                ttl,
                tags=() if tags is None else tags(query),
                after=dispatch.after.position if dispatch.after is not None else 0,
            )
        except _Refused as error:
            note(error.revealed)  # for a cache around this one: the load may be another's
            return error.outcome
        except _Failed as error:
            return error.outcome
        return Ok(value)

    return around


def invalidating(
    name: str,
    projection: Projection[Any],
    cache: CacheProvider[Any],
    *,
    keys: Callable[[str], Iterable[str]] = lambda _: (),
    tags: Callable[[str], Iterable[str]] = lambda _: (),
    everywhere: bool = True,
) -> Subscriber:
    """Return what deletes from a cache all that was made of the rows which a view has changed.

    `keys` and `tags` name what is cached of the row under a key. It is told after the view has
    passed an event, with a checkpoint of its own, so that a crash in between loses nothing, and
    waits for a cache that is away. What changes rows without an event, a `retry` or a `rebuild`,
    clears the whole cache within about a second, and so does another owner of the view or of this:
    it may be after one. A cache in this process is one of many: each process sees to its own. One
    that processes share is seen to once, with `everywhere=False`. A `TieredCache` is both: it has
    one subscriber, and the Redis behind it another, with `everywhere=False`, which waits while
    that is away, also over the end of a process.
    """
    subscriber = Subscriber(name, needs=(projection,), everywhere=everywhere)

    async def changed(event: Event) -> None:
        if projection.is_of(event):
            for row_key in projection.keys_of(event):
                for key in keys(row_key):
                    await cache.delete(key)
                for tag in tags(row_key):
                    await cache.invalidate_tag(tag)

    for event_type in projection.event_types:
        subscriber.on(event_type)(changed)
    subscriber.renew = cache.clear
    return subscriber


def _default_key(query: Query[Any, Any]) -> str | None:
    noticing = Noticing()
    fields = query.model_dump_json(context=noticing)
    return None if noticing.has_met_some else f"{type(query).__name__}:{fields}"


class _Refused(NotKept):
    """A refusal, or what reveals something: the answer, which is not to be kept."""

    def __init__(self, outcome: Outcome, revealed: Sequence[Personal[Any]] = ()) -> None:
        super().__init__()
        self.outcome = outcome
        self.revealed = revealed


class _Failed(Exception):
    """There was no answer: an older one may stand in."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome
