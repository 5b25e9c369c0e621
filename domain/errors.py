"""The error tree: exception classes that carry facts, compare by them and read as a sentence."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, dataclass_transform

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass_transform(eq_default=True)
class LeftfoldError(Exception):
    """Root of every error of leftfold and of the models built on it.

    A subclass declares its facts as annotated fields and its sentence as a format string:

        class InsufficientStock(DomainError, message="{sku}: {requested} asked, {available} left"):
            sku: str
            requested: int
            available: int

    Errors of one class with equal facts are equal. They pickle, and pydantic serialises them as
    an object with `error` (the class's name), `message` and the facts, personal ones hidden.
    """

    _message: ClassVar[str] = ""

    def __init_subclass__(cls, *, message: str = "", **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if message:
            cls._message = message
        # Not frozen: the interpreter and contextlib write __traceback__ on exceptions.
        dataclass(eq=True, repr=False, unsafe_hash=True)(cls)

    def facts(self) -> dict[str, object]:
        """Return the error's facts by name."""
        if type(self) is LeftfoldError:  # alone is no dataclass: it has no facts
            return {}
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]  # subclasses are

    def __str__(self) -> str:
        return self._message.format(**self.facts()) or type(self).__name__

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={value!r}" for name, value in self.facts().items())
        return f"{type(self).__name__}({facts})"

    def __reduce__(self) -> tuple[type[LeftfoldError], tuple[object, ...]]:
        return type(self), tuple(self.facts().values())

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        from leftfold.domain.personal import Personal  # which has errors of its own

        def dump(error: LeftfoldError) -> dict[str, object]:
            facts = {
                name: str(value) if isinstance(value, Personal) else value
                for name, value in error.facts().items()
            }
            return {"error": type(error).__name__, "message": str(error), **facts}

        return core_schema.is_instance_schema(
            cls,
            serialization=core_schema.plain_serializer_function_ser_schema(dump),
        )


class DomainError(LeftfoldError):
    """A rule of the domain refuses: expected, and turned into `Err` by the bus."""


class InvalidAggregateError(LeftfoldError, message="{aggregate}: {reason}"):
    """An aggregate's class and its events do not fit together: an error in the program."""

    aggregate: str
    reason: str


class AggregateNotFound(DomainError, message="no {aggregate_type} {aggregate_id}"):
    """There is no stream for this aggregate."""

    aggregate_type: str
    aggregate_id: str
