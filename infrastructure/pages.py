"""Pages: events of the log become rows of views, and events of processes, in one transaction."""

from __future__ import annotations

import logging
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import groupby, islice
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar
from uuid import UUID

from eventsourcing.persistence import DataError, IntegrityError, PersistenceError

from leftfold.application import EventMapper, Projection
from leftfold.application.checkpoints import Change, Checkpoint, DeadLetter, Reader, full_name
from leftfold.application.errors import UnknownTopicError, UnreadableEventError
from leftfold.application.ports import (
    REACTION,
    Events,
    Group,
    Log,
    LoggedEvent,
    Platform,
    Save,
    ViewStore,
)
from leftfold.application.process import Process, Reactions
from leftfold.domain import Aggregate, DomainError, Event, LeftfoldError, clock, project
from leftfold.infrastructure.access import may_pass
from leftfold.infrastructure.errors import (
    ProjectionFailedError,
    ReactionConflictError,
    TooManyDeadLettersError,
    ViewBusyError,
)
from leftfold.infrastructure.platform import collector_paused
from leftfold.infrastructure.rows import indexable

R = TypeVar("R")

_log = logging.getLogger("leftfold.pages")

CACHED_ROWS = 20_000
"""Rows kept between pages, up to twice as many; they are as the last page left them."""
CHUNK = 500
"""Events decoded at a time: few enough to stay in the processor's caches."""
SPARSE, DENSE = 1 / 8, 1 / 4
"""Of the events in a page: below the first they are looked up by topic, above the other not."""
INLINE = 5_000
"""Events at a time in the transaction of others."""
ATTEMPTS = 100
"""At a change from outside, or at a reaction, while others come between."""
MAX_DEAD_LETTERS = 10_000
"""Of one reader: with so many it is the reader that is at fault, and it stops."""


_NOTHING: Any = object()
_encoded = itemgetter(1, 2, 3, 4)
"""What of a logged event is decoded."""


class Unreadable(NamedTuple):
    """Stands where an event cannot be decoded."""

    originator_id: UUID
    originator_version: int
    topic: str
    error: UnknownTopicError | UnreadableEventError

    def concerns(self, topics: Collection[str]) -> bool:
        """Tell whether it may be meant for a reader of these: one of no known topic may be."""
        return self.topic in topics or isinstance(self.error, UnknownTopicError)


class Fold(Generic[R]):
    """One view, or one process, as this program keeps it: how far it is, what it remembers."""

    def __init__(self, projection: Projection[R], process: Process | None = None) -> None:
        self.reader = projection
        self.process = process
        self.topics = frozenset(projection.topics)
        self.checkpoint = Checkpoint(0, -1)
        self.is_sparse = False
        """Few of the log's events are of its types."""
        self.rows: dict[str, R | None] = {}
        self.parked: set[str] | None = None
        """Keys that have dead letters; None if it is not known."""
        self.is_complete = False
        """All rows of the view are at hand."""
        self.kin: object = None
        """What those share that fold the same, and began together: equally far they are equal."""
        self.conflicts = 0
        """Pages in a row whose reactions others have contradicted."""

    def adopt(self, found: Checkpoint) -> None:
        """Go on from a checkpoint: what is remembered holds only where it was left."""
        if found[:2] != self.checkpoint[:2]:
            self.rows = {}
            self.kin = None
            self.is_complete = found.position == 0
            self.parked = None
        self.checkpoint = found

    def remember(self, rows: Mapping[str, R | None]) -> None:
        """Keep rows as they are stored now, and let the oldest go."""
        kept = self.rows
        kept.update(rows)
        if len(kept) > 2 * CACHED_ROWS:
            self.is_complete = False
            for key in list(islice(kept, len(kept) - CACHED_ROWS)):
                del kept[key]

    @property
    def policy(self) -> str:
        """What to do about an event that cannot be folded."""
        return self.reader.on_poison or ("park" if self.checkpoint.is_built else "halt")


class Turn(Generic[R]):
    """What a page does to one view, which may follow on a page that is not written yet."""

    def __init__(self, fold: Fold[R], pages: Pages, before: Turn[R] | None = None) -> None:
        self.fold = fold
        self.at: Checkpoint = fold.checkpoint if before is None else before.then
        """Where it begins."""
        self.then: Checkpoint = self.at
        """Where it ends."""
        self._before: Mapping[str, R | None] = {} if before is None else before.rows
        self.rows: dict[str, R | None] = {}
        self.fresh: set[str] = set()
        """Keys of rows that are not there where it begins."""
        self.parked: list[DeadLetter] = []
        self.events: list[Event] = []
        self.reactions: Reactions | None = None
        self.leader: Turn[Any] | None = None
        """One that folds the same rows."""
        self._pages = pages
        self._parked: set[str] = pages.parked(fold) if before is None else set(before._parked)
        if fold.process is not None:
            self.reactions = Reactions(fold.process, pages.find)

    def take(self, logged: Sequence[LoggedEvent], events: Sequence[Any], *, is_whole: bool) -> None:
        """Fold some events, all of which could be decoded if it `is_whole`.

        Raises whatever the projection does.
        """
        reader = self.fold.reader
        if self._parked or not is_whole:
            events = list(self._put_aside(logged, events))
        if reader.writes is not None:
            self.events += filter(reader.is_of, events)
        if self.reactions is None:
            self.rows.update(reader.fold(events, self._load))
            return
        with self.reactions.made(), clock.clock(self._pages.now):
            react = self._reacting(self.reactions, events)
            self.rows.update(reader.fold(events, self._load, react))

    def end(self, position: int, *, is_built: bool) -> None:
        """Say how far it reaches."""
        self.then = self.at._replace(
            position=position,
            is_built=self.at.is_built or is_built,
            dead_letters=self.at.dead_letters + len(self.parked),
        )

    def change(self) -> Change:
        """Return it as the store takes it."""
        parked, events = tuple(self.parked), tuple(self.events)
        return Change(self.fold.reader, self.at, self.rows, self.fresh, parked, events=events)

    def written(self) -> None:
        """Remember what is in the store now."""
        self.fold.checkpoint = self.then
        self.fold.conflicts = 0
        self.fold.parked = self._parked
        self.fold.remember(self.rows)

    def _load(self, keys: set[str]) -> dict[str, R | None]:
        cached, changed, before = self.fold.rows, self.rows, self._before
        untouched = keys - changed.keys()
        rows: dict[str, R | None] = {key: changed[key] for key in keys - untouched}
        missing: list[str] = []
        for key in untouched:
            if key in before:
                rows[key] = before[key]
            else:  # at once: the page before may be written meanwhile, and rows let go
                row = cached.get(key, _NOTHING)
                if row is _NOTHING:
                    missing.append(key)
                else:
                    rows[key] = row
        if missing and not self.fold.is_complete:
            loaded: Mapping[str, R] = self._pages.views.load(self.fold.reader, missing)
            rows.update(loaded)
        self.fresh.update([key for key in untouched if rows.get(key) is None])
        return rows

    def _put_aside(self, logged: Sequence[LoggedEvent], events: Sequence[Any]) -> Iterator[Event]:
        """Park what cannot be read, and what would change rows that have something parked."""
        fold, parked = self.fold, self._parked
        for at, event in zip(logged, events, strict=True):
            if isinstance(event, Unreadable):
                if not event.concerns(fold.topics):
                    continue
                if fold.policy == "halt":
                    raise event.error
                self.park(at, (event.originator_id.hex,), described(event.error))
            elif fold.reader.is_of(event):
                keys = fold.reader.keys_of(event)
                if parked.isdisjoint(keys):
                    yield event
                else:
                    self.park(at, keys, "")

    def park(self, at: LoggedEvent, keys: Iterable[str], error: str) -> None:
        """Put an event aside, and all that will follow under its keys."""
        for key in keys:
            self._parked.add(key)
            letter = DeadLetter(
                at.position, key, at.aggregate_id, at.version, at.topic, error, self._pages.now()
            )
            self.parked.append(letter)

    def _reacting(
        self, reactions: Reactions, events: Sequence[Event]
    ) -> Callable[[Any, Any, Event], None]:
        """Return what lets the process react to events, but for those that it has reacted to.

        Another version, before this one or beside it, may have.
        """
        ids = {reactions.command_id(e): e for e in events if self.fold.reader.is_of(e)}
        known = {id(ids[command_id]) for command_id in self._pages.log.commands(list(ids))}

        def react_to_new(before: Any, after: Any, event: Event) -> None:
            if id(event) not in known:
                reactions.react(before, after, event)

        return react_to_new


class Wanted(Protocol):
    """Whose events are read."""

    @property
    def topics(self) -> frozenset[str]:
        """The topics of its events."""
        ...

    @property
    def checkpoint(self) -> Checkpoint:
        """Where it is."""
        ...

    is_sparse: bool
    """Few of the log's events are of its types."""


class Read(NamedTuple):
    """Events of the log, and how far they reach."""

    logged: Sequence[LoggedEvent]
    events: Sequence[Any]
    end: int
    """There is nothing else of interest up to there."""
    head: int


class Prepared(NamedTuple):
    """A page that is folded, and not written."""

    turns: list[Turn[Any]]
    events: int
    """Read from the log."""
    end: int
    has_more: bool = False
    head: int = 0
    failed: Mapping[Fold[Any], Exception] = {}
    """What could not be folded, and has left the page."""


class Outcome(NamedTuple):
    """How a page went."""

    events: int = 0
    """Read from the log."""
    has_more: bool = False
    is_lost: bool = False
    """Somebody else has moved a checkpoint: nothing was written."""
    head: int = 0
    failed: Mapping[Fold[Any], Exception] = {}
    """What could not be folded, and has left the page."""


class Pages:
    """Reads pages of the log and writes what they make of views; its calls block."""

    def __init__(self, log: Log, views: ViewStore, mapper: EventMapper, platform: Platform) -> None:
        self.log = log
        self.views = views
        self.now = platform.now
        self._events: Events = log
        self._mapper = mapper
        self._known = frozenset(mapper.event_topics())

    def within(self, events: Events, views: ViewStore) -> Pages:
        """Return the same in a transaction under way."""
        pages = copy(self)
        pages._events, pages.views = events, views
        return pages

    def fold(self, folds: Sequence[Fold[Any]], limit: int, until: int | None = None) -> Outcome:
        """Fold the next events, at most so many, into views that are equally far.

        None beyond a position, if one is given. A view that cannot fold them leaves the page.
        Raises what the store does.
        """
        return self.write(self.prepare(folds, limit, until=until))

    def fold_alone(self, fold: Fold[Any], limit: int, until: int | None = None) -> Outcome:
        """Fold the next events of one view.

        Those that `failed` are to be tried again, half as many, so that it is found which it is;
        if it is only one that is put aside. Raises the failure where the view is to halt, and
        what the store does.
        """
        try:
            outcome = self.fold([fold], limit, until)
        except Exception as error:
            if may_pass(error) or not is_poison(error):
                raise
            outcome = Outcome(failed={fold: error})
        if outcome.is_lost or not outcome.failed:
            return outcome
        failure, name = outcome.failed[fold], fold.reader.table
        if fold.policy == "halt" or not is_poison(failure):
            raise failure_of(name, failure)
        if limit > 1:
            return outcome
        if not self.park(fold, described(failure)):
            return outcome._replace(is_lost=True)
        _log.error("%s has put an event aside: %s", name, described(failure))
        return outcome

    def begin(self, folds: Sequence[Fold[Any]], limit: int) -> Prepared | Outcome:
        """Fold the next events, and write them too if no others wait behind."""
        prepared = self.prepare(folds, limit)
        return prepared if prepared.has_more else self.write(prepared)

    def prepare(
        self,
        folds: Sequence[Fold[Any]],
        limit: int,
        before: Prepared | None = None,
        *,
        until: int | None = None,
    ) -> Prepared:
        """Read and fold the next events, or those after a page that is yet to be written."""
        after = folds[0].checkpoint.position if before is None else before.end
        head = self._events.head()
        logged, end, has_more = self._read(folds, after, limit, head, until)
        if end == after:
            return Prepared([], 0, after, head=max(after, head))
        earlier = {} if before is None else {turn.fold: turn for turn in before.turns}
        if before is None:
            _pair(folds)
        turns = [Turn(fold, self, earlier.get(fold)) for fold in folds]
        _lead(turns)
        failed: dict[Fold[Any], Exception] = {}
        for begin in range(0, len(logged), CHUNK):
            with collector_paused():
                self._take(turns, logged[begin : begin + CHUNK], failed)
        for turn in turns:
            turn.end(end, is_built=end >= head)
        return Prepared(turns, len(logged), end, has_more, max(head, end), failed)

    def _take(
        self,
        turns: list[Turn[Any]],
        logged: Sequence[LoggedEvent],
        failed: dict[Fold[Any], Exception],
    ) -> None:
        """Fold some events; who cannot leaves the turns."""
        events, is_whole = self._decode(logged)
        for turn in [turn for turn in turns if turn.leader is None]:
            try:
                turn.take(logged, events, is_whole=is_whole)
            except Exception as error:
                if may_pass(error):
                    raise
                for one in [t for t in turns if turn in (t, t.leader)]:
                    failed[one.fold] = error
                    turns.remove(one)

    def write(self, prepared: Prepared) -> Outcome:
        """Write what was folded, unless others have come between."""
        turns, events, end, has_more, head, failed = prepared
        is_lost = bool(failed) and self._have_moved(list(failed))
        # Rows that others have changed meanwhile are no proof that they cannot be folded.
        if not is_lost and turns:
            is_lost = not self._write(turns, is_built=end >= head)
            if is_lost and self._has_conflict(turns[0].fold, events):
                conflict = ReactionConflictError(turns[0].fold.reader.table)
                return Outcome(events, has_more, head=head, failed={turns[0].fold: conflict})
        return Outcome(events, has_more, is_lost, head, failed)

    def _has_conflict(self, fold: Fold[Any], events: int) -> bool:
        """Tell whether it is a reaction that others contradict: of several events, or for long."""
        if fold.process is None or self._have_moved([fold]):
            return False
        fold.conflicts += 1
        return events > 1 or fold.conflicts > ATTEMPTS

    def read_for(self, reader: Wanted, limit: int, until: int | None = None) -> Read:
        """Return the next events for one reader, at most so many, none beyond a position."""
        after = reader.checkpoint.position
        head = self._events.head()
        logged, end, _ = self._read([reader], after, limit, head, until)
        events, _ = self._decode(logged)
        return Read(logged, events, end, max(head, end))

    def park(self, fold: Fold[Any], error: str) -> bool:
        """Put the next event that it reads aside; tell whether nobody was quicker.

        Raises `TooManyDeadLettersError`.
        """
        fault = fault_of(fold.reader, fold.checkpoint)
        if fault is not None:
            raise fault
        (at,) = logged = self._look_up(fold.topics, fold.checkpoint.position, 1)
        (event,), _ = self._decode(logged)
        turn = Turn(fold, self)
        turn.park(at, self._keys_of(fold, event), error)
        is_built = at.position >= self._events.head()
        turn.end(at.position, is_built=is_built)
        fold.kin = None  # from now on it is not as others
        return self._write([turn], is_built=is_built)

    def retry(self, fold: Fold[Any]) -> tuple[int, int]:
        """Fold what is parked, in order; return how many events were folded, and how many stay."""
        reader, stuck = fold.reader, set[str]()
        released = kept = last = attempts = 0
        waiting: deque[tuple[int, list[DeadLetter]]] = deque()
        seen: tuple[int, int] | None = None
        while attempts < ATTEMPTS:
            (at,) = self.views.checkpoints([reader])
            if at[:2] != seen:  # others may have seen to some, or parked more
                found = _by_position(self.views.dead_letters(reader))
                waiting = deque(letters for letters in found if letters[0] > last)
            while waiting and not stuck.isdisjoint(letter.key for letter in waiting[0][1]):
                last, letters = waiting.popleft()
                stuck.update(letter.key for letter in letters)
                kept += 1
            if not waiting:
                return released, kept
            still = self._release(fold, at, *waiting[0], stuck)
            if still is None:
                seen, attempts = None, attempts + 1
                continue
            (last, _), seen, attempts = waiting.popleft(), (at.position, at.epoch + 1), 0
            stuck |= still
            released, kept = released + (not still), kept + bool(still)
        raise ViewBusyError(reader.table)

    def retry_known(self, fold: Fold[Any]) -> None:
        """Fold what is parked if something of it was of an unknown type, and is not any more."""
        letters = self.views.dead_letters(fold.reader)
        known = (letter for letter in letters if letter.topic in self._known)
        if any(letter.error == described(UnknownTopicError(letter.topic)) for letter in known):
            self.retry(fold)

    def drop(self, reader: Reader, position: int | None = None) -> int:
        """Give up what is parked, or one event of it; return how many events."""
        found = self.views.dead_letters(reader)
        letters = [letter for letter in found if position in (None, letter.position)]
        if letters:
            self.change(reader, letters, ())
        return len({letter.position for letter in letters})

    def change(
        self, reader: Reader, released: Sequence[DeadLetter], parked: Sequence[DeadLetter]
    ) -> None:
        """Release some of what is parked of a reader, and keep others as they are told here.

        What others have released meanwhile stays so. Pages that come between are begun again.
        """
        for _ in range(ATTEMPTS):
            (at,) = self.views.checkpoints([reader])
            found = self.views.dead_letters(reader) if parked else ()
            there = {(letter.position, letter.key) for letter in found}
            kept = [letter for letter in parked if (letter.position, letter.key) in there]
            change = Change(reader, at, parked=kept, released=released)
            if self.views.write([change], at.position, is_fence=True):
                return
        raise ViewBusyError(full_name(reader.name, reader.version))

    def read_at(self, position: int) -> tuple[LoggedEvent, Any]:
        """Return the event at a position."""
        logged = self._events.read(position - 1, 1)
        (event,), _ = self._decode(logged)
        return logged[0], event

    def parked(self, fold: Fold[Any]) -> set[str]:
        """Return the keys that have dead letters; the set is the caller's own."""
        if fold.parked is None:
            there_are = fold.checkpoint.dead_letters > 0
            letters = self.views.dead_letters(fold.reader) if there_are else ()
            fold.parked = {letter.key for letter in letters}
        return set(fold.parked)

    def find(self, _: type[Aggregate], aggregate_ids: Sequence[UUID]) -> list[Any]:
        """Read aggregates from their streams."""
        streams = self.log.streams(aggregate_ids)
        return [project(None, self._mapper.decode_all(streams[i])) for i in aggregate_ids]

    def _read(
        self, folds: Sequence[Wanted], after: int, limit: int, head: int, until: int | None
    ) -> tuple[list[LoggedEvent], int, bool]:
        """Read a page: the log as it lies, or by topics where few of its events are wanted.

        Returns how far it reaches, too, and whether there is more.
        """
        if head <= after or (until is not None and until <= after):
            return [], after, False
        topics = frozenset[str]().union(*(fold.topics for fold in folds))
        is_sparse = all(fold.is_sparse for fold in folds)
        if is_sparse:
            found = self._look_up(topics, after, limit)
            # Topics that came up beyond the head were not looked for.
            logged = [event for event in found if event.position <= head]
            span = logged[-1].position - after if logged else 0
            is_sparse = len(logged) < DENSE * span or not logged
        else:
            logged = self._events.read(after, limit)
            matching = sum(1 for event in logged if event.topic in topics)
            is_sparse = matching < SPARSE * len(logged)
        for fold in folds:
            fold.is_sparse = is_sparse
        is_full = len(logged) == limit
        last = logged[-1].position if logged else head
        end = last if is_full else max(head, last)
        if until is not None and until < end:
            return [event for event in logged if event.position <= until], until, True
        return logged, end, is_full

    def _look_up(self, topics: frozenset[str], after: int, limit: int) -> list[LoggedEvent]:
        """Read the next events of some topics, and of those that the model does not know.

        Such an event may be meant for any reader.
        """
        wanted = topics | (self._events.topics() - self._known)
        return self._events.read(after, limit, sorted(wanted)) if wanted else []

    def _have_moved(self, folds: Sequence[Fold[Any]]) -> bool:
        """Tell whether others have come between: what was read of rows may be of several pages."""
        found = self.views.checkpoints([fold.reader for fold in folds])
        return any(at[:2] != f.checkpoint[:2] for at, f in zip(found, folds, strict=True))

    def _decode(self, logged: Sequence[LoggedEvent]) -> tuple[list[Any], bool]:
        """Decode events; tell whether all of them could be."""
        try:
            return self._mapper.decode_all(map(_encoded, logged)), True
        except (UnknownTopicError, UnreadableEventError):
            return [self._decode_one(event) for event in logged], False

    def _decode_one(self, at: LoggedEvent) -> Any:
        try:
            return self._mapper.decode(at.aggregate_id, at.version, at.topic, at.state)
        except (UnknownTopicError, UnreadableEventError) as error:
            return Unreadable(at.aggregate_id, at.version, at.topic, error)

    def _write(self, turns: Sequence[Turn[Any]], *, is_built: bool = False) -> bool:
        changes, end = [turn.change() for turn in turns], turns[0].then.position
        if not self.views.write(changes, end, group=self._group(turns), is_built=is_built):
            return False
        for turn in turns:
            turn.written()
        return True

    def _group(self, turns: Sequence[Turn[Any]]) -> Group | None:
        """Return what processes have recorded, as commands of their own."""
        reactions = [turn.reactions for turn in turns if turn.reactions is not None]
        saves = [
            self._save(turn.fold.reader.name, command_id, events)
            for turn in turns
            if turn.reactions is not None
            for command_id, events in turn.reactions.saved.items()
            if events
        ]
        if not saves:
            return None
        return Group(saves, [pair for r in reactions for pair in r.based_on().items()])

    def _save(self, name: str, command_id: UUID, events: Sequence[Event]) -> Save:
        encoded = [self._mapper.encode_with_key(event) for event in events]
        versions = {event.aggregate_id: event.version for event in encoded}
        return Save(command_id, f"{REACTION}{name}", encoded, tuple(versions.items()), None)

    def _keys_of(self, fold: Fold[Any], event: Any) -> Iterable[str]:
        own = (event.originator_id.hex,)
        if isinstance(event, Unreadable):
            return own
        try:
            return [indexable(key) for key in fold.reader.keys_of(event)] or own
        except Exception:  # noqa: BLE001 - it may be what is wrong with the event
            return own

    def _release(
        self,
        fold: Fold[Any],
        at: Checkpoint,
        position: int,
        letters: Sequence[DeadLetter],
        stuck: set[str],
    ) -> set[str] | None:
        """Fold what was parked at one position; return the keys under which it still is.

        It waits on if it turns out to be of keys that are stuck. None if others came between.
        """
        try:
            logged, event = self.read_at(position)
            if isinstance(event, Unreadable):
                raise event.error  # noqa: TRY301 - as if the projection had
            again = Fold(fold.reader, fold.process)
            again.checkpoint, again.parked = at, stuck
            turn = Turn(again, self)
            turn.take([logged], [event], is_whole=True)
            change, group = replace(turn.change(), released=letters), self._group([turn])
            is_done = self.views.write([change], at.position, group=group, is_fence=True)
            if not (is_done or group is None or self._have_moved([again])):
                raise ReactionConflictError(fold.reader.table)  # noqa: TRY301 - as above
        except Exception as error:
            if may_pass(error) or not is_poison(error):
                raise
            why = described(error)
            change = Change(fold.reader, at, parked=[replace(each, error=why) for each in letters])
            is_done = self.views.write([change], at.position, is_fence=True)
        return {letter.key for letter in change.parked} if is_done else None


class InlineViews:
    """Views that are written in the transaction of the events.

    Whatever is in the log after their checkpoints is folded there: the events of the transaction,
    and those that a program without these views has written before. It is too late to refuse
    such events: if that fails they are made good, in transactions of their own, and those that a
    view does not take are put aside, as by any other view.
    """

    def __init__(self, projections: Sequence[Projection[Any]]) -> None:
        self.projections = tuple(projections)
        self._pages: Pages | None = None

    def use(self, pages: Pages) -> None:
        """Fold by these pages, and all that the log holds now. Raises what a view does not take."""
        self._pages = pages
        for projection in self.projections:
            self._make_good(projection, pages)

    def __call__(self, events: Events, views: ViewStore, /) -> None:
        """Fold what is new. Raises what refuses it."""
        if self._pages is None:
            return  # the store is being opened
        pages = self._pages.within(events, views)
        for projection in self.projections:
            fold = _begun(projection, pages)
            has_more, attempts = True, 0
            while has_more:
                outcome = pages.fold([fold], INLINE)
                if outcome.failed:
                    raise failure_of(projection.table, outcome.failed[fold])
                if outcome.is_lost:  # others open the same view, or build it anew
                    attempts = self._again(fold, pages, attempts)
                has_more = outcome.has_more or outcome.is_lost

    def make_good(self) -> bool:
        """Fold what others have written; tell whether there was any.

        Raises what the store does while it is away. What else stops it is logged.
        """
        if self._pages is None:
            return False
        try:
            made = [self._make_good(each, self._pages) for each in self.projections]
        except Exception as error:
            if isinstance(error, PersistenceError) and may_pass(error):
                raise
            _log.error("what others have written is not made good: %s", described(error))
            return False
        return any(made)

    def _make_good(self, projection: Projection[Any], pages: Pages) -> bool:
        fold = _begun(projection, pages)
        begun, limit, attempts, has_more = fold.checkpoint.position, INLINE, 0, True
        while has_more:
            outcome = pages.fold_alone(fold, limit)
            limit = max(1, limit // 2) if outcome.failed else min(2 * limit, INLINE)
            attempts = self._again(fold, pages, attempts) if outcome.is_lost else 0
            has_more = outcome.has_more or outcome.is_lost or bool(outcome.failed)
        return fold.checkpoint.position > begun

    def _again(self, fold: Fold[Any], pages: Pages, attempts: int) -> int:
        """Begin a page again that others have come before; return how often that was."""
        if attempts == ATTEMPTS:
            raise ViewBusyError(fold.reader.table)
        fold.adopt(pages.views.checkpoints([fold.reader])[0])
        return attempts + 1


def _begun(projection: Projection[R], pages: Pages) -> Fold[R]:
    """Return a view where it is."""
    fold = Fold(projection)
    fold.adopt(pages.views.checkpoints([projection])[0])
    return fold


def _pair(folds: Sequence[Fold[Any]]) -> None:
    """Notice views that fold the same, where they begin."""
    found: list[Fold[Any]] = []
    for fold in folds:
        at = fold.checkpoint
        if at.position or at.dead_letters or fold.process or fold.reader.writes:
            continue
        alike = (other.kin for other in found if other.reader.folds_as(fold.reader))
        fold.kin = next(alike, None) or object()
        found.append(fold)


def _lead(turns: Sequence[Turn[Any]]) -> None:
    """Let turns have the rows of one that folds the same."""
    leaders: dict[object, Turn[Any]] = {}
    for turn in turns:
        if turn.fold.kin is None:
            continue
        leader = leaders.setdefault((turn.fold.kin, turn.fold.policy), turn)
        if leader is not turn:
            turn.leader = leader
            turn.rows, turn.fresh = leader.rows, leader.fresh
            turn.parked, turn._parked = leader.parked, leader._parked


def _by_position(letters: Iterable[DeadLetter]) -> Iterator[tuple[int, list[DeadLetter]]]:
    for position, found in groupby(letters, attrgetter("position")):
        yield position, list(found)


def fault_of(reader: Reader, at: Checkpoint) -> TooManyDeadLettersError | None:
    """Return what stops a reader that has put so much aside that it is no fault of events."""
    if at.dead_letters < MAX_DEAD_LETTERS:
        return None
    return TooManyDeadLettersError(full_name(reader.name, reader.version), MAX_DEAD_LETTERS)


def is_poison(error: Exception) -> bool:
    """Tell whether it is the event that is at fault, or the projection with it: not the store."""
    return not isinstance(error, PersistenceError) or isinstance(error, (DataError, IntegrityError))


def failure_of(name: str, error: Exception) -> LeftfoldError:
    """Return what to tell of an error that stops a reader of the log."""
    if isinstance(error, LeftfoldError) and not isinstance(error, DomainError):
        return error
    return ProjectionFailedError(name, described(error))


def described(error: BaseException) -> str:
    """Say what is wrong, for logs, health and dead letters, without what it was about.

    The stores' errors quote no values, nor statements beyond a name. The texts of others may:
    they are not shown.
    """
    name = type(error).__name__
    if isinstance(error, PersistenceError) or (
        isinstance(error, LeftfoldError) and not isinstance(error, DomainError)
    ):
        return f"{name}: {error}"
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    code = frame.f_code
    return f"{name} in {code.co_name}, line {line} of {Path(code.co_filename).name}"
