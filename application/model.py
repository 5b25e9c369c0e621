"""The model: everything that a runtime is to run, named in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eventsourcing.application import Application
from eventsourcing.system import System

from leftfold.application.checkpoints import full_name
from leftfold.application.errors import InvalidModelError
from leftfold.application.mapper import EventMapper
from leftfold.application.process import Process
from leftfold.application.projection import Projection
from leftfold.application.reading import QueryService
from leftfold.application.service import Service
from leftfold.application.snapshots import SnapshotPolicy, shape_of
from leftfold.application.subscriber import Subscriber
from leftfold.domain import Aggregate


@dataclass(frozen=True)
class Model:
    """Aggregates, services, projections and query services that belong together.

    Registries are explicit: nothing registers itself when it is imported.
    Raises `InvalidModelError` for parts that do not fit together.
    """

    aggregates: Sequence[type[Aggregate]]
    services: Sequence[type[Service]] = ()
    projections: Sequence[Projection[Any]] = ()
    queries: Sequence[type[QueryService]] = ()
    snapshots: Mapping[type[Aggregate], SnapshotPolicy] = field(default_factory=dict)
    """Where replays may begin; aggregates that are not named are replayed from their beginning."""
    processes: Sequence[type[Process]] = ()
    subscribers: Sequence[Subscriber] = ()

    def __post_init__(self) -> None:
        self._check_aggregates()
        for process in self.processes:
            rows = getattr(process, "projection", None)
            if rows is None:
                raise InvalidModelError(f"{process.__name__} names no projection")
            if rows.inline or rows in self.projections:
                raise InvalidModelError(f"the rows of {process.__name__} are its own")
        self._check_readers()
        self.mapper_class()

    def _check_aggregates(self) -> None:
        for aggregate in self.aggregates:
            if not aggregate.TOPIC:
                raise InvalidModelError(f"{aggregate.__name__} names no topic")
        for service in (*self.services, *self.processes):
            for aggregate in service.aggregates:
                if aggregate not in self.aggregates:
                    raise InvalidModelError(f"{service.__name__}: {aggregate.__name__} is missing")
        for aggregate in self.snapshots:
            if aggregate not in self.aggregates:
                raise InvalidModelError(f"snapshots of {aggregate.__name__}, which is missing")
            try:
                shape_of(aggregate)
            except (NameError, TypeError) as error:  # of annotations
                reason = f"snapshots of {aggregate.__name__}: {error}"
                raise InvalidModelError(reason) from error

    def _check_readers(self) -> None:
        known = {event for aggregate in self.aggregates for event in aggregate.EVENTS}
        names: set[tuple[str, int]] = set()
        for reader in self.readers:
            unknown = [event.__name__ for event in reader.event_types if event not in known]
            if unknown:
                raise InvalidModelError(f"{reader.name} reads unknown events {unknown}")
            if (reader.name, reader.version) in names:
                raise InvalidModelError(f"two are named {full_name(reader.name, reader.version)}")
            names.add((reader.name, reader.version))
        for subscriber in self.subscribers:
            if not set(subscriber.needs) <= set(self.projections):
                raise InvalidModelError(f"{subscriber.name} needs views that are missing")

    @property
    def readers(self) -> tuple[Projection[Any] | Subscriber, ...]:
        """All that read the log: projections, those of processes, subscribers."""
        watched = (process.projection for process in self.processes)
        return (*self.projections, *watched, *self.subscribers)

    @property
    def stored_readers(self) -> tuple[Projection[Any] | Subscriber, ...]:
        """Those of them whose checkpoints are stored."""
        return tuple(r for r in self.readers if isinstance(r, Projection) or not r.everywhere)

    def system(self) -> System:
        """Return the services and processes as the eventsourcing library's system."""
        pipes: list[list[type[Application[Any]]]] = [[service] for service in self.services]
        for process in self.processes:
            watched = set(process.projection.event_types)
            pipes += (
                [leader, process]
                for leader in (*self.services, *self.processes)
                if leader is not process
                and any(watched & set(aggregate.EVENTS) for aggregate in leader.aggregates)
            )
        return System(pipes)

    def graph(self) -> str:
        """Return who reads whose events, as a Mermaid flowchart."""
        lines = ["flowchart LR"]
        writers = [(f"{w.__name__}[{w.__name__}]", w) for w in (*self.services, *self.processes)]
        readers: list[tuple[str, Projection[Any] | Subscriber]] = [
            *((f"{p.table}[({p.table})]", p) for p in self.projections),
            *((f"{p.__name__}", p.projection) for p in self.processes),
            *((f"{s.name}>{s.name}]", s) for s in self.subscribers),
        ]
        for shape, writer in writers:
            own = {event for aggregate in writer.aggregates for event in aggregate.EVENTS}
            lines.append(f"    {shape}")
            lines += (
                f"    {writer.__name__} --> {other}"
                for other, reader in readers
                if own & set(reader.event_types)
            )
        return "\n".join(lines)

    def mapper_class(self) -> type[EventMapper]:
        """Return the mapper of the model's events."""
        return EventMapper.of(*self.aggregates)
