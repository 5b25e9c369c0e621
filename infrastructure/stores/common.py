"""What the stores on databases share: forms of ids and rows, and the library's notifications."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import Notification, StoredEvent

from leftfold.application import Projection
from leftfold.application.ports import EncodedEvent, LoggedEvent
from leftfold.domain.personal import Keys
from leftfold.infrastructure.tables import ViewTable

R = TypeVar("R")

SCHEMA_VERSION = 2
MAX_VERSION = 2**62


class Notifying:
    """The library's notifications, from the log's own reading."""

    @abstractmethod
    def read(self, after: int, limit: int, topics: Sequence[str] = ()) -> list[LoggedEvent]: ...

    def select_notifications(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
    ) -> list[Notification]:
        after = 0 if start is None else start - 1 if inclusive_of_start else start
        return [
            Notification(
                event.aggregate_id, event.version, event.topic, event.state, event.position
            )
            for event in self.read(after, limit, topics)
            if stop is None or event.position <= stop
        ]


class Tables:
    """The tables of projections on one kind of database."""

    dialect: ClassVar[sa.Dialect]

    def __init__(self, keys: Keys | None) -> None:
        self._keys = keys
        self._tables: dict[str, ViewTable[Any]] = {}

    def table(self, projection: Projection[R]) -> ViewTable[R]:
        if projection.table not in self._tables:
            self._tables[projection.table] = ViewTable(projection, self.dialect, self._keys)
        return self._tables[projection.table]

    @abstractmethod
    def load(self, projection: Projection[R], keys: Sequence[str]) -> dict[str, R]: ...

    def get(self, projection: Projection[R], key: str) -> R | None:
        row = self.load(projection, (key,)).get(key)
        return row if row is not None and projection.shows(row) else None


def as_uuid(aggregate_id: UUID | str) -> UUID:
    """Return the id; the library allows text."""
    return aggregate_id if isinstance(aggregate_id, UUID) else UUID(aggregate_id)


def encoded(events: Sequence[StoredEvent]) -> list[EncodedEvent]:
    """Return the library's events as the log takes them in."""
    return [
        EncodedEvent(as_uuid(e.originator_id), e.originator_version, e.topic, e.state)
        for e in events
    ]


def dump_aggregates(aggregates: Sequence[tuple[UUID, int]]) -> str:
    """Return aggregates and their versions as a command's row keeps them."""
    pairs = ",".join([f'["{i.hex}",{version}]' for i, version in aggregates])
    return f"[{pairs}]"


def load_aggregates(text: str) -> tuple[tuple[UUID, int], ...]:
    """Return the aggregates of a command's row."""
    return tuple((UUID(i), version) for i, version in json.loads(text))
