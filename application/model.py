"""The model: everything that a runtime is to run, named in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from leftfold.application.errors import InvalidModelError
from leftfold.application.mapper import EventMapper
from leftfold.application.projection import Projection
from leftfold.application.reading import QueryService
from leftfold.application.service import Service
from leftfold.application.snapshots import SnapshotPolicy
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

    def __post_init__(self) -> None:
        known = {event for aggregate in self.aggregates for event in aggregate.EVENTS}
        for service in self.services:
            for aggregate in service.aggregates:
                if aggregate not in self.aggregates:
                    raise InvalidModelError(f"{service.__name__}: {aggregate.__name__} is missing")
        for aggregate in self.snapshots:
            if aggregate not in self.aggregates:
                raise InvalidModelError(f"snapshots of {aggregate.__name__}, which is missing")
        tables: set[str] = set()
        for projection in self.projections:
            unknown = [event.__name__ for event in projection.event_types if event not in known]
            if unknown:
                raise InvalidModelError(f"{projection.name} reads unknown events {unknown}")
            if projection.table in tables:
                raise InvalidModelError(f"two projections are named {projection.table}")
            tables.add(projection.table)
        self.mapper_class()

    def mapper_class(self) -> type[EventMapper]:
        """Return the mapper of the model's events."""
        return EventMapper.of(*self.aggregates)
