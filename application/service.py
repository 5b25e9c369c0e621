"""Services: eventsourcing applications whose methods handle commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from enum import Enum
from typing import Any, ClassVar, Protocol, TypeVar
from uuid import UUID, uuid4

import eventsourcing.application
from eventsourcing.application import Application, ProcessingEvent
from eventsourcing.domain import DomainEventProtocol, MutableOrImmutableAggregate
from eventsourcing.persistence import EventStore, InfrastructureFactory, Mapper, Recording
from eventsourcing.utils import Environment, EnvType

from leftfold.application.errors import DispatchOverError
from leftfold.application.mapper import EventMapper
from leftfold.application.memory import Hand, Memory
from leftfold.application.messages import Handling
from leftfold.application.ports import Platform
from leftfold.application.receipt import Receipt
from leftfold.domain import Aggregate, AggregateNotFound, Event, project

A = TypeVar("A", bound=Aggregate)

NO_COMMAND = UUID(int=0)


class NotInMemory(BaseException):
    """A handler asked for aggregates that must be read first; the attempt is made again.

    Not an `Exception`, so that no handler catches it by accident.
    """

    def __init__(self, wanted: Mapping[UUID, type[Aggregate]]) -> None:
        super().__init__(wanted)
        self.wanted = wanted


class Believed(Enum):
    """How the aggregates of a unit may stay in memory when it ends."""

    BEFORE = 0
    """As they were taken: nothing was written."""
    BEHIND = 1
    """As they were taken, but the store has newer ones."""
    AFTER = 2
    """As they are now: the store has them so."""


class Unit:
    """What one dispatch has in hand and what it staged; committed by the runtime, or dropped.

    No other dispatch may use what is in its `hands` meanwhile.
    """

    __slots__ = (
        "_memory",
        "_platform",
        "_thread",
        "_used",
        "believed",
        "command_id",
        "events",
        "hands",
        "has_looked_ahead",
        "may_take",
        "sealed",
        "versions",
    )

    def __init__(self, memory: Memory, platform: Platform) -> None:
        """Take aggregates from this memory, which is this thread's."""
        self._memory = memory
        self._platform = platform
        self._thread = platform.thread()
        self.hands: dict[UUID, Hand] = {}
        self.events: list[Event] = []
        self.versions: dict[UUID, int] = {}
        self._used: list[Aggregate | None] = []
        self.command_id = NO_COMMAND
        self.believed = Believed.BEFORE
        self.may_take = True
        """What is free can be taken in passing, by what runs on the loop."""
        self.has_looked_ahead = False
        self.sealed = False

    def find(self, aggregate_type: type[A], aggregate_ids: Sequence[UUID]) -> list[A | None]:
        """Return aggregates in hand, taking those that are free and in memory.

        Raises `NotInMemory`.
        """
        if self.sealed:
            raise DispatchOverError
        hands = self.hands
        found: list[Any] = []
        missing: dict[UUID, type[Aggregate]] = {}
        for aggregate_id in aggregate_ids:
            hand = hands.get(aggregate_id)
            if hand is None and self.may_take and self._platform.thread() == self._thread:
                hand = self._memory.take_current(aggregate_id)
            if hand is None:
                missing[aggregate_id] = aggregate_type
            else:
                hands[aggregate_id] = hand
                found.append(hand.aggregate)
        if missing:
            raise NotInMemory(missing)
        self._used += found
        return found

    def save(self, aggregates: Iterable[Aggregate]) -> Receipt:
        """Stage what the aggregates recorded."""
        if self.sealed:
            raise DispatchOverError
        for aggregate in aggregates:
            recorded = aggregate.collect_events()
            aggregate_id = aggregate._id
            self.versions[aggregate_id] = aggregate._version
            hand = self.hands.get(aggregate_id)
            if hand is None:
                self.hands[aggregate_id] = hand = Hand(None, is_taken=False)
            hand.aggregate = aggregate
            self._used.append(aggregate)
            if recorded:
                self.events += recorded
                hand.is_saved = True
        return Receipt(self.command_id, tuple(self.versions.items()), 0)

    def begin_command(self, command_id: UUID) -> None:
        """Stage what follows for this command."""
        self.command_id = command_id
        self.versions = {}
        self._used = []

    def seal(self) -> None:
        """Take no more: what a task of the handler does from now on would be lost."""
        if not self.sealed:
            self.sealed = True
            for hand in list(self.hands.values()):  # a thread of a handler may still be at it
                hand.seal()

    def based_on(self) -> dict[UUID, int]:
        """Return the versions that what was taken had; 0: absent."""
        return {i: hand.version for i, hand in self.hands.items() if hand.is_taken}

    def looked_at(self) -> list[tuple[UUID, int]]:
        """Return the same of what was taken and is not saved."""
        return [
            (i, hand.version)
            for i, hand in self.hands.items()
            if hand.is_taken and not hand.is_saved
        ]

    @property
    def was_read_at_once(self) -> bool:
        """All that it looked at is one aggregate, and was read for it."""
        return len(self.hands) <= 1 and all(hand.is_loaded for hand in self.hands.values())

    def let_go(self) -> None:
        """Let others use the aggregates, and keep in memory what can be believed."""
        is_after = self.believed is Believed.AFTER
        is_current = self.believed is not Believed.BEHIND
        for aggregate_id, hand in list(self.hands.items()):
            if hand.is_taken:
                aggregate = hand.after() if is_after else hand.before()
                is_new = is_current and (is_after or hand.is_current)
                self._memory.let_go(aggregate_id, aggregate, is_current=is_new)

    @property
    def is_changed(self) -> bool:
        """An aggregate that the command uses has events that are not saved."""
        return any(a is not None and a._pending_events for a in self._used)


class Staging(Protocol):
    """Where repositories load and save while something is carried out that is written later."""

    @property
    def sealed(self) -> bool:
        """It takes no more."""
        ...

    def find(self, aggregate_type: type[A], aggregate_ids: Sequence[UUID]) -> list[A | None]:
        """Return aggregates in the order of their ids; None for the absent."""
        ...

    def save(self, aggregates: Iterable[Aggregate]) -> Receipt:
        """Stage what the aggregates recorded."""
        ...


current_unit: ContextVar[Staging | None] = ContextVar("leftfold_unit", default=None)


class Repository(eventsourcing.application.Repository[UUID]):
    """Loads and saves aggregates.

    Inside a dispatch `save` stages; the runtime commits after the handler answered `Ok`. In an
    application that stands alone, without a runtime, `save` writes at once.
    """

    def __init__(
        self,
        event_store: EventStore[UUID],
        snapshot_store: EventStore[UUID] | None,
        write: Callable[..., list[Recording[UUID]]],
    ) -> None:
        """Read from the stores; outside of a dispatch, save by `write`."""
        super().__init__(event_store, snapshot_store=snapshot_store)
        self._write = write

    def load(self, aggregate_type: type[A], aggregate_id: UUID) -> A:
        """Return an aggregate. Raises `AggregateNotFound`."""
        found = self.find(aggregate_type, aggregate_id)
        if found is None:
            raise AggregateNotFound(aggregate_type.__name__, str(aggregate_id))
        return found

    def find(self, aggregate_type: type[A], aggregate_id: UUID) -> A | None:
        """Return an aggregate, or None if it does not exist."""
        unit = current_unit.get()
        if unit is not None:
            return unit.find(aggregate_type, (aggregate_id,))[0]
        return self.find_all(aggregate_type, (aggregate_id,))[0]

    def find_all(self, aggregate_type: type[A], aggregate_ids: Sequence[UUID]) -> list[A | None]:
        """Return aggregates in the order of their ids, read together; None for the absent."""
        unit = current_unit.get()
        if unit is not None:
            return unit.find(aggregate_type, aggregate_ids)
        return [
            project(None, self.event_store.get(aggregate_id))  # type: ignore[arg-type]  # our mapper gives our events
            for aggregate_id in aggregate_ids
        ]

    def save(self, *aggregates: Aggregate) -> Receipt:
        """Save what the aggregates recorded, all or none.

        The receipt is for the handler's answer; the runtime completes its position.
        """
        unit = current_unit.get()
        if unit is not None:
            return unit.save(aggregates)
        versions = tuple((aggregate.id, aggregate.version) for aggregate in aggregates)
        recordings = self._write(*aggregates)
        return Receipt(uuid4(), versions, recordings[-1].notification.id if recordings else 0)


class Service(Application[UUID]):
    """An application service: an eventsourcing `Application` whose methods are handlers.

    A subclass names its aggregates and yields its handlers:

        class Items(Service):
            aggregates = (Item,)

            def handlers(self) -> Iterable[Handling]:
                yield SellStock.handled_by(self.sell)

    A runtime gives it the shared store. Made without one, it is a plain eventsourcing
    application; it reads its settings from the `env` argument and never from the host's
    environment.
    """

    aggregates: ClassVar[tuple[type[Aggregate], ...]] = ()

    def __init__(
        self,
        env: EnvType | None = None,
        *,
        store: InfrastructureFactory[Any] | None = None,  # the library's own type argument
    ) -> None:
        self._store = store
        super().__init__(env)

    def handlers(self) -> Iterable[Handling]:
        """Yield the service's handlers, made by `CommandType.handled_by(method)`."""
        return ()

    @property
    def repository(self) -> Repository:
        """Loads and saves the service's aggregates."""
        return self._staging_repository

    def construct_env(self, name: str, env: EnvType | None = None) -> Environment:
        """Read the class's and the given settings, and not the host's environment."""
        settings = dict(type(self).env)
        if self.is_snapshotting_enabled or self.snapshotting_intervals:
            settings["IS_SNAPSHOTTING_ENABLED"] = "y"
        return Environment(name, {**settings, **(env or {})})

    def construct_factory(self, env: Environment) -> InfrastructureFactory[Any]:
        """Use the runtime's store if there is one."""
        return self._store or super().construct_factory(env)

    def construct_mapper(self) -> Mapper[UUID]:
        """Map the service's aggregates."""
        return self.factory.mapper(
            transcoder=self.construct_transcoder(), mapper_class=EventMapper.of(*self.aggregates)
        )

    def construct_repository(self) -> Repository:
        """Use the repository that knows of dispatches."""
        self._staging_repository = Repository(self.events, self.snapshots, self.save)
        return self._staging_repository

    def save(
        self,
        *objs: MutableOrImmutableAggregate[UUID] | DomainEventProtocol[UUID] | None,
        **kwargs: Any,
    ) -> list[Recording[UUID]]:
        """Save as the library does; inside a dispatch, stage and return nothing."""
        aggregates = [obj for obj in objs if isinstance(obj, Aggregate)]
        if current_unit.get() is not None:
            self.repository.save(*aggregates)
            return []
        if kwargs or len(aggregates) < len(objs):
            return super().save(*objs, **kwargs)
        # As the library does, without its check of each object against a runtime protocol.
        processing: ProcessingEvent[UUID] = ProcessingEvent()
        for aggregate in aggregates:
            processing.events.extend(aggregate.collect_events())
            processing.aggregates[aggregate.id] = aggregate
        recordings = self._record(processing)
        self._take_snapshots(processing)
        self._notify(recordings)
        return recordings

    def close(self) -> None:
        """Close the service, and its store unless a runtime shares that with others."""
        self.closing.set()
        if self._store is None:
            super().close()
