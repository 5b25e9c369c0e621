"""What the stores on databases share: forms of ids and rows, and the library's notifications."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import Notification, StoredEvent

from leftfold.application import Projection
from leftfold.application.checkpoints import Change
from leftfold.application.errors import NotUnique
from leftfold.application.ports import EncodedEvent, Failed, Group, LoggedEvent, Stale, Verdict
from leftfold.domain.personal import Keys
from leftfold.infrastructure.platform import collector_paused
from leftfold.infrastructure.tables import Encoded, ViewTable, index_name

R = TypeVar("R")

SCHEMA_VERSION = 3
MAX_VERSION = 2**62


class Run(NamedTuple):
    """Groups of one call that have nothing to do with each other: each is judged by the store."""

    groups: list[Group]
    bases: list[dict[int, int]]
    """Of each group: the version that an aggregate must be at, by the number of its id."""


def halves(run: Run) -> tuple[Run, Run]:
    """Part a run in two."""
    middle = len(run.groups) // 2
    return (
        Run(run.groups[:middle], run.bases[:middle]),
        Run(run.groups[middle:], run.bases[middle:]),
    )


def commit_in_runs(groups: Sequence[Group], write: Callable[[Run], list[Verdict]]) -> list[Verdict]:
    """Write groups run by run; where something in a run is refused, find it by halves."""
    verdicts: list[Verdict] = []
    for run in runs(groups):
        verdicts += (Stale(),) if run is None else _isolated(run, write)
    return verdicts


def _isolated(run: Run, write: Callable[[Run], list[Verdict]]) -> list[Verdict]:
    verdicts = write(run)
    if len(run.groups) > 1 and is_refused(verdicts):
        return [v for half in halves(run) for v in _isolated(half, write)]
    return verdicts


def is_refused(verdicts: Sequence[Verdict]) -> bool:
    """Tell whether the database refused what was written, and not just its moment."""
    return any(isinstance(verdict, Failed) and verdict.is_refusal for verdict in verdicts)


def runs(groups: Sequence[Group]) -> Iterator[Run | None]:
    """Part groups, in their order, into runs; None stands for a group that contradicts itself.

    A group is in another run than what it rests on, and than a repetition of its commands: that
    happens where a caller has gone away and what it asked for is still to be written.
    """
    run, written, commands = Run([], []), set[int](), set[UUID]()
    for group in groups:
        bases, ends = _bases(group)
        ids = [save.command_id for save in group.saves]
        is_apart = bases is None or not (written.isdisjoint(bases) and commands.isdisjoint(ids))
        if run.groups and is_apart:
            yield run
            run, written, commands = Run([], []), set(), set()
        if bases is None:
            yield None
            continue
        run.groups.append(group)
        run.bases.append(bases)
        written.update(ends)
        commands.update(ids)
    if run.groups:
        yield run


def _bases(group: Group) -> tuple[dict[int, int] | None, dict[int, int]]:
    """Return the versions that a group rests on, and those that it leaves; None if they clash."""
    bases = {aggregate_id.int: version for aggregate_id, version in group.based_on}
    ends: dict[int, int] = {}
    for save in group.saves:
        for aggregate_id, version, _, _ in save.events:
            number = aggregate_id.int
            if ends.get(number, bases.get(number, version - 1)) != version - 1:
                return None, ends
            bases.setdefault(number, version - 1)
            ends[number] = version
    return bases, ends


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

    def __init__(self, keys: Keys | None, *, may_define: bool) -> None:
        self._keys = keys
        self._may_define = may_define
        self._tables: dict[str, ViewTable[Any]] = {}

    def table(self, projection: Projection[R]) -> ViewTable[R]:
        table = self._tables.get(projection.table)
        if table is None or table.projection is not projection:
            table = ViewTable(projection, self.dialect, self._keys)
            self._tables[projection.table] = table
        return table

    def encode(self, changes: Sequence[Change]) -> list[Encoded]:
        """Encode the rows of a page, before any lock is taken; those that views share, once."""
        shared: dict[tuple[int, type], Encoded] = {}
        found: list[Encoded] = []
        for change in changes:
            reader, encoded = change.reader, Encoded()
            if isinstance(reader, Projection) and change.rows:
                same = (id(change.rows), reader.row)
                with collector_paused():
                    encoded = self.table(reader).encode(change.rows, shared.get(same))
                shared[same] = encoded
            found.append(encoded)
        return found

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


def not_unique(projection: Projection[Any], name: str) -> NotUnique | None:
    """Return the refusal that the name of a violated index or its columns stands for."""
    for columns in projection.unique:
        listed = ", ".join(f"{projection.table}.{column}" for column in columns)
        if name in (listed, index_name(projection, columns, "unique")):
            return NotUnique(projection.name, columns)
    return None
