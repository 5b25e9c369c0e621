"""Personal data: never shown by accident, sealed under its subject's key, erased with that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Generic, Protocol, TypeVar, get_args

from pydantic import GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

from leftfold.domain.errors import DomainError, LeftfoldError

T_co = TypeVar("T_co", covariant=True)

ERASED = "[erased]"
"""Stands where erased personal data is shown to others."""
MARK = "sealed:1:"
ID_LENGTH = 32


class PersonalDataErased(DomainError, message="this personal data was erased"):
    """Its subject was forgotten."""


class SubjectMissingError(
    LeftfoldError, message="{topic} has personal data, and does not say about whom"
):
    """An event holds personal data and its subject is `None`: an error in the program."""

    topic: str


class Key(Protocol):
    """The key of one subject, in this process: good for nothing once the subject is forgotten."""

    @property
    def id(self) -> str:
        """Its name: 32 hexadecimal digits, which say nothing about the subject."""
        ...

    def encrypt(self, plain: bytes) -> bytes:
        """Seal something. Raises `PersonalDataErased`."""
        ...

    def decrypt(self, sealed: bytes) -> bytes:
        """Open what was sealed. Raises `PersonalDataErased`."""
        ...


class Keys(ABC):
    """The keys of all subjects."""

    @abstractmethod
    def of(self, subject: str) -> Key | None:
        """Return a subject's key if this process has it at hand; never blocks."""

    @abstractmethod
    def provide(self, subjects: Iterable[str]) -> None:
        """Have the keys of subjects at hand; those that have none get one. May block."""

    @abstractmethod
    def find(self, key_id: str) -> Key:
        """Return a key by its name, also one that is gone. May block the first time."""


class Personal(Generic[T_co]):
    """A value about a person: `repr` and `str` hide it, `reveal` shows it.

    Fields of events, rows and answers are annotated `Personal[str]`. Where a runtime records an
    event the value is sealed under the key of the event's subject, and from then on opened anew
    by each `reveal`: when the subject is forgotten, it is gone wherever it is kept.
    """

    __slots__ = ("_key", "_open", "_token", "_value")

    def __init__(self, value: T_co) -> None:
        self._value: T_co | None = value
        self._key: Key | None = None
        self._token = ""
        self._open: Callable[[bytes], T_co] | None = None

    @classmethod
    def sealed(cls, token: str, keys: Keys, kind: Any) -> Personal[Any]:
        """Return what a token stands for; `kind` is the value's type."""
        personal: Personal[Any] = cls.__new__(cls)
        personal._hold(token, keys.find(token[len(MARK) : len(MARK) + ID_LENGTH]), kind)
        return personal

    def reveal(self) -> T_co:
        """Return the value. Raises `PersonalDataErased`."""
        if self._key is None or self._open is None:
            return self._value  # type: ignore[return-value]  # it is not sealed
        opened = self._open(self._key.decrypt(b64decode(self._token[len(MARK) + ID_LENGTH :])))
        note = _noting.get()
        if note is not None:
            note.append(self)
        return opened

    def reveal_or(self, default: object) -> object:
        """Return the value, or `default` if it was erased."""
        try:
            return self.reveal()
        except PersonalDataErased:
            return default

    @property
    def is_erased(self) -> bool:
        """The value is gone for good."""
        return self.reveal_or(_GONE) is _GONE

    @property
    def token(self) -> str:
        """What stands for the value where it is stored; empty before it is sealed."""
        return self._token

    def seal(self, key: Key, kind: Any) -> str:
        """Keep the value under a key only; return its token."""
        sealed = b64encode(key.encrypt(_adapter(kind).dump_json(self._value))).decode()
        self._hold(f"{MARK}{key.id}{sealed}", key, kind)
        return self._token

    def _hold(self, token: str, key: Key, kind: Any) -> None:
        self._token, self._key, self._value = token, key, None
        self._open = _adapter(kind).validate_json

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Personal):
            return False
        if self._token and self._token == other._token:
            return True
        return self.reveal_or(_GONE) == other.reveal_or(_ALSO_GONE)

    def __hash__(self) -> int:
        return hash(Personal)  # one for all: it must say nothing, and outlive the value

    def __repr__(self) -> str:
        return "Personal(***)"

    def __copy__(self) -> Personal[T_co]:
        return self  # nobody changes it; a copy would not be erased

    def __deepcopy__(self, _memo: object) -> Personal[T_co]:
        return self

    def __reduce__(self) -> tuple[type[Personal[T_co]], tuple[T_co]]:
        if self._token:
            msg = "sealed personal data does not leave its process"
            raise TypeError(msg)
        return Personal, (self.reveal(),)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        (kind,) = get_args(source) or (str,)

        def load(
            value: object,
            validate: core_schema.ValidatorFunctionWrapHandler,
            info: core_schema.ValidationInfo,
        ) -> Personal[Any]:
            if type(value) is str and isinstance(info.context, Keys) and value.startswith(MARK):
                return cls.sealed(value, info.context, kind)
            return cls(validate(value))

        def dump(personal: Personal[Any], info: core_schema.SerializationInfo) -> Any:
            if isinstance(info.context, Sealing):
                return info.context.write(personal, kind)
            return personal.reveal_or(ERASED)

        loaded = core_schema.with_info_wrap_validator_function(load, handler(kind))
        return core_schema.json_or_python_schema(
            json_schema=loaded,
            python_schema=core_schema.union_schema([core_schema.is_instance_schema(cls), loaded]),
            serialization=core_schema.plain_serializer_function_ser_schema(dump, info_arg=True),
        )


class Sealing:
    """Given to a serializer as its context: sealed values are written as their tokens.

    Those that are not sealed yet are sealed under a key, which is asked for when it is needed.
    """

    has_met_some = False
    """There was a personal value."""
    is_key_wanted = False
    """There was no key: what was written must not be used."""
    error: LeftfoldError | None = None
    """Why something cannot be sealed. Serializers would wrap it."""

    def __init__(self, key: Callable[[], Key | None] | None = None) -> None:
        """Seal under the key that is answered; without the question, write values as they are."""
        self._key = key

    def write(self, personal: Personal[Any], kind: Any) -> Any:
        """Return what stands for a value."""
        self.has_met_some = True
        if personal.token:
            return personal.token
        if self._key is None:
            return personal.reveal()
        try:
            key = self._key()
            if key is not None:
                return personal.seal(key, kind)
            self.is_key_wanted = True
        except LeftfoldError as error:
            self.error = error
        return ""


_GONE, _ALSO_GONE = object(), object()
_noting: ContextVar[list[Personal[Any]] | None] = ContextVar("leftfold_revealed", default=None)


@contextmanager
def noting() -> Iterator[list[Personal[Any]]]:
    """Note what sealed values are revealed inside of the block, in this task or thread."""
    noted: list[Personal[Any]] = []
    token = _noting.set(noted)
    try:
        yield noted
    finally:
        _noting.reset(token)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
