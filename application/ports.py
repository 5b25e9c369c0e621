"""What the application needs of its surroundings; adapters lie in the infrastructure."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Flag, auto
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar
from uuid import UUID

from leftfold.application.checkpoints import Change, Checkpoint, Comparison, DeadLetter, Reader
from leftfold.application.errors import DispatchError
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

    def thread(self) -> int:
        """Return which thread this is."""
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


REACTION = "process "
"""What the names of commands begin with that are reactions of processes."""


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
    refusal: DispatchError | None = None
    """What to answer, if more is known than that it is refused."""


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


class Events(Protocol):
    """The one log of events of a store, as it is read page by page.

    Positions are ordered as the commits were, so that a reader who has seen one position never
    meets a lower one later; they need not be dense.
    """

    def read(self, after: int, limit: int, topics: Sequence[str] = ()) -> list[LoggedEvent]:
        """Return at most `limit` events after a position; if `topics` are given, only of these.

        Without topics it reads the log as it lies; with them it looks each up, and events of
        other topics cost nothing.
        """
        ...

    def topics(self) -> frozenset[str]:
        """Return the topics of all events, looking at few of them."""
        ...

    def head(self) -> int:
        """Return the position of the last event; 0 if there is none."""
        ...


class Log(Events, Protocol):
    """The log with the ids of the commands that wrote it."""

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

        At most `limit` of them; return how many. Reactions of processes are kept for good.
        """
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

    def checkpoints(self, readers: Sequence[Reader]) -> list[Checkpoint]:
        """Return how far readers are."""
        ...

    def hold(self, readers: Sequence[Reader], owner: str, seconds: float) -> list[Checkpoint]:
        """Let the owner have those that nobody holds, or that it holds itself, for so long.

        Returns how far all of them are then, whoever holds them.
        """
        ...

    def release(self, owner: str) -> None:
        """Let others have what the owner holds."""
        ...

    def halt(self, reader: Reader, at: Checkpoint, failure: str) -> None:
        """Keep why a reader has stopped at a checkpoint, for its epoch.

        Nothing is kept if somebody has moved it since.
        """
        ...

    def define(self, reader: Reader) -> None:
        """Make what a reader needs, if it is not there. Raises `ViewChangedError`."""
        ...

    def drop(self, reader: Reader) -> None:
        """Delete a view with its rows, its dead letters and its checkpoint."""
        ...

    def versions(self, name: str) -> dict[int, bool]:
        """Return the versions that are stored of a reader, and whether somebody holds each."""
        ...

    def before(self, projection: Projection[Any]) -> Projection[Any] | None:
        """Return the version of a view that is stored before this one, to compare its rows.

        None if there is none, or if its columns are not the same.
        """
        ...

    def compare(self, projection: Projection[Any], other: Projection[Any]) -> Comparison | None:
        """Compare the rows of a view with another's, whose columns are the same.

        None if the two are not equally far.
        """
        ...

    def take_over(self, projection: Projection[Any], anew: Projection[Any]) -> Comparison | None:
        """Give a view the rows of the one that was built beside it, and drop that.

        In one transaction, which also gives it another epoch; returns how many rows that changes.
        None, and nothing is done, if the two are not equally far.
        """
        ...

    def dead_letters(self, reader: Reader) -> list[DeadLetter]:
        """Return what the reader could not take in, by position."""
        ...

    def parked(
        self, reader: Reader, positions: Iterable[int], versions: Iterable[tuple[UUID, int]]
    ) -> int | None:
        """Return where the first event is that the reader could not take in, of some events.

        They are those at some positions, and those of some versions of aggregates; None if there
        is none among its dead letters.
        """
        ...

    def load(self, projection: Projection[R], keys: Sequence[str]) -> dict[str, R]:
        """Return the rows under these keys, members or not."""
        ...

    def get(self, projection: Projection[R], key: str) -> R | None:
        """Return the row under a key if it is a member."""
        ...

    def write(
        self,
        changes: Sequence[Change],
        position: int,
        *,
        group: Group | None = None,
        is_built: bool = False,
        is_fence: bool = False,
    ) -> bool:
        """Write what a page changes and move its readers to a position, in one transaction.

        Returns False, and writes nothing, unless every checkpoint is as the changes say and the
        group, which is written with them, is committed. `is_built` marks the readers as built;
        a fence gives them another epoch. Raises `ValueOutOfRangeError` for a row that no database
        keeps.
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


class Inline(Protocol):
    """Views that are written with the events."""

    def __call__(self, events: Events, views: ViewStore, /) -> None:
        """Fold what is new, in the transaction that both are of. Raises what refuses it."""
        ...

    def make_good(self) -> bool:
        """Fold what others have written, in transactions of its own; tell whether there was any."""
        ...


class Heard(Flag):
    """What there may be news of."""

    NOTHING = 0
    EVENTS = auto()
    VIEWS = auto()
    END = auto()
    """There is nothing to listen to any more."""


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
        readers: Sequence[Reader],
        *,
        create_tables: bool,
        keys: Keys | None = None,
        inline: Inline | None = None,
    ) -> None:
        """Connect, and make or check the tables of the log and of these projections.

        Rows that hold personal data need the keys. `inline` is called in each transaction that
        writes events.
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

    def heard(self) -> Heard:
        """Take what became readable, and tell what it was about."""
        ...

    def committing(self) -> Commit | None:
        """Return what does the same as `log.commit` on the running loop, without a thread."""
        ...

    def cut(self, seconds: float) -> None:
        """Make the calls fail that the database has not answered for so long.

        What concerns all rows of a view has more time, unless all are cut: `-inf`. A database in
        this process does not hang, and cuts nothing.
        """
        ...

    def has_changed(self) -> bool:
        """Tell, cheaply, whether somebody else may have committed since the last look."""
        ...
