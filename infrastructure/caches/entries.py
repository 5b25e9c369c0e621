"""What a cache keeps under a key, and for how long."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)
from uuid import UUID

from pydantic import BaseModel

from leftfold.application.caching import CacheEntry, InvalidCacheArgumentError
from leftfold.infrastructure.caches.globs import matcher

T = TypeVar("T")

NEVER = math.inf
IMMUTABLE = (
    *(NoneType, bool, int, float, complex, str, bytes, Decimal, Fraction),
    *(datetime, date, time, timedelta, UUID, Enum),
)


class Kept(NamedTuple, Generic[T]):
    """A value with its times, in seconds since 1970."""

    value: T
    created: float
    expires: float
    """`NEVER` if it does not."""
    position: int
    tags: frozenset[str]


class Change(NamedTuple):
    """What is removed: a key, what fits a pattern, what has a tag, or all."""

    kind: Literal["key", "pattern", "tag", "all"]
    what: str = ""

    def concerns(self) -> Callable[[str, frozenset[str]], bool]:
        """Return whether it concerns what is kept under a key with some tags."""
        if self.kind == "key":
            return lambda key, _: key == self.what
        if self.kind == "tag":
            return lambda _, tags: self.what in tags
        if self.kind == "pattern":
            fits = matcher(self.what)
            return lambda key, _: fits(key)
        return lambda _key, _tags: True


@dataclass(frozen=True, slots=True)
class Times:
    """How long things are kept."""

    clock: Callable[[], float]
    """Seconds since 1970."""
    random: Callable[[], float]
    stale_for: float
    """Seconds for which an expired value may stand in for a failing source."""
    jitter: float
    """Seconds that a time to live is lengthened by at most, each by another."""

    def __post_init__(self) -> None:
        """Check them. Raises `InvalidCacheArgumentError`."""
        for name in ("stale_for", "jitter"):
            seconds = getattr(self, name)
            if not 0 <= seconds < math.inf:
                raise InvalidCacheArgumentError(name, f"{seconds!r} is no number of seconds")

    def keep(self, value: T, ttl: float | None, tags: Iterable[str], position: int) -> Kept[T]:
        """Return a value with its times. Raises `InvalidCacheArgumentError`."""
        if isinstance(tags, str):
            raise InvalidCacheArgumentError("tags", "are several, not one text")
        now = self.clock()
        if ttl is None:
            expires = NEVER
        elif not isinstance(ttl, int | float) or isinstance(ttl, bool) or not 0 < ttl < math.inf:
            raise InvalidCacheArgumentError("ttl", f"{ttl!r} is no number of seconds above 0")
        else:
            expires = now + ttl + self.jitter * self.random()
        return Kept(value, now, expires, position, frozenset(tags))

    def is_fresh(self, kept: Kept[Any]) -> bool:
        """Tell whether it may be served."""
        return kept.expires > self.clock()

    def is_usable(self, kept: Kept[Any]) -> bool:
        """Tell whether it may be served while its source fails."""
        return kept.expires + self.stale_for > self.clock()

    def entry(self, kept: Kept[T], value: T, *, is_stale: bool = False) -> CacheEntry[T]:
        """Return what is kept as others see it."""
        return CacheEntry(
            value,
            _moment(kept.created),
            None if kept.expires == NEVER else _moment(kept.expires),
            kept.position,
            kept.tags,
            is_stale,
            lambda: _moment(self.clock()),
        )


def _moment(seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):  # each for another distance
        return datetime.max.replace(tzinfo=UTC)


def copier(kind: Any) -> Callable[[T], T]:
    """Return how a value of a type is handed over: as it is if nobody can change it."""
    return _same if _is_immutable(kind, ()) else deepcopy


def _same(value: T) -> T:
    return value


def _is_immutable(kind: Any, within: tuple[Any, ...]) -> bool:  # noqa: PLR0911 - a case a line
    if kind in within or kind is None:
        return True
    if isinstance(kind, NewType):
        return _is_immutable(kind.__supertype__, within)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _is_immutable(arguments[0], within)
    if origin is Literal:
        return True
    if origin in {Union, UnionType, tuple, frozenset}:
        return all(_is_immutable(each, within) for each in arguments if each is not ...)
    if not isinstance(kind, type):
        return False
    if issubclass(kind, IMMUTABLE):
        return True
    hints = _frozen_fields(kind)
    return hints is not None and all(_is_immutable(hint, (*within, kind)) for hint in hints)


def _frozen_fields(kind: type[Any]) -> list[Any] | None:
    """Return the types of fields that cannot be set; None if they can, or are not known."""
    if is_dataclass(kind) and cast("Any", kind).__dataclass_params__.frozen:  # as dataclass() sets
        try:
            types = get_type_hints(kind)
        except NameError:  # one is imported for type checkers alone
            return None
        return [types[each.name] for each in fields(kind)]
    if issubclass(kind, BaseModel) and kind.model_config.get("frozen"):
        return [each.annotation for each in kind.model_fields.values()]
    return None
