"""How far those are that read the log, what they could not take in, and what a page writes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from leftfold.domain import Event


class Reader(Protocol):
    """What reads the log from a checkpoint of its own: a projection, a process, a subscriber."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def version(self) -> int:
        """Grows when what it makes of the events changes."""
        ...

    @property
    def reads(self) -> str:
        """What it reads, as text: it may not change without the version."""
        ...

    @property
    def begins_now(self) -> bool:
        """A new one leaves out what is in the log already."""
        ...


def full_name(name: str, version: int) -> str:
    """Return what one version of a reader is called; below 0 it is what is built anew of one."""
    return f"{name}_v{abs(version)}{'_anew' if version < 0 else ''}"


class Checkpoint(NamedTuple):
    """How far a reader is, and who may move it on."""

    position: int
    """All events up to this one are taken in."""
    epoch: int = 0
    """Grows with each new owner, and with each change from outside: what was begun under an older
    one cannot be written."""
    owner: str = ""
    is_held: bool = False
    """The owner's lease has not run out."""
    is_built: bool = True
    """It was once as far as the log. Until then a view is not shown."""
    dead_letters: int = 0
    failure: str = ""
    """Why it stopped in this epoch; empty if it did not."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that a reader could not take in, or one that waits behind such a one."""

    position: int
    """The event's, in the log, where it stays."""
    key: str
    """Of the row that it would change: later events of the same key wait behind it."""
    aggregate_id: UUID
    version: int
    topic: str
    error: str
    """Why it could not be taken in; empty if it waits behind one before it."""
    parked_at: datetime


@dataclass(frozen=True, slots=True)
class Change:
    """What a page of the log changes for one reader."""

    reader: Reader
    checkpoint: Checkpoint
    """What is stored must still be so far, and of this epoch."""
    rows: Mapping[str, Any] = field(default_factory=dict)
    """By their keys; None deletes."""
    fresh: Collection[str] = frozenset()
    """Keys of rows that are not there yet, as far as the page knows: they may be quicker to put."""
    parked: Sequence[DeadLetter] = ()
    released: Sequence[DeadLetter] = ()
    """What is parked no longer."""
    events: Sequence[Event] = ()
    """For the projection's own statements."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the rows of a view differ from those of another, in rows."""

    same: int
    changed: int
    added: int
    """Only this one has them."""
    removed: int
    """Only the other has them."""

    @property
    def is_same(self) -> bool:
        """There is no difference."""
        return not (self.changed or self.added or self.removed)

    def __str__(self) -> str:
        return ", ".join(f"{number} {name}" for name, number in asdict(self).items())
