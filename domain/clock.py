"""The time as the domain sees it: the system's, unless the surroundings say otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from datetime import UTC, datetime
from typing import TypeAlias

Now: TypeAlias = Callable[[], datetime]
"""Answers the present moment, in UTC."""


def system_now() -> datetime:
    """Return the system's time, in UTC."""
    return datetime.now(UTC)


_now: ContextVar[Now] = ContextVar("leftfold_now", default=system_now)


def now() -> datetime:
    """Return the present moment, in UTC."""
    return _now.get()()


def use(source: Now) -> Token[Now]:
    """Let `now` ask this source, in this thread or task only, until `restore` of the token."""
    return _now.set(source)


def restore(token: Token[Now]) -> None:
    """Let `now` ask what it asked before `use`."""
    _now.reset(token)


@contextmanager
def clock(source: Now) -> Iterator[None]:
    """Let `now` ask this source inside the block."""
    token = use(source)
    try:
        yield
    finally:
        restore(token)
