"""Carrying out commands: handlers on aggregates in memory, one commit at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache, partial
from inspect import isawaitable
from operator import attrgetter
from typing import Any, NamedTuple
from uuid import UUID

from eventsourcing.persistence import PersistenceError
from pydantic import TypeAdapter, ValidationError

from leftfold.application.bus import Batch, Dispatch, Outcome, checked
from leftfold.application.errors import (
    CommandIdReused,
    Conflict,
    DispatchError,
    EventStoreUnavailable,
    InvalidAnswerError,
    KeysUnavailable,
    NestedDispatchError,
    OutcomeUnknown,
    UnsavedEventsError,
    Unstorable,
)
from leftfold.application.loading import Behind, Loading
from leftfold.application.mapper import EventMapper, KeysWanted
from leftfold.application.memory import Hand, Memory
from leftfold.application.messages import Command
from leftfold.application.ports import (
    Access,
    Committed,
    EncodedEvent,
    Failed,
    Group,
    Log,
    Platform,
    RecordedCommand,
    Repeated,
    Save,
    Stale,
)
from leftfold.application.receipt import Receipt
from leftfold.application.service import Believed, NotInMemory, Unit, current_unit
from leftfold.application.snapshots import SnapshotPolicy
from leftfold.application.writer import Writer
from leftfold.domain import (
    Aggregate,
    DomainError,
    Err,
    Event,
    Metadata,
    Ok,
    clock,
    metadata,
)
from leftfold.domain.metadata import NO_METADATA
from leftfold.domain.personal import UNSEALED, Keys, TokensOnly

WAITING = EncodedEvent(UUID(int=0), 0, "", b"")
"""Keeps the place of an event that waits for its subject's key."""
LOOK_AHEAD = 8_000
"""Commands of a batch whose first questions are answered together."""
SEALINGS = 3
"""Times that keys are asked for; each subject could be forgotten between two of them."""

Wanted = dict[UUID, type[Aggregate]]
Known = Mapping[UUID, RecordedCommand]
Answers = list[Any] | Err[Any]
"""Of all parts, or the first refusal."""


class _Again(Exception):
    """The attempt must be made again; nothing was written."""

    def __init__(self, known: Known) -> None:
        super().__init__()
        self.known = known


class _Staged(NamedTuple):
    """What a handler that answered `Ok` wants written."""

    part: Dispatch[Any]
    value: object
    events: Sequence[Event]
    versions: Mapping[UUID, int]


class Execution:
    """The innermost step of the command bus: load, handle, commit, answer.

    Handlers run on the event loop against aggregates in memory. A handler that asks for one
    that is not there is abandoned, the aggregate is read, and the handler runs again: safe,
    since nothing was written. For the same reason an attempt that meets an aggregate in another
    dispatch's hands lets go of its own, waits, and begins again by taking all it needs in one
    fixed order; so no two can wait for each other. Whatever is answered without a commit is
    believed only if the aggregates it was based on are as new as the store's, and none of the
    commands was carried out before: see `_confirm`.
    """

    def __init__(
        self,
        log: Log,
        mapper: EventMapper,
        platform: Platform,
        access: Access,
        *,
        memory: int,
        snapshots: Mapping[type[Aggregate], SnapshotPolicy] | None = None,
        committed: Callable[[], None],
    ) -> None:
        """Carry out commands against a log, which `access` asks.

        At most `memory` idle aggregates stay in memory; `committed` is called after commits.
        """
        self._log = log
        self._mapper = mapper
        self._platform = platform
        self._read = access.read
        self._memory = Memory(memory)
        self._writer = Writer(log, platform, access, committed)
        self._loading = Loading(log, mapper, platform, access, snapshots or {})
        # One at a time, as the keys' store does it: if that is slow, reads have threads left.
        self._asking_for_keys = asyncio.Lock()

    async def __call__(self, dispatch: Dispatch[Any]) -> Outcome:
        """Carry out one command, or a batch."""
        outer = current_unit.get()
        if outer is not None and not outer.sealed:
            raise NestedDispatchError(dispatch.name)
        try:
            if isinstance(dispatch.message, Batch):
                parts = dispatch.message.parts
                answers = await self._carry_out(parts, await self._known(parts))
                return Ok(answers) if isinstance(answers, list) else answers
            answers = await self._carry_out((dispatch,), {})
            return Ok(answers[0]) if isinstance(answers, list) else answers
        except (EventStoreUnavailable, KeysUnavailable) as error:  # commits have their verdicts
            return Err(error)
        except PersistenceError as error:
            return Err(EventStoreUnavailable(str(error)))

    def waiting(self) -> int:
        """How many dispatches are not written yet, also those whose callers have gone away."""
        return self._writer.waiting()

    async def drain(self) -> None:
        """Wait until all that was begun is written, also what nobody waits for any more."""
        await self._writer.drain()
        await self._loading.drain()

    async def _carry_out(self, parts: Sequence[Dispatch[Any]], known: Known) -> Answers:
        wanted: Wanted = {}
        while True:
            unit = Unit(self._memory, self._platform)
            moment = self._platform.now()  # one for all that is recorded
            token = current_unit.set(unit)
            time = clock.use(partial(_same, moment))
            outer = metadata.use(NO_METADATA)  # to go back to; each command sets its own
            try:
                return await self._attempt(unit, parts, known, wanted)
            except _Again as again:
                known = again.known
            except CommandIdReused as error:
                return Err(error)
            finally:
                metadata.restore(outer)
                clock.restore(time)
                current_unit.reset(token)
                try:
                    unit.seal()
                finally:
                    unit.let_go()

    async def _attempt(
        self, unit: Unit, parts: Sequence[Dispatch[Any]], known: Known, wanted: Wanted
    ) -> Answers:
        if wanted:
            await self._take_all(unit, wanted)
        values: list[Any] = []
        staged: list[_Staged] = []
        for number, part in enumerate(parts, 1):
            first = known.get(part.command_id) if known else None
            if first is not None:
                values.append(await self._answer_again(part, first))
                continue
            unit.begin_command(part.command_id)
            metadata.use(_metadata_of(part))
            begun = len(unit.events)
            try:
                answer = await self._handle(unit, part, known, wanted, parts, number)
            except _Again:
                raise
            except Exception:
                await self._confirm(unit, parts, known)
                raise
            if isinstance(answer, Err):
                await self._confirm(unit, parts, known)
                return answer
            if unit.is_changed:
                raise UnsavedEventsError(part.name)
            if len(unit.events) > begun:
                staged.append(_Staged(part, answer.value, unit.events[begun:], unit.versions))
            values.append(answer.value)
        if staged:
            return await self._commit(unit, parts, values, staged, known)
        await self._confirm(unit, parts, known)
        return values

    async def _answer_again(self, part: Dispatch[Any], first: RecordedCommand) -> Any:
        """Answer as the first time."""
        keys = self._mapper.keys
        if first.answer is None or keys is None:
            return _first_answer(part, first, keys)
        # Not on the loop: it may ask for a key.
        return await self._platform.in_thread(_first_answer, part, first, keys)

    async def _confirm(self, unit: Unit, parts: Sequence[Dispatch[Any]], known: Known) -> None:
        """Begin again if an answer rests on an older state, or repeats what was done before."""
        unit.seal()
        ids = [part.command_id for part in parts if part.command_id not in known]
        # What was read in several steps may never have been so at one time.
        based_on = {} if unit.was_read_at_once else unit.based_on()
        is_fresh, found = await self._read(self._compare, based_on, ids)
        if not is_fresh:
            unit.believed = Believed.BEHIND
        if found or not is_fresh:
            raise _Again({**known, **found})

    def _compare(self, based_on: Mapping[UUID, int], ids: Sequence[UUID]) -> tuple[bool, Known]:
        is_fresh = True
        if based_on:
            versions = self._log.versions(list(based_on))
            is_fresh = all(versions.get(i, 0) == version for i, version in based_on.items())
        return is_fresh, self._log.commands(ids) if ids else {}

    async def _handle(
        self,
        unit: Unit,
        part: Dispatch[Any],
        known: Known,
        wanted: Wanted,
        parts: Sequence[Dispatch[Any]],
        number: int,
    ) -> Outcome:
        """Call the handler, until all that it asks for is in memory; so many parts are begun."""
        begun = len(unit.events)
        answer: Any
        while True:
            # Of another, tasks and threads may live on, and go on with what this unit holds.
            is_plain = not part.handling.blocking
            try:
                handler = part.handling.handler
                if part.handling.blocking:
                    answer = await self._platform.in_own_thread(handler, part.message)
                else:
                    answer = handler(part.message)
                if not isinstance(answer, (Ok, Err)) and isawaitable(answer):
                    is_plain = False
                    answer = await answer
                return checked(part, answer)
            except (DomainError, DispatchError) as refusal:
                return Err(refusal)
            except (NotInMemory, BaseExceptionGroup) as error:
                missing, others = _parted(error)
                if not missing:
                    return Err(_refusal_of(others))
            wanted.update(missing)
            if self._log.is_local:  # a handler that always wants more does not hold the loop
                await self._platform.sleep(0)
            is_touched = len(unit.events) > begun or unit.is_changed
            if not is_plain or is_touched or any(map(self._memory.is_taken, missing)):
                raise _Again(known)
            if number < len(parts) and not unit.has_looked_ahead:
                unit.has_looked_ahead = True
                later = parts[number : number + LOOK_AHEAD]
                missing |= self._look_ahead(unit, later, known)
            await self._take_all(unit, missing)

    def _look_ahead(self, unit: Unit, parts: Sequence[Dispatch[Any]], known: Known) -> Wanted:
        """Return what further commands ask for first, so that it is read together.

        Their handlers are called with nothing at hand, and given up at their first question.
        """
        found: Wanted = {}
        for part in parts:
            if part.handling.blocking or part.command_id in known:
                continue
            probe = Unit(self._memory, self._platform)
            probe.may_take = False
            token = current_unit.set(probe)
            try:
                # What it raises counts when its turn has come, and only then: it is called again.
                with suppress(Exception):
                    answer: Any = part.handling.handler(part.message)
                    if isinstance(answer, Coroutine):
                        answer.close()
                    elif isinstance(answer, asyncio.Future):
                        answer.cancel()
            except NotInMemory as asked:
                found.update(asked.wanted)
            finally:
                current_unit.reset(token)
                probe.seal()
        is_taken = self._memory.is_taken
        return {i: kind for i, kind in found.items() if i not in unit.hands and not is_taken(i)}

    async def _take_all(self, unit: Unit, wanted: Mapping[UUID, type[Aggregate]]) -> None:
        """Take aggregates in hand in the order of their ids, waiting for each.

        Those that are not in memory are read, of those that are behind what they miss.
        """
        absent: Behind = {}
        for aggregate_id in sorted(wanted, key=_number):
            aggregate, is_current = await self._memory.take(aggregate_id)
            unit.hands[aggregate_id] = Hand(aggregate, is_current=is_current)
            if not is_current:
                absent[aggregate_id] = wanted[aggregate_id], aggregate
        if absent:
            for aggregate_id, aggregate in (await self._loading.load(absent)).items():
                unit.hands[aggregate_id] = Hand(aggregate, is_loaded=True)

    async def _saves(self, staged: Sequence[_Staged]) -> list[Save]:
        """Encode what is to be written; subjects without a key get one before.

        Raises what `EventMapper.encode` does, but `KeysWanted`.
        """
        encode = self._mapper.encode
        encoded: list[list[EncodedEvent]] = []
        waiting: list[tuple[list[EncodedEvent], int, Event]] = []
        for each in staged:
            events: list[EncodedEvent] = []
            encoded.append(events)
            for event in each.events:
                try:
                    events.append(encode(event))
                except KeysWanted:
                    waiting.append((events, len(events), event))
                    events.append(WAITING)
        for _ in range(SEALINGS):
            if not waiting:
                break
            subjects = {str(event.subject) for _, _, event in waiting}
            # Who gives up meanwhile leaves a thread that is still at it.
            await asyncio.shield(self._platform.spawn(self._have_keys(subjects)))
            still_waiting = []
            for events, at, event in waiting:
                try:
                    events[at] = encode(event)
                except KeysWanted:  # forgotten in this moment: it gets another key
                    still_waiting.append((events, at, event))
            waiting = still_waiting
        if waiting:
            raise KeysUnavailable("they are forgotten as soon as they are made")
        saves: list[Save] = []
        for (part, value, recorded, versions), events in zip(staged, encoded, strict=True):
            is_receipt = isinstance(value, Receipt)
            answer = None if is_receipt else _dump_answer(part, value, self._mapper.keys, recorded)
            saves.append(Save(part.command_id, part.name, events, tuple(versions.items()), answer))
        return saves

    async def _have_keys(self, subjects: Iterable[str]) -> None:
        async with self._asking_for_keys:
            await self._platform.in_thread(self._provide, subjects)

    def _provide(self, subjects: Iterable[str]) -> None:
        if self._mapper.keys is not None:
            self._mapper.keys.provide(subjects)

    async def _commit(
        self,
        unit: Unit,
        parts: Sequence[Dispatch[Any]],
        values: list[Any],
        staged: Sequence[_Staged],
        known: Known,
    ) -> Answers:
        try:
            saves = await self._saves(staged)
        except (DomainError, DispatchError) as refusal:
            await self._confirm(unit, parts, known)
            return Err(refusal)
        unit.seal()
        unit.believed = Believed.BEHIND  # also if nobody waits for the verdict any more
        looked_at = unit.looked_at()
        verdict = await self._writer.write(Group(saves, looked_at))
        match verdict:
            case Committed(positions):
                unit.believed = Believed.AFTER
                self._loading.keep_due(unit.hands.values())
                _complete(staged, positions)
                return values
            case Stale() | Repeated():
                found = await self._known(part for part in parts if part.command_id not in known)
                if found:
                    raise _Again({**known, **found})
                versions = {i: v for each in staged for i, v in each.versions.items()}
                return Err(Conflict(tuple((versions | dict(looked_at)).items())))
            case Failed(reason, in_doubt=False, is_refusal=is_refusal, refusal=refused):
                unit.believed = Believed.BEFORE
                unknown = Unstorable(reason) if is_refusal else EventStoreUnavailable(reason)
                return Err(refused or unknown)
            case Failed():
                written = await self._positions_of(saves, known)
                if written is None:
                    return Err(OutcomeUnknown(parts[0].command_id))
                _complete(staged, written)
                return values

    async def _positions_of(self, saves: Sequence[Save], known: Known) -> list[int] | None:
        """Return where saves in doubt were written; None if that is not known."""
        try:
            done, is_ours = await self._read(self._settle, saves)
        except Exception:  # noqa: BLE001 - to raise it would say that nothing was written
            return None
        if len(done) < len(saves):
            return None
        if not is_ours:  # another attempt at the same commands was first
            raise _Again({**known, **done})
        return [done[save.command_id].position for save in saves]

    def _settle(self, saves: Sequence[Save]) -> tuple[Known, bool]:
        """Look up what became of saves in doubt; tell also whether it is they that were written.

        Their commands may have been carried out by another attempt, on another state. Its events
        were recorded at another moment.
        """
        done = self._log.commands([save.command_id for save in saves])
        ours = saves[0].events[0]
        stream = self._log.streams([ours.aggregate_id], {ours.aggregate_id: ours.version - 1})
        return done, stream[ours.aggregate_id][:1] == [ours]

    async def _known(self, parts: Iterable[Dispatch[Any]]) -> Known:
        return await self._read(self._log.commands, [part.command_id for part in parts])


def _metadata_of(part: Dispatch[Any]) -> Metadata:
    given, command = part.metadata, part.command_id.hex
    return Metadata(given.correlation_id, given.causation_id or command, given.user)


_number = attrgetter("int")  # UUIDs compare by it, more slowly


def _complete(staged: Sequence[_Staged], positions: Sequence[int]) -> None:
    """Complete the receipts among the answers with what is known only now."""
    for each, position in zip(staged, positions, strict=True):
        receipt = each.value
        if isinstance(receipt, Receipt):  # frozen for all but the runtime
            object.__setattr__(receipt, "position", position)
            # It may be of an earlier `save`.
            object.__setattr__(receipt, "aggregates", tuple(each.versions.items()))


def _same(moment: datetime) -> datetime:
    return moment


def _parted(error: BaseException) -> tuple[Wanted, list[BaseException]]:
    """Return what a handler asked for, also from several tasks, and what else they raised."""
    if isinstance(error, NotInMemory):
        return dict(error.wanted), []
    if not isinstance(error, BaseExceptionGroup):
        return {}, [error]
    missing: Wanted = {}
    others: list[BaseException] = []
    for each in error.exceptions:
        wanted, besides = _parted(each)
        missing |= wanted
        others += besides
    return missing, others


def _refusal_of(errors: Sequence[BaseException]) -> DomainError | DispatchError:
    """Return the first of several refusals. Raises what is none."""
    refusals: list[DomainError | DispatchError] = []
    for error in errors:
        if not isinstance(error, (DomainError, DispatchError)):
            raise error
        refusals.append(error)
    return refusals[0]


def _dump_answer(
    part: Dispatch[Any], value: object, keys: Keys | None, recorded: Sequence[Event]
) -> bytes:
    """Return an answer as JSON, beside the events that were recorded with it.

    Raises `InvalidAnswerError` if it could not be given again.
    """
    adapter = _answer_type(part)
    tokens = None if keys is None else TokensOnly(keys, recorded)
    # Without warnings: they quote the value.
    document = adapter.dump_json(value, warnings="none", context=tokens)
    try:
        is_the_same = adapter.validate_json(document, context=keys) == value
    except ValidationError:
        is_the_same = False
    if tokens is not None and tokens.error is not None:
        raise tokens.error
    if tokens is not None and tokens.found_unsealed:
        raise InvalidAnswerError(part.name, UNSEALED)
    if not is_the_same:
        raise InvalidAnswerError(part.name, f"{type(value).__name__} that JSON does not keep")
    return document


def _first_answer(part: Dispatch[Any], first: RecordedCommand, keys: Keys | None) -> Any:
    if first.command != part.name:
        raise CommandIdReused(part.command_id, first.command, part.name)
    if first.answer is None:
        return Receipt(first.command_id, first.aggregates, first.position, repeated=True)
    try:
        return _answer_type(part).validate_json(first.answer, context=keys)
    except ValidationError:  # without it: it quotes the answer
        raise InvalidAnswerError(part.name, "in another release what this cannot read") from None


def _answer_type(part: Dispatch[Any]) -> TypeAdapter[Any]:
    command_type: type[Command[Any, Any]] = type(part.message)
    return _adapter_of(command_type)


@cache
def _adapter_of(command_type: type[Command[Any, Any]]) -> TypeAdapter[Any]:
    for base in command_type.__mro__:
        answer, *_ = base.__dict__.get("__pydantic_generic_metadata__", {}).get("args") or (None,)
        if answer is not None:
            return TypeAdapter(answer)
    return TypeAdapter(object)
