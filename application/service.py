"""Services: eventsourcing applications whose methods handle commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, TypeVar
from uuid import UUID, uuid4

import eventsourcing.application
from eventsourcing.application import Application, ProcessingEvent
from eventsourcing.domain import DomainEventProtocol, MutableOrImmutableAggregate
from eventsourcing.persistence import EventStore, InfrastructureFactory, Mapper, Recording
from eventsourcing.utils import Environment, EnvType

from leftfold.application.errors import DispatchOverError
from leftfold.application.mapper import EventMapper
from leftfold.application.messages import Handling
from leftfold.application.receipt import Receipt
from leftfold.domain import Aggregate, AggregateNotFound, Event, project

A = TypeVar("A", bound=Aggregate)


class NotInMemory(BaseException):
    """A handler asked for aggregates that must be read first; the attempt is made again.

    Not an `Exception`, so that no handler catches it by accident.
    """

    def __init__(self, wanted: Mapping[UUID, type[Aggregate]]) -> None:
        super().__init__(wanted)
        self.wanted = wanted


class Unit:
    """What one dispatch has in hand and what it staged; committed by the runtime, or dropped.

    `taken` are the aggregates that no other dispatch may use meanwhile; `based_on` the versions
    of those that were in memory, and so may be older than the store's. It `is_sound` once its
    aggregates are known to be as the store has them, so that they may stay in memory.
    """

    __slots__ = (
        "based_on",
        "command_id",
        "events",
        "is_sound",
        "loaded",
        "sealed",
        "taken",
        "used",
        "versions",
    )

    def __init__(self) -> None:
        self.loaded: dict[UUID, Aggregate | None] = {}
        self.events: list[Event] = []
        self.versions: dict[UUID, int] = {}
        self.used: list[Aggregate | None] = []
        self.command_id = UUID(int=0)
        self.taken: list[UUID] = []
        self.based_on: dict[UUID, int] = {}
        self.is_sound = False
        self.sealed: dict[UUID, int] | None = None

    def find(self, aggregate_type: type[A], aggregate_ids: Sequence[UUID]) -> list[A | None]:
        """Return aggregates in hand. Raises `NotInMemory`."""
        if self.sealed is not None:
            raise DispatchOverError
        loaded = self.loaded
        try:
            found: list[Any] = [loaded[aggregate_id] for aggregate_id in aggregate_ids]
        except KeyError:
            raise NotInMemory(
                {i: aggregate_type for i in aggregate_ids if i not in loaded}
            ) from None
        self.used += found
        return found

    def save(self, aggregates: Iterable[Aggregate]) -> Receipt:
        """Stage what the aggregates recorded."""
        if self.sealed is not None:
            raise DispatchOverError
        for aggregate in aggregates:
            self.events.extend(aggregate._pending_events)  # type: ignore[arg-type]  # typed by the library as its own base class
            aggregate._pending_events.clear()
            self.versions[aggregate.id] = aggregate.version
            self.loaded[aggregate.id] = aggregate
        return Receipt(self.command_id, tuple(self.versions.items()), 0)

    def begin_command(self, command_id: UUID) -> None:
        """Stage what follows for this command."""
        self.command_id = command_id
        self.versions = {}
        self.used = []

    def seal(self) -> None:
        """Take no more: what a task of the handler does from now on would be lost."""
        if self.sealed is None:
            self.sealed = {i: a.version for i, a in self.loaded.items() if a is not None}

    def keep(self, aggregate_id: UUID) -> Aggregate | None:
        """Return an aggregate that may stay in memory: as it was when the unit was sealed."""
        aggregate = self.loaded.get(aggregate_id)
        if not self.is_sound or aggregate is None or self.sealed is None:
            return None
        is_as_sealed = self.sealed.get(aggregate_id) == aggregate.version
        return aggregate if is_as_sealed and not aggregate._pending_events else None

    @property
    def is_changed(self) -> bool:
        """An aggregate that the command uses has events that are not saved."""
        return any(a is not None and a._pending_events for a in self.used)


current_unit: ContextVar[Unit | None] = ContextVar("leftfold_unit", default=None)


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
        repository = self._repository
        assert isinstance(repository, Repository)  # noqa: S101 - construct_repository made it
        return repository

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
        return Repository(self.events, self.snapshots, self.save)

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
