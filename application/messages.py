"""Commands and queries: typed messages that know what answers them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict

from leftfold.application.errors import NoHandlerError
from leftfold.domain import Result

T = TypeVar("T")
E = TypeVar("E")
M_contra = TypeVar("M_contra", contravariant=True)
T_co = TypeVar("T_co", covariant=True)
E_co = TypeVar("E_co", covariant=True)

MaybeAwaitable: TypeAlias = T | Awaitable[T]


class Handler(Protocol[M_contra, T_co, E_co]):
    """Answers one message; a plain or an async callable."""

    def __call__(self, message: M_contra, /) -> MaybeAwaitable[Result[T_co, E_co]]:
        """Answer the message."""
        ...


CommandHandler: TypeAlias = Handler
QueryHandler: TypeAlias = Handler


@dataclass(frozen=True, slots=True)
class Handling:
    """A message type with its handler, as `handled_by` makes it and `bus.add` takes it."""

    message_type: type[Message[Any, Any]]
    handler: Callable[[Any], MaybeAwaitable[Result[Any, Any]]]
    blocking: bool = False
    """The handler blocks, and runs in a thread of its own."""


class Message(BaseModel, Generic[T, E]):
    """What commands and queries have in common: frozen data, and the types of their answer."""

    # Errors without the input: it may be personal, and they are logged.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    async def execute(self) -> Result[T, E]:
        """Answer the message itself; called where no handler is registered.

        Raises `NoHandlerError` unless a subclass overrides it.
        """
        raise NoHandlerError(type(self).__name__)

    @classmethod
    def handled_by(
        cls,
        handler: Callable[[Self], MaybeAwaitable[Result[T, E]]],
        *,
        blocking: bool = False,
    ) -> Handling:
        """Pair this message type with its handler.

        Type checkers refuse a handler of another message or with another answer.
        """
        return Handling(cls, handler, blocking)


class Command(Message[T, E], Generic[T, E]):
    """A wish to change something, in the imperative: `SellStock(sku="A", quantity=2)`.

    `T` is what a handler answers (usually `Receipt`), `E` the refusals it may give.
    """


class Query(Message[T, E], Generic[T, E]):
    """A question that changes nothing."""
