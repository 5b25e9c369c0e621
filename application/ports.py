"""What the application needs of its surroundings; adapters lie in the infrastructure."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar
from uuid import UUID

from leftfold.application.projection import Projection
from leftfold.domain import ALWAYS, Specification
from leftfold.domain.personal import Keys

T = TypeVar("T")
NOTHING: Mapping[UUID, int] = {}
R = TypeVar("R")


class Platform(Protocol):
    """Time, randomness, ids, threads and tasks: the only way to reach them."""

    def now(self) -> datetime:
        """Return the present moment (UTC)."""
        ...

    def monotonic(self) -> float:
        """Return seconds since some moment; never goes back."""
        ...

    def random(self) -> float:
        """Return a number from 0 up to 1."""
        ...

    def new_id(self) -> UUID:
        """Return an id that nobody else has."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait some seconds."""
        ...

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Call a blocking function in a thread; goes on to its end even if cancelled."""
        ...

    async def in_own_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Call what may block for long in a thread that the runtime's own work does not need."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> Awaitable[None]:
        """Begin a task."""
        ...


class EncodedEvent(NamedTuple):
    """An event as the log takes it in."""

    aggregate_id: UUID
    version: int
    topic: str
    state: bytes


class StoredSnapshot(NamedTuple):
    """The state of an aggregate at a version."""

    aggregate_id: UUID
    version: int
    shape: str
    """What the aggregate's class was like: one of another shape is of no use."""
    state: bytes


class LoggedEvent(NamedTuple):
    """A stored event with its position, as the log gives it out."""

    position: int
    aggregate_id: UUID
    version: int
    topic: str
    state: bytes


class Save(NamedTuple):
    """What one command wants written: its events and the answer to keep with its id."""

    command_id: UUID
    command: str
    events: Sequence[EncodedEvent]
    aggregates: tuple[tuple[UUID, int], ...]
    answer: bytes | None
    """The handler's answer as JSON; None if it is the receipt itself."""


class RecordedCommand(NamedTuple):
    """What the log keeps of a command that was carried out."""

    command_id: UUID
    command: str
    aggregates: tuple[tuple[UUID, int], ...]
    position: int
    answer: bytes | None


class Committed(NamedTuple):
    """The group was written; the position of each save's last event (0 if it had none)."""

    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stale:
    """An aggregate is at another version than the group is based on; nothing of it was written."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """A command id of the group was known already; nothing of the group was written."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The database failed."""

    reason: str
    in_doubt: bool = False
    """It failed while committing, so that the outcome is not known."""
    is_refusal: bool = False
    """It does not want just this: nothing is wrong with it, and to repeat it is of no use."""


Verdict: TypeAlias = Committed | Stale | Repeated | Failed


class Group(NamedTuple):
    """Saves that are written all or none."""

    saves: Sequence[Save]
    based_on: Sequence[tuple[UUID, int]] = ()
    """Aggregates that were looked at and not saved, and their versions; 0 for one that is absent.

    An aggregate whose events are saved must be at the version before the first of them.
    """


Commit: TypeAlias = Callable[[Sequence[Group]], Awaitable[list[Verdict]]]
"""Writes groups in their order; each gets its own verdict."""


class Log(Protocol):
    """The one log of events of a store, with the ids of the commands that wrote them.

    Positions are ordered as the commits were, so that a reader who has seen one position never
    meets a lower one later; they need not be dense.
    """

    @property
    def is_local(self) -> bool:
        """No other process can write, and calls return at once without blocking."""
        ...

    def commit(self, groups: Sequence[Group]) -> list[Verdict]:
        """Write groups in their order; each gets its own verdict."""
        ...

    def streams(
        self, aggregate_ids: Sequence[UUID], after: Mapping[UUID, int] = NOTHING
    ) -> dict[UUID, list[EncodedEvent]]:
        """Return the events of each aggregate by version; an absent one has none.

        Of aggregates in `after` only those beyond the version named there.
        """
        ...

    def versions(self, aggregate_ids: Sequence[UUID]) -> dict[UUID, int]:
        """Return the last version of each aggregate that exists."""
        ...

    def commands(self, command_ids: Sequence[UUID]) -> dict[UUID, RecordedCommand]:
        """Return what is kept of these commands; those not carried out are left out."""
        ...

    def snapshots(self, aggregate_ids: Sequence[UUID]) -> list[StoredSnapshot]:
        """Return the snapshots of these aggregates; one has at most one."""
        ...

    def keep_snapshots(self, snapshots: Sequence[StoredSnapshot]) -> None:
        """Keep snapshots in place of older ones of the same shape, or of others."""
        ...

    def purge(self, older_than: float, limit: int) -> int:
        """Delete what is kept of commands recorded more than so many seconds ago.

        At most `limit` of them; return how many.
        """
        ...

    def read(
        self, after: int, limit: int, topics: Sequence[str] = (), *, without: Sequence[str] = ()
    ) -> list[LoggedEvent]:
        """Return at most `limit` events after a position.

        If `topics` are given, only events of these; none that are of a topic in `without`.
        """
        ...

    def head(self) -> int:
        """Return the position of the last event; 0 if there is none."""
        ...


class Access(Protocol):
    """How the store is asked: its calls may block, and fail for a moment."""

    async def read(self, function: Callable[..., T], *args: Any) -> T:
        """Call what reads, or what may be done twice, as to keep snapshots.

        Raises `EventStoreUnavailable` if the store does not answer.
        """
        ...

    async def commit(self, groups: Sequence[Group]) -> list[Verdict]:
        """Write groups; a store that does not answer gives `Failed`."""
        ...


@dataclass(frozen=True, slots=True)
class Order:
    """A column to order by; ties go by the row's key, ascending. `None` comes before any value."""

    column: str
    descending: bool = False


@dataclass(frozen=True, slots=True)
class Seek:
    """Go on after the row with this value in the order's column and this key."""

    value: object
    key: str


class ViewStore(Protocol):
    """The tables of projections, with their checkpoints."""

    def checkpoint(self, projection: Projection[Any]) -> int:
        """Return the position up to which the view's rows are folded."""
        ...

    def load(self, projection: Projection[R], keys: Sequence[str]) -> dict[str, R]:
        """Return the rows under these keys, members or not."""
        ...

    def get(self, projection: Projection[R], key: str) -> R | None:
        """Return the row under a key if it is a member."""
        ...

    def write(
        self,
        projection: Projection[R],
        rows: Mapping[str, R | None],
        expected: int,
        position: int,
    ) -> bool:
        """Write rows (`None` deletes) and move the checkpoint, in one transaction.

        Returns False, and writes nothing, unless the checkpoint is at `expected`.
        """
        ...

    def select(
        self,
        projection: Projection[R],
        order: Order | None,
        limit: int | None,
        seek: Seek | None = None,
        where: Specification[Any] = ALWAYS,
    ) -> list[tuple[str, R]]:
        """Return the view's member rows with their keys, in order; by key if none is given.

        `where` is bound to the row type, and has no wrapped callables.
        """
        ...

    def count(self, projection: Projection[Any], where: Specification[Any] = ALWAYS) -> int:
        """Return how many member rows there are; `where` is as for `select`."""
        ...


class Store(Protocol):
    """A log and views in one place, with what tells of writes by other processes."""

    @property
    def name(self) -> str:
        """Its URL, with no password."""
        ...

    @property
    def log(self) -> Log:
        """Its events."""
        ...

    @property
    def views(self) -> ViewStore:
        """Its projections' tables."""
        ...

    def open(
        self,
        projections: Sequence[Projection[Any]],
        *,
        create_tables: bool,
        keys: Keys | None = None,
    ) -> None:
        """Connect, and make or check the tables of the log and of these projections.

        Rows that hold personal data need the keys.
        """
        ...

    def close(self) -> None:
        """Close all connections."""
        ...

    @property
    def hints(self) -> bool:
        """Others' commits can be listened to; without a listener the log has to be looked at."""
        ...

    def listen(self) -> int | None:
        """Return a file descriptor that becomes readable when somebody commits, if there is one."""
        ...

    def heard(self) -> bool:
        """Take what became readable; False if there is nothing to listen to any more."""
        ...

    def committing(self) -> Commit | None:
        """Return what does the same as `log.commit` on the running loop, without a thread."""
        ...

    def cut(self, seconds: float) -> None:
        """Make the calls fail that the database has not answered for so long."""
        ...

    def has_changed(self) -> bool:
        """Tell, cheaply, whether somebody else may have committed since the last look."""
        ...
