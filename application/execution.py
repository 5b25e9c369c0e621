"""Carrying out commands: handlers on aggregates in memory, one commit at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from inspect import isawaitable
from operator import attrgetter
from typing import Any
from uuid import UUID

from eventsourcing.persistence import PersistenceError
from pydantic import TypeAdapter

from leftfold.application.bus import Batch, Dispatch, Outcome, checked
from leftfold.application.errors import (
    CommandIdReused,
    Conflict,
    DispatchError,
    EventStoreUnavailable,
    NestedDispatchError,
    OutcomeUnknown,
    ShuttingDown,
    UnsavedEventsError,
)
from leftfold.application.mapper import EventMapper
from leftfold.application.memory import Memory
from leftfold.application.messages import Command
from leftfold.application.ports import (
    Committed,
    Failed,
    Log,
    Platform,
    RecordedCommand,
    Repeated,
    Save,
    Stale,
)
from leftfold.application.receipt import Receipt
from leftfold.application.service import NotInMemory, Unit, current_unit
from leftfold.application.writer import Writer
from leftfold.domain import Aggregate, DomainError, Err, Ok, clock, project

Wanted = dict[UUID, type[Aggregate]]
Known = Mapping[UUID, RecordedCommand]


class _Again(Exception):
    """The attempt must be made again; nothing was written."""


class Execution:
    """The innermost step of the command bus: load, handle, commit, answer.

    Handlers run on the event loop against aggregates in memory. A handler that asks for one
    that is not there is abandoned, the aggregate is read, and the handler runs again: safe,
    since nothing was written. For the same reason an attempt that meets an aggregate in another
    dispatch's hands lets go of its own, waits, and begins again by taking all it needs in one
    fixed order; so no two can wait for each other. A refusal is believed only if the aggregates
    it was based on are as new as the store's.
    """

    def __init__(
        self,
        log: Log,
        mapper: EventMapper,
        platform: Platform,
        *,
        memory: int,
        committed: Callable[[], None],
    ) -> None:
        """Carry out commands against a log.

        At most `memory` idle aggregates stay in memory; `committed` is called after commits.
        """
        self._log = log
        self._mapper = mapper
        self._platform = platform
        self._memory = Memory(memory)
        self._writer = Writer(log, platform, committed)
        self._running = 0
        self._is_closed = False
        self._idle: asyncio.Future[None] | None = None

    async def __call__(self, dispatch: Dispatch[Any]) -> Outcome:
        """Carry out one command, or a batch."""
        if self._is_closed:
            return Err(ShuttingDown())
        if current_unit.get() is not None:
            raise NestedDispatchError(dispatch.name)
        self._running += 1
        try:
            if isinstance(dispatch.message, Batch):
                parts = dispatch.message.parts
                return await self._carry_out(parts, await self._known(parts))
            outcome = await self._carry_out((dispatch,), {})
            return Ok(outcome.value[0]) if isinstance(outcome, Ok) else outcome
        except PersistenceError as error:  # of a read: commits have their verdicts
            return Err(EventStoreUnavailable(str(error)))
        finally:
            self._running -= 1
            if self._idle is not None and not self._running and not self._idle.done():
                self._idle.set_result(None)

    async def drain(self) -> None:
        """Refuse new commands from now on, and wait for those under way."""
        self._is_closed = True
        if self._running and self._idle is None:
            self._idle = asyncio.get_running_loop().create_future()
        if self._idle is not None:
            await asyncio.shield(self._idle)
        await self._writer.drain()

    async def _carry_out(self, parts: Sequence[Dispatch[Any]], known: Known) -> Outcome:
        wanted: Wanted = {}
        moment = self._platform.now()  # one for all that is recorded
        while True:
            unit = Unit()
            token = current_unit.set(unit)
            time = clock.use(lambda: moment)
            try:
                return await self._attempt(unit, parts, known, wanted)
            except _Again:
                if any(part.given_id for part in parts):
                    known = await self._known(parts)
            except CommandIdReused as error:
                return Err(error)
            finally:
                clock.restore(time)
                current_unit.reset(token)
                for aggregate_id in unit.taken:
                    aggregate = unit.loaded.get(aggregate_id) if unit.is_sound else None
                    self._memory.let_go(aggregate_id, aggregate)

    async def _attempt(
        self, unit: Unit, parts: Sequence[Dispatch[Any]], known: Known, wanted: Wanted
    ) -> Outcome:
        if wanted:
            await self._take_all(unit, wanted)
        values: list[Any] = []
        saves: list[Save] = []
        for part in parts:
            first = known.get(part.command_id)
            if first is not None:
                values.append(_answer_again(part, first))
                continue
            unit.begin_command(part.command_id)
            begun = len(unit.events)
            answer = await self._handle(unit, part, wanted)
            if isinstance(answer, Err):
                return await self._refuse(unit, part, answer)
            if unit.is_changed:
                raise UnsavedEventsError(part.name)
            values.append(answer.value)
            if len(unit.events) > begun:
                saves.append(self._save(unit, part, answer.value, begun))
        if saves:
            return await self._commit(unit, parts, values, saves)
        await self._check_unwritten(unit, parts, known)
        return Ok(values)

    async def _check_unwritten(
        self, unit: Unit, parts: Sequence[Dispatch[Any]], known: Known
    ) -> None:
        """Begin again if an answer without events is a repetition, or based on an older state."""
        if unit.based_on:
            await self._check_fresh(unit)
        for part in parts:
            if part.given_id and part.command_id not in known and await self._known((part,)):
                raise _Again
        unit.is_sound = True

    async def _handle(self, unit: Unit, part: Dispatch[Any], wanted: Wanted) -> Outcome:
        """Call the handler, until all that it asks for is in memory."""
        begun = len(unit.events)
        while True:
            try:
                handler = part.handling.handler
                if part.handling.blocking:
                    answer = await self._platform.in_thread(handler, part.message)
                else:
                    answer = handler(part.message)
                return checked(part, await answer if isawaitable(answer) else answer)
            except (DomainError, DispatchError) as refusal:
                return Err(refusal)
            except NotInMemory as missing:
                wanted.update(missing.wanted)
                is_touched = len(unit.events) > begun or unit.is_changed
                if is_touched or any(map(self._memory.is_taken, missing.wanted)):
                    raise _Again from None
                await self._take_all(unit, missing.wanted)

    async def _take_all(self, unit: Unit, wanted: Mapping[UUID, type[Aggregate]]) -> None:
        """Take aggregates in hand in the order of their ids, waiting for each; read the absent."""
        absent: list[UUID] = []
        for aggregate_id in sorted(wanted, key=_number):
            if self._memory.is_taken(aggregate_id):
                await self._memory.wait_for(aggregate_id)
            aggregate = self._memory.take(aggregate_id)
            unit.taken.append(aggregate_id)
            if aggregate is None:
                absent.append(aggregate_id)
            else:
                unit.loaded[aggregate_id] = aggregate
                unit.based_on[aggregate_id] = aggregate.version
        if absent:
            unit.loaded.update(await self._call(self._read, absent))

    def _read(self, aggregate_ids: Sequence[UUID]) -> dict[UUID, Aggregate | None]:
        streams = self._log.streams(aggregate_ids)
        decode = self._mapper.decode_all
        return {i: project(None, decode(streams.get(i, ()))) for i in aggregate_ids}

    async def _check_fresh(self, unit: Unit) -> None:
        """Begin again unless all that the answer is based on is as new as the store's."""
        based_on = unit.based_on
        if self._log.is_local or not based_on:
            return
        if await self._call(self._log.versions, list(based_on)) != based_on:
            raise _Again

    async def _refuse(self, unit: Unit, part: Dispatch[Any], refusal: Err[Any]) -> Outcome:
        await self._check_fresh(unit)
        if part.given_id and await self._known((part,)):
            raise _Again
        unit.is_sound = not unit.events and not unit.is_changed
        return refusal

    def _save(self, unit: Unit, part: Dispatch[Any], value: object, begun: int) -> Save:
        encode = self._mapper.encode
        answer = None if isinstance(value, Receipt) else _answer_type(part).dump_json(value)
        return Save(
            part.command_id,
            part.name,
            [encode(event) for event in unit.events[begun:]],
            tuple(unit.versions.items()),
            answer,
        )

    async def _commit(
        self,
        unit: Unit,
        parts: Sequence[Dispatch[Any]],
        values: Sequence[Any],
        saves: Sequence[Save],
    ) -> Outcome:
        verdict = await self._writer.write(saves)
        match verdict:
            case Committed(positions):
                unit.is_sound = True
                at = {s.command_id: p for s, p in zip(saves, positions, strict=True)}
                return Ok(
                    [
                        _complete(value, at.get(part.command_id, 0))
                        for part, value in zip(parts, values, strict=True)
                    ]
                )
            case Repeated():
                raise _Again
            case Stale():
                return Err(Conflict(tuple(unit.versions.items())))
            case Failed(reason, in_doubt):
                return await self._after_failure(parts, reason, in_doubt=in_doubt)

    async def _after_failure(
        self, parts: Sequence[Dispatch[Any]], reason: str, *, in_doubt: bool
    ) -> Outcome:
        if not in_doubt:
            return Err(EventStoreUnavailable(reason))
        try:
            known = await self._known(parts)
        except Exception:  # noqa: BLE001 - the store is failing; what counts is the doubt
            known = {}
        if len(known) == len(parts):
            return Ok([_answer_again(part, known[part.command_id]) for part in parts])
        return Err(OutcomeUnknown(parts[0].command_id))

    async def _known(self, parts: Iterable[Dispatch[Any]]) -> Known:
        found: Known = await self._call(self._log.commands, [part.command_id for part in parts])
        return found

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._log.is_local:
            return function(*args)
        return await self._platform.in_thread(function, *args)


_number = attrgetter("int")  # UUIDs compare by it, more slowly


def _complete(value: Any, position: int) -> Any:
    if not isinstance(value, Receipt) or value.repeated:
        return value
    return Receipt(value.command_id, value.aggregates, position)


def _answer_again(part: Dispatch[Any], first: RecordedCommand) -> Any:
    if first.command != part.name:
        raise CommandIdReused(part.command_id, first.command, part.name)
    if first.answer is None:
        return Receipt(first.command_id, first.aggregates, first.position, repeated=True)
    return _answer_type(part).validate_json(first.answer)


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
