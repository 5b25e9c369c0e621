"""How a runtime and its parts are, without asking anybody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pydantic import TypeAdapter

from leftfold.application.checkpoints import Comparison


class ReaderState(StrEnum):
    """What a view, a process or a subscriber is doing."""

    LIVE = "live"
    """This process keeps it as new as the log."""
    WATCHED = "watched"
    """Another process does."""
    FREE = "free"
    """Nobody does at present."""
    BUILDING = "building"
    """It has not been as far as the log yet, and is not shown."""
    WAITING = "waiting"
    """The database fails; it is tried again."""
    HALTED = "halted"
    """It met what it cannot take in, here or in the process that had it last."""


@dataclass(frozen=True, slots=True)
class ProjectionHealth:
    """How far one view, process or subscriber is. Positions are the log's."""

    name: str
    version: int
    state: ReaderState
    position: int
    lag: int
    """Positions behind the log's end, as of the last look."""
    lag_seconds: float
    """Since when it is behind."""
    rate: float
    """Events a second, while this process had some to take in."""
    dead_letters: int
    """Events that were put aside, by row: an event that changes two counts twice."""
    failure: str | None
    """Why it stopped, if it did."""
    compared: Comparison | None = None
    """How its rows differed from those of the version before it when this process had built it;
    None if there is none, if its columns are others, or if the two were never equally far."""


@dataclass(frozen=True, slots=True)
class PartHealth:
    """How a breaker or a cache is."""

    name: str
    kind: str
    state: str
    counters: Mapping[str, int]
    """What it has counted since it was made, by name."""


class Watched(Protocol):
    """What a runtime tells the health of: a breaker, a cache."""

    def health(self) -> PartHealth:
        """Tell how it is, without asking anybody."""
        ...


@dataclass(frozen=True, slots=True)
class Health:
    """How a runtime is."""

    store: str
    """The store's URL, with no password."""
    is_healthy: bool
    """It is open, its store answers, and no projection stopped in this process."""
    projections: tuple[ProjectionHealth, ...]
    parts: tuple[PartHealth, ...]
    """The breaker of its store, then what it was given to watch."""


def dump_health(health: Health) -> str:
    """Return a runtime's health as JSON."""
    return TypeAdapter(Health).dump_json(health, indent=2).decode()
