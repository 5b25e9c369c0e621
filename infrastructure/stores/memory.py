"""The store in memory: for tests and exploration, and the reference of the contract suite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple
from itertools import islice, takewhile
from typing import Any, TypeVar
from uuid import UUID

from eventsourcing.persistence import StoredEvent
from eventsourcing.popo import POPOProcessRecorder

from leftfold.application import InvalidModelError, Projection
from leftfold.application.checkpoints import Change, Checkpoint, Comparison, DeadLetter, Reader
from leftfold.application.errors import NotUnique
from leftfold.application.ports import (
    NOTHING,
    REACTION,
    Committed,
    EncodedEvent,
    Group,
    Heard,
    Inline,
    LoggedEvent,
    Order,
    RecordedCommand,
    Repeated,
    Seek,
    Stale,
    StoredSnapshot,
    Verdict,
)
from leftfold.domain import ALWAYS, LeftfoldError, Specification
from leftfold.domain.personal import Keys
from leftfold.domain.specification.values import plain
from leftfold.infrastructure.platform import monotonic
from leftfold.infrastructure.rows import RowShape, columns_of, describe
from leftfold.infrastructure.stores.common import ABSENT, check_unchanged, is_written, refused

R = TypeVar("R")


class MemoryLog(POPOProcessRecorder):
    """The log and the recorder of the library, on one list of events."""

    is_local = True

    def __init__(self) -> None:
        super().__init__()
        self.inline: Callable[[], None] = _nothing
        self._commands: dict[UUID, RecordedCommand] = {}
        self._recorded: dict[UUID, float] = {}  # oldest first
        self._kept: dict[UUID, StoredSnapshot] = {}

    def commit(self, groups: Sequence[Group]) -> list[Verdict]:
        with self._database_lock:
            verdicts = [self._commit(group) for group in groups]
        self._notify_listeners()
        return verdicts

    def _commit(self, group: Group) -> Verdict:
        """Write a group, and what inline views make of it; all or nothing."""
        begun = len(self._stored_events)
        verdict = self._append(group)
        if isinstance(verdict, Committed):
            try:
                self.inline()
            except LeftfoldError as error:
                self._take_back(group, begun)
                return refused(error)
            except BaseException:
                self._take_back(group, begun)
                raise
        return verdict

    def _take_back(self, group: Group, begun: int) -> None:
        for event in self._stored_events[begun:]:
            del self._stored_events_index[str(event.originator_id)][event.originator_version]
        del self._stored_events[begun:]
        for save in group.saves:
            self._recorded.pop(save.command_id, None)
            del self._commands[save.command_id]

    def _append(self, group: Group) -> Verdict:
        index, events = self._stored_events_index, self._stored_events
        for aggregate_id, version in group.based_on:
            if len(index.get(str(aggregate_id), ())) != version:
                return Stale()
        streams: list[dict[int, int]] = []
        ends: dict[str, int] = {}
        for save in group.saves:
            if save.command_id in self._commands:
                return Repeated()
            for aggregate_id, version, _, _ in save.events:
                key = str(aggregate_id)
                stream = index[key]
                if version != ends.get(key, len(stream)) + 1:
                    return Stale()
                ends[key] = version
                streams.append(stream)
        stream_of, now = iter(streams), monotonic()
        positions: list[int] = []
        for save in group.saves:
            for event in save.events:
                next(stream_of)[event.version] = len(events)
                events.append(StoredEvent(*event))
            position = len(events) if save.events else 0
            positions.append(position)
            if not save.command.startswith(REACTION):
                self._recorded[save.command_id] = now
            self._commands[save.command_id] = RecordedCommand(
                save.command_id, save.command, save.aggregates, position, save.answer
            )
        return Committed(tuple(positions))

    def select_events(
        self,
        originator_id: UUID | str,
        *,
        gt: int | None = None,
        lte: int | None = None,
        desc: bool = False,
        limit: int | None = None,
    ) -> list[StoredEvent]:
        with self._database_lock:
            events, index = self._stored_events, self._stored_events_index
            stream = [events[at] for at in index.get(str(originator_id), {}).values()]
        chosen = stream[gt or 0 : lte]  # versions begin at 1 and have no gaps
        if desc:
            chosen.reverse()
        return chosen[:limit]

    def streams(
        self, aggregate_ids: Sequence[UUID], after: Mapping[UUID, int] = NOTHING
    ) -> dict[UUID, list[EncodedEvent]]:
        with self._database_lock:
            events, index = self._stored_events, self._stored_events_index
            return {
                i: [
                    _encoded(i, events[at])
                    for at in islice(index.get(str(i), {}).values(), after.get(i, 0), None)
                ]
                for i in aggregate_ids
            }

    def versions(self, aggregate_ids: Sequence[UUID]) -> dict[UUID, int]:
        with self._database_lock:
            index = self._stored_events_index
            return {i: len(index[str(i)]) for i in aggregate_ids if index.get(str(i))}

    def commands(self, command_ids: Iterable[UUID]) -> dict[UUID, RecordedCommand]:
        with self._database_lock:
            return {i: self._commands[i] for i in command_ids if i in self._commands}

    def snapshots(self, aggregate_ids: Sequence[UUID]) -> list[StoredSnapshot]:
        return [self._kept[i] for i in aggregate_ids if i in self._kept]

    def keep_snapshots(self, snapshots: Sequence[StoredSnapshot]) -> None:
        with self._database_lock:
            for snapshot in snapshots:
                kept = self._kept.get(snapshot.aggregate_id)
                if kept is None or kept.shape != snapshot.shape or kept.version < snapshot.version:
                    self._kept[snapshot.aggregate_id] = snapshot

    def purge(self, older_than: float, limit: int) -> int:
        latest = monotonic() - older_than
        with self._database_lock:
            oldest = islice(self._recorded.items(), limit)
            old = list(takewhile(lambda recorded: recorded[1] < latest, oldest))
            for command_id, _ in old:
                del self._recorded[command_id], self._commands[command_id]
        return len(old)

    def read(self, after: int, limit: int, topics: Sequence[str] = ()) -> list[LoggedEvent]:
        wanted = frozenset(topics)
        found: list[LoggedEvent] = []
        with self._database_lock:
            events = self._stored_events
            for at in range(after, len(events)):
                event = events[at]
                if not wanted or event.topic in wanted:
                    aggregate_id = event.originator_id
                    assert isinstance(aggregate_id, UUID)  # noqa: S101 - our mapper's
                    found.append(
                        LoggedEvent(
                            at + 1, aggregate_id, event.originator_version, event.topic, event.state
                        )
                    )
                    if len(found) == limit:
                        break
        return found

    def topics(self) -> frozenset[str]:
        with self._database_lock:
            return frozenset(event.topic for event in self._stored_events)

    def head(self) -> int:
        return len(self._stored_events)

    def locked(self) -> AbstractContextManager[object]:
        """Let nobody else write meanwhile."""
        return self._database_lock


def _encoded(aggregate_id: UUID, event: StoredEvent) -> EncodedEvent:
    return EncodedEvent(aggregate_id, event.originator_version, event.topic, event.state)


class MemoryViews:
    """Views as dictionaries."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self._rows: dict[str, dict[str, Any]] = {}
        self._checkpoints: dict[tuple[str, int], Checkpoint] = {}
        self._leases: dict[tuple[str, int], float] = {}
        self._failures: dict[tuple[str, int], tuple[int, str]] = {}
        """Why readers stopped, and in which epoch."""
        self._letters: dict[tuple[str, int], dict[tuple[int, str], DeadLetter]] = {}
        self._shapes: dict[str, RowShape[Any]] = {}
        self._defined: dict[tuple[str, int], tuple[str, str]] = {}
        self._projections: dict[tuple[str, int], Projection[Any]] = {}

    def _shape(self, projection: Projection[R]) -> RowShape[R]:
        if projection.table not in self._shapes:
            self._shapes[projection.table] = RowShape(projection)
        return self._shapes[projection.table]

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Take back what the block writes if it raises."""
        kept = dict(self._rows), dict(self._checkpoints), dict(self._letters)
        try:
            yield
        except BaseException:
            self._rows, self._checkpoints, self._letters = kept
            raise

    def checkpoints(self, readers: Sequence[Reader]) -> list[Checkpoint]:
        with self._log.locked():
            return [self._checkpoint(_id(reader)) for reader in readers]

    def _checkpoint(self, reader_id: tuple[str, int]) -> Checkpoint:
        found = self._checkpoints.get(reader_id, ABSENT)
        epoch, failure = self._failures.get(reader_id, (found.epoch, ""))
        return found._replace(
            is_held=self._is_held(reader_id),
            dead_letters=len(self._letters.get(reader_id, ())),
            failure=failure if epoch == found.epoch else "",
        )

    def hold(self, readers: Sequence[Reader], owner: str, seconds: float) -> list[Checkpoint]:
        with self._log.locked():
            for reader, found in zip(readers, self.checkpoints(readers), strict=True):
                if _id(reader) in self._checkpoints and (found.owner == owner or not found.is_held):
                    epoch = found.epoch + (found.owner != owner)
                    held = found._replace(owner=owner, epoch=epoch)
                    self._checkpoints[_id(reader)] = held
                    self._leases[_id(reader)] = monotonic() + seconds
            return self.checkpoints(readers)

    def release(self, owner: str) -> None:
        with self._log.locked():
            for reader_id, found in self._checkpoints.items():
                if found.owner == owner:
                    self._checkpoints[reader_id] = found._replace(owner="")
                    del self._leases[reader_id]

    def halt(self, reader: Reader, at: Checkpoint, failure: str) -> None:
        with self._log.locked():
            (found,) = self.checkpoints([reader])
            if (found.position, found.epoch) == (at.position, at.epoch):
                self._failures[_id(reader)] = at.epoch, failure

    def _is_held(self, reader_id: tuple[str, int]) -> bool:
        return self._leases.get(reader_id, 0.0) > monotonic()

    def define(self, reader: Reader) -> None:
        with self._log.locked():
            columns = describe(columns_of(reader)) if isinstance(reader, Projection) else ""
            found = self._defined.setdefault(_id(reader), (columns, reader.reads))
            check_unchanged(reader, columns, found)
            if isinstance(reader, Projection):
                self._projections[_id(reader)] = reader
            if _id(reader) not in self._checkpoints:
                head = self._log.head()
                begin = head if reader.begins_now else 0
                self._checkpoints[_id(reader)] = Checkpoint(begin, is_built=begin == head)

    def drop(self, reader: Reader) -> None:
        with self._log.locked():
            for kept in (self._checkpoints, self._leases, self._letters, self._defined):
                kept.pop(_id(reader), None)
            self._failures.pop(_id(reader), None)
            if isinstance(reader, Projection):
                self._projections.pop(_id(reader), None)
                self._rows.pop(reader.table, None)
                self._shapes.pop(reader.table, None)

    def versions(self, name: str) -> dict[int, bool]:
        with self._log.locked():
            return {v: self._is_held((n, v)) for n, v in self._checkpoints if n == name}

    def before(self, projection: Projection[Any]) -> Projection[Any] | None:
        with self._log.locked():
            earlier = (v for v in self.versions(projection.name) if 0 < v < projection.version)
            other = self._projections.get((projection.name, max(earlier, default=0)))
        columns = describe(columns_of(projection))
        return other if other is not None and describe(columns_of(other)) == columns else None

    def compare(self, projection: Projection[Any], other: Projection[Any]) -> Comparison | None:
        with self._log.locked():
            one, two = self.checkpoints([projection, other])
            if one.position != two.position:
                return None
            mine, theirs = self._rows.get(projection.table, {}), self._rows.get(other.table, {})
            shared = mine.keys() & theirs.keys()
            same = sum(
                astuple(mine[key]) == astuple(theirs[key])
                and projection.shows(mine[key]) == other.shows(theirs[key])
                for key in shared
            )
            removed = len(theirs) - len(shared)
            return Comparison(same, len(shared) - same, len(mine) - len(shared), removed)

    def take_over(self, projection: Projection[Any], anew: Projection[Any]) -> Comparison | None:
        with self._log.locked():
            compared = self.compare(anew, projection)
            if compared is not None:
                self._rows[projection.table] = self._rows.get(anew.table, {})
                self._letters[_id(projection)] = self._letters.get(_id(anew), {})
                at = self._checkpoints[_id(projection)]
                self._checkpoints[_id(projection)] = at._replace(epoch=at.epoch + 1)
                self.drop(anew)
        return compared

    def dead_letters(self, reader: Reader) -> list[DeadLetter]:
        letters = self._letters.get(_id(reader), {})
        return [letters[at] for at in sorted(letters)]

    def parked(
        self, reader: Reader, positions: Iterable[int], versions: Iterable[tuple[UUID, int]]
    ) -> int | None:
        at, of = set(positions), set(versions)
        letters = self._letters.get(_id(reader), {}).values()
        found = (x for x in letters if x.position in at or (x.aggregate_id, x.version) in of)
        return min((letter.position for letter in found), default=None)

    def load(self, projection: Projection[R], keys: Sequence[str]) -> dict[str, R]:
        rows: dict[str, R] = self._rows.get(projection.table, {})
        return {key: rows[key] for key in keys if key in rows}

    def write(
        self,
        changes: Sequence[Change],
        position: int,
        *,
        group: Group | None = None,
        is_built: bool = False,
        is_fence: bool = False,
    ) -> bool:
        tables: dict[str, dict[str, Any]] = {}
        for change in changes:
            if isinstance(change.reader, Projection):
                tables[change.reader.table] = self._changed(change.reader, change.rows)
        with self._log.locked():
            found = self.checkpoints([change.reader for change in changes])
            for change, now in zip(changes, found, strict=True):
                if (now.position, now.epoch) != (
                    change.checkpoint.position,
                    change.checkpoint.epoch,
                ):
                    return False
            if group is not None and not is_written(self._log.commit([group])[0]):
                return False
            self._rows.update(tables)
            for change, now in zip(changes, found, strict=True):
                self._checkpoints[_id(change.reader)] = now._replace(
                    position=position,
                    epoch=now.epoch + is_fence,
                    is_built=now.is_built or is_built,
                )
                letters = self._letters.setdefault(_id(change.reader), {})
                for letter in change.released:
                    letters.pop((letter.position, letter.key), None)
                letters.update({(letter.position, letter.key): letter for letter in change.parked})
        return True

    def _changed(self, projection: Projection[R], rows: Mapping[str, Any]) -> dict[str, Any]:
        """Return the table with these rows: a new one, so that readers see all of a page or none.

        Raises what a database would.
        """
        shape = self._shape(projection)
        for key, changed in rows.items():
            if changed is not None:
                shape.encode(key, changed)  # refuses what no database could keep
                projection.shows(changed)
        table = {**self._rows.get(projection.table, {}), **rows}
        kept = {key: row for key, row in table.items() if row is not None}
        for columns in projection.unique:
            seen = set[tuple[object, ...]]()
            for row in kept.values():
                values = tuple(getattr(row, name) for name in columns)
                if None not in values and values in seen:
                    raise NotUnique(projection.name, columns)
                seen.add(values)
        return kept

    def get(self, projection: Projection[R], key: str) -> R | None:
        row: R | None = self._rows.get(projection.table, {}).get(key)
        return row if row is not None and projection.shows(row) else None

    def select(
        self,
        projection: Projection[R],
        order: Order | None,
        limit: int | None,
        seek: Seek | None = None,
        where: Specification[Any] = ALWAYS,
    ) -> list[tuple[str, R]]:
        rows = self._rows.get(projection.table, {}).items()
        is_wanted = where.is_satisfied_by
        shown = sorted((key, row) for key, row in rows if projection.shows(row) and is_wanted(row))
        if order is None:
            return shown[:limit]

        def rank(value: Any) -> tuple[bool, Any]:
            return value is not None, plain(value)

        def value_of(entry: tuple[str, R]) -> tuple[bool, Any]:
            return rank(getattr(entry[1], order.column))

        shown.sort(key=value_of, reverse=order.descending)  # stable: ties stay by key
        if seek is not None:
            self._shape(projection).sought(order, seek)  # refuses what no database could look for
            stop = rank(seek.value)
            shown = [
                entry
                for entry in shown
                if (value_of(entry) == stop and entry[0] > seek.key)
                or (value_of(entry) < stop if order.descending else value_of(entry) > stop)
            ]
        return shown[:limit]

    def count(self, projection: Projection[Any], where: Specification[Any] = ALWAYS) -> int:
        return len(self.select(projection, None, None, None, where))


def _id(reader: Reader) -> tuple[str, int]:
    return reader.name, reader.version


def _nothing() -> None:
    """There are no inline views."""


class MemoryStore:
    """All of it in this process; gone when the store is closed."""

    name = "memory:"
    hints = False

    def __init__(self) -> None:
        self.log = MemoryLog()
        self.views = MemoryViews(self.log)

    def open(
        self,
        readers: Sequence[Reader],
        *,
        create_tables: bool,  # noqa: ARG002 - there are none
        keys: Keys | None = None,  # noqa: ARG002 - rows are kept as they are
        inline: Inline | None = None,
    ) -> None:
        """Check the row types: there are no tables to make. Raises `InvalidModelError`."""
        for reader in readers:
            self.views.define(reader)
            if isinstance(reader, Projection):
                RowShape(reader)
                if reader.writes is not None:
                    raise InvalidModelError(
                        f"{reader.name}: the store in memory runs no statements"
                    )
        if inline is not None:

            def fold() -> None:
                with self.views.all_or_nothing():
                    inline(self.log, self.views)

            self.log.inline = fold

    def close(self) -> None:
        """Nothing to close."""

    def listen(self) -> None:
        """No other process writes: there is nothing to hear."""

    def heard(self) -> Heard:
        return Heard.NOTHING

    def committing(self) -> None:
        """Commit by `log.commit` only."""

    def cut(self, seconds: float) -> None:
        """Cut nothing: nothing blocks."""

    def has_changed(self) -> bool:
        return False
