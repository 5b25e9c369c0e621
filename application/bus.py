"""The buses: one way in for commands, one for queries."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar
from uuid import UUID, uuid4

from pydantic import ConfigDict, SkipValidation, ValidationError

from leftfold.application.errors import (
    AlreadyHandledError,
    DispatchError,
    InvalidAnswerError,
    NoHandlerError,
    ValidationFailed,
)
from leftfold.application.messages import Command, Handler, Handling, Message, Query
from leftfold.application.receipt import Receipt
from leftfold.domain import DomainError, Err, Metadata, Ok, Result
from leftfold.domain.metadata import NO_METADATA

T = TypeVar("T")
E = TypeVar("E")
M = TypeVar("M", bound=Message[Any, Any])

_described: ContextVar[Metadata] = ContextVar("leftfold_described", default=NO_METADATA)


@contextmanager
def described(
    *, correlation_id: str | None = None, causation_id: str | None = None, user: str | None = None
) -> Iterator[Metadata]:
    """Let the commands dispatched inside of the block have this metadata.

    What is not given stays as it is outside: a web program names the request and its user once,
    where requests come in. Raises `InvalidMetadataError`.
    """
    outer = _described.get()
    metadata = Metadata(
        outer.correlation_id if correlation_id is None else correlation_id,
        outer.causation_id if causation_id is None else causation_id,
        outer.user if user is None else user,
    ).check()
    token = _described.set(metadata)
    try:
        yield metadata
    finally:
        _described.reset(token)


Outcome: TypeAlias = Result[Any, Any]  # inside the bus, where the message's own types are erased


class Dispatch(NamedTuple, Generic[M]):
    """One message on its way, with what the bus knows about it."""

    message: M
    handling: Handling
    command_id: UUID
    """Identifies the command; a repetition carries the same."""
    after: Receipt | None = None
    """Answer from views that have seen what this receipt's command wrote."""
    metadata: Metadata = NO_METADATA
    """What the command's events get; its id stands in for a cause that is not given."""
    consistency: tuple[str, ...] = ()
    """Answer when views of these names have seen what the command wrote."""

    @property
    def name(self) -> str:
        """The message's type name."""
        return type(self.message).__name__


class Batch(Command[Any, Any]):
    """Several commands to carry out in order and in one transaction, all or none."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    parts: tuple[SkipValidation[Dispatch[Any]], ...]


Step: TypeAlias = Callable[[Dispatch[Any]], Awaitable[Outcome]]
Middleware: TypeAlias = Callable[[Dispatch[Any], Step], Awaitable[Outcome]]
"""Called around every dispatch, outermost first: `await call_next(dispatch)` goes on inward."""


async def handle(dispatch: Dispatch[Any]) -> Outcome:
    """Call the handler: the innermost step where nothing else is wired."""
    try:
        answer = dispatch.handling.handler(dispatch.message)
        return checked(dispatch, await answer if isawaitable(answer) else answer)
    except (DomainError, DispatchError) as error:
        return Err(error)


def checked(dispatch: Dispatch[Any], answer: Outcome) -> Outcome:
    """Pass a result on. Raises `InvalidAnswerError` for anything else."""
    if not isinstance(answer, (Ok, Err)):
        raise InvalidAnswerError(dispatch.name, f"{type(answer).__name__}, neither Ok nor Err")
    return answer


class Bus(Generic[M]):
    """Handlers by message type, behind an ordered row of middleware."""

    def __init__(
        self,
        middleware: Sequence[Middleware] = (),
        innermost: Step = handle,
        new_id: Callable[[], UUID] = uuid4,
    ) -> None:
        """Make a bus.

        `middleware` is ordered outermost first; `innermost` calls the handler; `new_id` makes
        the ids of commands that were given none.
        """
        self._new_id = new_id
        self._handlings: dict[type[Any], Handling] = {}
        self._by_name: dict[str, type[M]] = {}
        self._step = innermost
        for around in reversed(middleware):
            self._step = _wrap(around, self._step)

    def add(self, *handlings: Handling) -> None:
        """Register handlers, as `MessageType.handled_by(handler)` makes them.

        Raises `AlreadyHandledError` for a second handler of one message type.
        """
        for handling in handlings:
            message_type: type[Any] = handling.message_type
            if message_type in self._handlings or message_type.__name__ in self._by_name:
                raise AlreadyHandledError(message_type.__name__)
            self._handlings[message_type] = handling
            self._by_name[message_type.__name__] = message_type

    @property
    def names(self) -> tuple[str, ...]:
        """The registered message types' names, sorted."""
        return tuple(sorted(self._by_name))

    def parse(
        self, name: str, data: Mapping[str, object] | str | bytes
    ) -> Result[M, ValidationFailed]:
        """Make a message from outside input: a mapping, or a JSON document.

        An unknown name, a missing or unknown field and a wrong value give `ValidationFailed`.
        """
        message_type = self._by_name.get(name)
        if message_type is None:
            return Err(ValidationFailed(name, (("name", "nothing of this name is registered"),)))
        try:
            if isinstance(data, str | bytes):
                return Ok(message_type.model_validate_json(data))
            return Ok(message_type.model_validate(data))
        except ValidationError as error:
            reasons = tuple(
                (".".join(map(str, fault["loc"])), fault["msg"])
                for fault in error.errors(
                    include_url=False, include_input=False, include_context=False
                )
            )
            return Err(ValidationFailed(name, reasons))

    def _find(self, message: Message[Any, Any]) -> Handling:
        message_type = type(message)
        handling = self._handlings.get(message_type)
        if handling is None:
            if getattr(message_type, "execute", Message.execute) is Message.execute:
                raise NoHandlerError(message_type.__name__)
            handling = Handling(message_type, _execute)
        return handling


class CommandBus(Bus[Command[Any, Any]]):
    """Takes commands to their handlers."""

    def register(self, command_type: type[Command[T, E]], handler: Handler[Any, T, E]) -> None:
        """Register a handler. `add(CommandType.handled_by(handler))` is the same, typed better.

        Raises `AlreadyHandledError` for a second handler of one command type.
        """
        self.add(Handling(command_type, handler))

    async def dispatch(
        self,
        command: Command[T, E],
        *,
        command_id: UUID | None = None,
        metadata: Metadata | None = None,
        consistency: Sequence[str] = (),
    ) -> Result[T, E | DispatchError]:
        """Carry out a command, at most once for each `command_id` (made if absent).

        Its events get the `metadata`, or else that of `with described(…)` around the call. With
        `consistency` a runtime answers when views of these names have seen what was written, or
        after its `view_timeout`: then the receipt names those that are `behind`.
        `Err` holds a refusal of the domain or a `DispatchError`, and then nothing was written,
        unless it is `OutcomeUnknown`. Raises `NoHandlerError`, and whatever bug the handler has.
        """
        return await self._step(
            Dispatch(
                command,
                self._find(command),
                command_id or self._new_id(),
                metadata=_described.get() if metadata is None else metadata.check(),
                consistency=tuple(consistency),
            )
        )

    async def dispatch_all(
        self,
        commands: Sequence[Command[T, E]],
        *,
        command_ids: Sequence[UUID] | None = None,
        metadata: Metadata | None = None,
        consistency: Sequence[str] = (),
    ) -> Result[tuple[T, ...], E | DispatchError]:
        """Carry out several commands in order and in one transaction, all or none.

        Commands whose `command_id` was carried out before are not carried out again; their first
        answers are given. The first refusal refuses them all. After `OutcomeUnknown` it is safe to
        dispatch them again with the same ids. Raises `ValueError` for two equal ids.
        """
        ids = command_ids if command_ids is not None else [self._new_id() for _ in commands]
        if len(set(ids)) < len(ids):
            msg = "a command_id stands for one command"
            raise ValueError(msg)
        described = _described.get() if metadata is None else metadata.check()
        parts = tuple(
            Dispatch(command, self._find(command), command_id, metadata=described)
            for command, command_id in zip(commands, ids, strict=True)
        )
        batch = Batch.model_construct(parts=parts)
        if not parts:
            return Ok(())
        whole = Dispatch(batch, _BATCH, parts[0].command_id, consistency=tuple(consistency))
        outcome = await self._step(whole)
        return Ok(tuple(outcome.value)) if isinstance(outcome, Ok) else outcome


class QueryBus(Bus[Query[Any, Any]]):
    """Takes queries to their handlers."""

    def register(self, query_type: type[Query[T, E]], handler: Handler[Any, T, E]) -> None:
        """Register a handler. `add(QueryType.handled_by(handler))` is the same, typed better.

        Raises `AlreadyHandledError` for a second handler of one query type.
        """
        self.add(Handling(query_type, handler))

    async def dispatch(
        self, query: Query[T, E], *, after: Receipt | None = None
    ) -> Result[T, E | DispatchError]:
        """Answer a query, from views that have seen `after` if a receipt is given.

        Raises `NoHandlerError`, and whatever bug the handler has.
        """
        return await self._step(Dispatch(query, self._find(query), _NO_COMMAND, after=after))

    async def answer(
        self, query: Query[T, E], *, after: Receipt, timeout: float | None = None
    ) -> Result[Answer[T], E | DispatchError]:
        """Answer a query as `dispatch` does, and where views do not get there in time, from older.

        The answer says how far behind it is. Waits `timeout` seconds (default: the runtime's
        `view_timeout`).
        """
        patience = Patience(timeout)
        token = current_patience.set(patience)
        try:
            outcome = await self.dispatch(query, after=after)
        finally:
            current_patience.reset(token)
        return Ok(Answer(outcome.value, patience.lag)) if isinstance(outcome, Ok) else outcome


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """An answer that may be older than was asked for."""

    value: T
    lag: int
    """Positions in the log that were asked for and not seen yet; 0 if it is as new as asked for."""

    @property
    def is_stale(self) -> bool:
        """Tell whether it is older than was asked for."""
        return self.lag > 0


class Patience:
    """How long a query waits for views that are behind; then it makes do with them."""

    def __init__(self, timeout: float | None) -> None:
        """Wait so many seconds."""
        self.timeout = timeout
        self.lag = 0
        """Positions that an answer is behind."""


current_patience: ContextVar[Patience | None] = ContextVar("leftfold_patience", default=None)
"""None: a view that is behind is an error."""

_NO_COMMAND = UUID(int=0)


async def _carry_out_each(batch: Batch) -> Outcome:
    """Carry out a batch where nothing is wired that knows transactions."""
    values = []
    for part in batch.parts:
        answer = await handle(part)
        if isinstance(answer, Err):
            return answer
        values.append(answer.value)
    return Ok(values)


_BATCH = Handling(Batch, _carry_out_each)


def _execute(message: Message[Any, Any]) -> Awaitable[Outcome]:
    return message.execute()


def _wrap(around: Middleware, inner: Step) -> Step:
    def step(dispatch: Dispatch[Any]) -> Awaitable[Outcome]:
        return around(dispatch, inner)

    return step
