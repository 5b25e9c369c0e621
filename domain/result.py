"""What an operation answers when a refusal is expected: a value or an error, never both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, NoReturn, TypeAlias, TypeVar

T_co = TypeVar("T_co", covariant=True)
E_co = TypeVar("E_co", covariant=True)
T = TypeVar("T")
E = TypeVar("E")
U = TypeVar("U")
F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class Ok(Generic[T_co]):
    """The operation was done; `value` is its answer."""

    value: T_co

    def is_ok(self) -> Literal[True]:
        """Tell that there is a value."""
        return True

    def unwrap(self) -> T_co:
        """Return the value."""
        return self.value

    def unwrap_or(self, default: object) -> T_co:  # noqa: ARG002 - mirrors Err.unwrap_or
        """Return the value; `default` is not needed."""
        return self.value

    def map(self, function: Callable[[T_co], U]) -> Ok[U]:
        """Return `Ok` of the function's answer."""
        return Ok(function(self.value))

    def map_err(self, function: Callable[[NoReturn], object]) -> Ok[T_co]:  # noqa: ARG002 - mirrors Err.map_err
        """Return this `Ok`; there is no error to map."""
        return self

    def and_then(self, function: Callable[[T_co], Result[U, F]]) -> Result[U, F]:
        """Return what the next operation answers."""
        return function(self.value)


@dataclass(frozen=True, slots=True)
class Err(Generic[E_co]):
    """The operation was refused; `error` carries the facts."""

    error: E_co

    def is_ok(self) -> Literal[False]:
        """Tell that there is none."""
        return False

    def unwrap(self) -> NoReturn:
        """Raise the error itself if it is an exception, else `UnwrapError` around it."""
        if isinstance(self.error, BaseException):
            raise self.error
        raise UnwrapError(self.error)

    def unwrap_or(self, default: U) -> U:
        """Return `default`."""
        return default

    def map(self, function: Callable[[NoReturn], object]) -> Err[E_co]:  # noqa: ARG002 - mirrors Ok.map
        """Return this `Err`; there is no value to map."""
        return self

    def map_err(self, function: Callable[[E_co], F]) -> Err[F]:
        """Return `Err` of the function's answer."""
        return Err(function(self.error))

    def and_then(self, function: Callable[[NoReturn], object]) -> Err[E_co]:  # noqa: ARG002 - mirrors Ok.and_then
        """Return this `Err`; the next operation is not begun."""
        return self


Result: TypeAlias = Ok[T] | Err[E]
"""`Ok[T] | Err[E]`: match on the two classes, and type checkers see that nothing is left."""


class UnwrapError(Exception):
    """`unwrap` was called on an `Err` whose error is not an exception."""

    def __init__(self, error: object) -> None:
        super().__init__(f"unwrap() on Err({error!r})")
        self.error = error
