"""A wrapper for personal data, so that it is never shown by accident and can one day be erased."""

from __future__ import annotations

from typing import Generic, TypeVar, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

T_co = TypeVar("T_co", covariant=True)


class Personal(Generic[T_co]):
    """A value about a person: `repr` and `str` hide it, `reveal` shows it.

    Fields of events are annotated `Personal[str]`; what is stored is the value itself.
    """

    __slots__ = ("_value",)

    def __init__(self, value: T_co) -> None:
        self._value = value

    def reveal(self) -> T_co:
        """Return the value."""
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Personal) and self._value == other.reveal()

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "Personal(***)"

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        (inner,) = get_args(source) or (str,)
        wrapped = core_schema.no_info_after_validator_function(cls, handler(inner))
        return core_schema.json_or_python_schema(
            json_schema=wrapped,
            python_schema=core_schema.union_schema([core_schema.is_instance_schema(cls), wrapped]),
            serialization=core_schema.plain_serializer_function_ser_schema(
                cls.reveal, return_schema=handler(inner)
            ),
        )
