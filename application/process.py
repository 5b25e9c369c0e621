"""Processes: what happens because something has happened, exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import iscoroutinefunction
from typing import Any, ClassVar, TypeVar
from uuid import NAMESPACE_URL, UUID, uuid5

from eventsourcing.application import NotificationLog, ProcessingEvent
from eventsourcing.domain import DomainEventProtocol
from eventsourcing.persistence import Mapper, Tracking
from eventsourcing.system import ProcessApplication

from leftfold.application.errors import InvalidModelError, UnsavedEventsError
from leftfold.application.mapper import EventMapper
from leftfold.application.projection import Projection
from leftfold.application.receipt import Receipt
from leftfold.application.service import NO_COMMAND, Service, current_unit
from leftfold.domain import Aggregate, Event, Metadata, metadata
from leftfold.domain.event import event_id
from leftfold.domain.metadata import NO_METADATA

A = TypeVar("A", bound=Aggregate)

Find = Callable[[type[Any], Sequence[UUID]], list[Any]]


class Process(Service, ProcessApplication[UUID]):
    """A policy: it watches events and records others, as an eventsourcing `ProcessApplication`.

    A subclass names the aggregates that it writes and the projection whose rows it goes by, and
    says what follows from each event:

        class ReorderProcess(Process):
            aggregates = (Reorder,)
            projection = reorder_watch

            def react(self, before, after, event):
                if after.number > (before.number if before else 0):
                    self.repository.save(Reorder.open(after.sku, after.number, ...))

    A runtime keeps the rows, the position in the log and the new events in one transaction, so
    that each event is reacted to exactly once, whatever crashes. A process that is new to a log
    reacts to all that is in it; a new version of its projection, to all that no version of that
    name has recorded something for. Under the library's own runners the rows are kept in the
    process's memory, and folded anew when it begins to follow.
    """

    projection: ClassVar[Projection[Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not hasattr(self, "projection"):
            raise InvalidModelError(f"{type(self).__name__} names no projection")
        if iscoroutinefunction(self.react):
            raise InvalidModelError(f"{type(self).__name__} reacts in a thread, and cannot await")
        super().__init__(*args, **kwargs)
        self.topics = self.projection.topics
        self._rows: dict[str, Any] = {}
        self._folded: dict[str, Any] = {}

    def react(self, before: Any, after: Any, event: Event) -> None:
        """Record what follows from an event: load and save aggregates of `self.repository`.

        `before` and `after` are the row that it changed; `None` if there is none.
        """

    def construct_mapper(self) -> Mapper[UUID]:
        """Map what the process writes and what it watches."""
        mapper_class = EventMapper.of(*self.aggregates, also=self.projection.event_types)
        return self.factory.mapper(
            transcoder=self.construct_transcoder(), mapper_class=mapper_class
        )

    def follow(self, name: str, log: NotificationLog) -> None:
        """Follow an application under one of the library's runners.

        What it was told of before is folded again, and not reacted to.
        """
        super().follow(name, log)
        seen = self.recorder.max_tracking_id(name)
        for notifications in self.pull_notifications(name, None, seen) if seen else ():
            told = self.filter_received_notifications(notifications)
            events: list[Any] = [event for event, _ in self.convert_notifications(name, told)]
            self._rows |= self.projection.fold(events, self._load)

    def policy(  # pyright: ignore[reportIncompatibleVariableOverride]  # the library dispatches it
        self, domain_event: DomainEventProtocol[UUID], processing_event: ProcessingEvent[UUID]
    ) -> None:
        """React to an event under one of the library's runners."""
        event: Any = domain_event  # our mapper gives our events
        reactions = Reactions(self, self.repository.find_all)
        with reactions.made():
            self._folded = self.projection.fold([event], self._load, reactions.react)
        processing_event.collect_events(*reactions.events)

    def process_event(self, domain_event: DomainEventProtocol[UUID], tracking: Tracking) -> None:
        """React to an event, and record what follows."""
        super().process_event(domain_event, tracking)
        self._rows |= self._folded  # only now: what was not recorded is told again

    def _load(self, keys: set[str]) -> dict[str, Any]:
        return {key: self._rows[key] for key in keys if self._rows.get(key) is not None}


class Reactions:
    """What a process loads and records while it looks at some events."""

    sealed = False

    def __init__(self, process: Process, find: Find) -> None:
        """Gather what a process does; `find` reads aggregates."""
        self._process = process
        self._find = find
        self._found: dict[UUID, Aggregate | None] = {}
        self._used: list[Aggregate | None] = []
        self._begun: dict[UUID, int] = {}
        self._command_id = NO_COMMAND
        self._namespace = uuid5(NAMESPACE_URL, f"leftfold:process:{process.projection.name}")
        self.saved: dict[UUID, list[Event]] = {}
        """By the ids of the commands that the reactions stand for."""

    @property
    def events(self) -> list[Event]:
        """All that was recorded, in order."""
        return [event for events in self.saved.values() for event in events]

    def based_on(self) -> dict[UUID, int]:
        """Return the versions of what was looked at and not changed; 0: absent."""
        changed = {event.originator_id for event in self.events}
        return {i: version for i, version in self._begun.items() if i not in changed}

    @contextmanager
    def made(self) -> Iterator[None]:
        """Let repositories load and save here."""
        token = current_unit.set(self)
        outer = metadata.use(NO_METADATA)
        try:
            yield
        finally:
            metadata.restore(outer)
            current_unit.reset(token)

    def command_id(self, event: Event) -> UUID:
        """Return the id of the command that the reaction to an event stands for."""
        return uuid5(self._namespace, f"{event.originator_id}:{event.originator_version}")

    def react(self, before: Any, after: Any, event: Event) -> None:
        """Let the process react to an event, which is the cause of what it records.

        Raises what the process does, and `UnsavedEventsError`.
        """
        self._command_id = self.command_id(event)
        known = event.metadata
        cause = str(event_id(event))
        correlation = known.correlation_id or cause
        metadata.use(Metadata(correlation, cause, known.user))
        self._used = []
        self._process.react(before, after, event)
        if any(aggregate is not None and aggregate.unsaved for aggregate in self._used):
            raise UnsavedEventsError(type(self._process).__name__)

    def find(self, aggregate_type: type[A], aggregate_ids: Sequence[UUID]) -> list[A | None]:
        """Return aggregates, as they are after the reactions up to now."""
        missing = [i for i in aggregate_ids if i not in self._found]
        if missing:
            token = current_unit.set(None)
            try:
                read = self._find(aggregate_type, missing)
            finally:
                current_unit.reset(token)
            for aggregate_id, aggregate in zip(missing, read, strict=True):
                self._found[aggregate_id] = aggregate
                self._begun[aggregate_id] = 0 if aggregate is None else aggregate.version
        found: list[Any] = [self._found[i] for i in aggregate_ids]
        self._used += found
        return found

    def save(self, aggregates: Iterable[Aggregate]) -> Receipt:
        """Stage what aggregates recorded."""
        aggregates = tuple(aggregates)
        saved = self.saved.setdefault(self._command_id, [])
        for aggregate in aggregates:
            saved += aggregate.collect_events()
            self._found[aggregate.id] = aggregate
        versions = tuple((aggregate.id, aggregate.version) for aggregate in aggregates)
        return Receipt(self._command_id, versions, 0)
