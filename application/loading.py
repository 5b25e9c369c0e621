"""Reading aggregates: from what is known of them, or from the beginning; keeping snapshots."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias
from uuid import UUID

from eventsourcing.persistence import PersistenceError

from leftfold.application.errors import EventStoreUnavailable, UnreadableEventError
from leftfold.application.mapper import EventMapper
from leftfold.application.memory import Hand
from leftfold.application.ports import Access, Log, Platform, StoredSnapshot
from leftfold.application.snapshots import SnapshotPolicy, shape_of
from leftfold.domain import Aggregate, Event, LeftfoldError, project

Behind: TypeAlias = dict[UUID, tuple[type[Aggregate], Aggregate | None]]
"""What is to be read, and what is known of it: None, or an older state."""

_log = logging.getLogger("leftfold.loading")


class Loading:
    """Reads what dispatches miss, and keeps beside them what would be dear to read again."""

    def __init__(
        self,
        log: Log,
        mapper: EventMapper,
        platform: Platform,
        access: Access,
        policies: Mapping[type[Aggregate], SnapshotPolicy],
    ) -> None:
        """Read from a log, which `access` asks; keep snapshots as the policies say."""
        self._log = log
        self._mapper = mapper
        self._platform = platform
        self._access = access
        self._policies = policies
        self._keeping = 0  # batches of snapshots that are being kept

    async def load(self, behind: Behind) -> dict[UUID, Aggregate | None]:
        """Return aggregates as the store has them; None for one that is absent.

        Raises `EventStoreUnavailable`, `UnknownTopicError`, `UnreadableEventError`.
        """
        loaded, due = await self._access.read(self._load, behind)
        self._keep_soon(due)
        return loaded

    def keep_due(self, hands: Iterable[Hand]) -> None:
        """Keep the aggregates that a commit has made grow enough."""
        if not self._policies:
            return
        due: list[Aggregate] = []
        for hand in hands:
            aggregate = hand.after()  # as it was written, if nobody went on with it
            policy = self._policies.get(type(aggregate)) if aggregate is not None else None
            if aggregate is None or policy is None:
                continue
            if policy.is_due_at(hand.version, aggregate.version):
                due.append(aggregate)
        self._keep_soon(due)

    async def drain(self) -> None:
        """Wait until all snapshots that were taken are kept."""
        while self._keeping:
            await self._platform.sleep(0.005)

    def _load(self, behind: Behind) -> tuple[dict[UUID, Aggregate | None], list[Aggregate]]:
        """Read aggregates; return also those whose state is worth being kept."""
        begun = self._platform.monotonic()
        known = {i: aggregate for i, (_, aggregate) in behind.items() if aggregate is not None}
        known |= self._kept({i: kind for i, (kind, _) in behind.items() if i not in known})
        # From the last event that each has seen: a store that was set back may have another there.
        streams = self._log.streams(list(behind), {i: a.version - 1 for i, a in known.items()})
        loaded: dict[UUID, Aggregate | None] = {}
        due: list[Aggregate] = []
        for aggregate_id, (kind, _) in behind.items():
            events = self._mapper.decode_all(streams.get(aggregate_id, ()))
            before = known.get(aggregate_id)
            if before is not None and not _has_seen(before, events):
                before = None
                events = self._mapper.decode_all(self._log.streams([aggregate_id])[aggregate_id])
            if before is not None:
                del events[0]
            aggregate = loaded[aggregate_id] = project(before, events)
            policy = self._policies.get(kind)
            if aggregate is not None and policy is not None:
                took = (self._platform.monotonic() - begun) / len(behind)
                if policy.is_due_after(len(events), took):
                    due.append(aggregate)
        return loaded, due

    def _kept(self, absent: Mapping[UUID, type[Aggregate]]) -> dict[UUID, Aggregate]:
        """Return the aggregates of these that there are snapshots of."""
        wanted = [i for i, kind in absent.items() if kind in self._policies]
        kept: dict[UUID, Aggregate] = {}
        for snapshot in self._log.snapshots(wanted) if wanted else ():
            kind = absent[snapshot.aggregate_id]
            if snapshot.shape != shape_of(kind):
                continue
            try:
                stored = self._mapper.decode(
                    snapshot.aggregate_id, snapshot.version, kind.SNAPSHOT.TOPIC, snapshot.state
                )
                kept[snapshot.aggregate_id] = stored.mutate(None)
            except UnreadableEventError as error:  # its stream is whole all the same
                _log.warning("a snapshot is left aside: %s", error)
        return kept

    def _keep_soon(self, due: Sequence[Aggregate]) -> None:
        """Keep the state of aggregates, as it is now, beside the commands."""
        snapshots: list[StoredSnapshot] = []
        for aggregate in due:
            kind = type(aggregate)
            try:
                state = self._mapper.encode(kind.SNAPSHOT.take(aggregate)).state
            except (LeftfoldError, TypeError, ValueError) as error:  # pydantic's among the last
                _log.warning("no snapshot of %s %s: %s", kind.__name__, aggregate.id, error)
            else:
                shape = shape_of(kind)
                snapshots.append(StoredSnapshot(aggregate.id, aggregate.version, shape, state))
        if snapshots:
            self._keeping += 1
            self._platform.spawn(self._keep(snapshots))

    async def _keep(self, snapshots: Sequence[StoredSnapshot]) -> None:
        try:
            await self._access.read(self._log.keep_snapshots, snapshots)
        except (EventStoreUnavailable, PersistenceError) as error:
            _log.warning("snapshots are not kept: %s", error)
        finally:
            self._keeping -= 1


def _has_seen(aggregate: Aggregate, events: Sequence[Event]) -> bool:
    """Tell whether the first of these events is the last that an aggregate has seen."""
    if not events:
        return False
    first = events[0]
    at = first.originator_version, first.timestamp
    return at == (aggregate.version, aggregate.modified_on)
