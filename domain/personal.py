"""Personal data: never shown by accident, sealed under its subject's key, erased with that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, get_args

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic_core import CoreSchema, core_schema
from typing_extensions import override

from leftfold.domain.errors import DomainError, LeftfoldError

if TYPE_CHECKING:
    from leftfold.domain.event import Event

T_co = TypeVar("T_co", covariant=True)

ERASED = "[erased]"
"""Stands where erased personal data is shown to others."""
MARK = "sealed:1:"
BODY = len(MARK) + 32
"""Where what was sealed begins in a token, after the name of its key."""


class PersonalDataErased(DomainError, message="this personal data was erased"):
    """Its subject was forgotten."""


class SubjectMissingError(
    LeftfoldError, message="{topic} has personal data, and does not say about whom"
):
    """An event holds personal data and its subject is `None`: an error in the program."""

    topic: str


class OtherSubjectError(
    LeftfoldError,
    message="{topic} has personal data that is sealed for another subject or store: "
    "make a new one with Personal(value.reveal())",
):
    """An event holds what would not be erased with its subject: an error in the program."""

    topic: str


class UnsealedError(LeftfoldError, message="{topic} has personal data that no event holds"):
    """A snapshot holds what its aggregate made of personal data, and would outlive it."""

    topic: str


class Key(Protocol):
    """The key of one subject, in this process: good for nothing once the subject is forgotten."""

    @property
    def id(self) -> str:
        """Its name: 32 hexadecimal digits, which say nothing about the subject."""
        ...

    @property
    def is_gone(self) -> bool:
        """Its subject was forgotten."""
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

    What is validated gets a copy of its own: one that the program made may be recorded in events
    about several subjects, in several stores, and is never sealed itself. So it can be pickled,
    as the value that it is; what is sealed cannot.
    """

    __slots__ = ("_held",)

    def __init__(self, value: T_co) -> None:
        # One attribute, replaced as a whole: other threads may reveal it while it is sealed.
        self._held: _Clear | _Sealed = _Clear(value)

    @classmethod
    def stored(cls, text: str, keys: Keys, kind: Any) -> Personal[Any]:
        """Return what a text in a column stands for; `kind` is the value's type."""
        if text.startswith(MARK):
            return _holding(_Sealed(text, keys.find(text[len(MARK) : BODY]), kind))
        value = _adapter(kind).validate_json(text)
        return _holding(_Clear(value, is_copy=True, is_stored=True))

    def reveal(self) -> T_co:
        """Return the value. Raises `PersonalDataErased`."""
        held = self._held
        if isinstance(held, _Clear):
            value: T_co = held.value
            return value
        opened: T_co = _adapter(held.kind).validate_json(
            held.key.decrypt(b64decode(held.token[BODY:]))
        )
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
        held = self._held
        return "" if isinstance(held, _Clear) else held.token

    def text(self, kind: Any) -> str:
        """Return what stands for it in a column; `stored` reads it. Raises `ValueError`."""
        held = self._held
        if isinstance(held, _Sealed):
            return held.token
        if held.is_stored:
            return _adapter(kind).dump_json(held.value, warnings="none").decode()
        raise ValueError(UNSEALED)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Personal):
            return False
        if self.token and self.token == other.token:
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
        if self.token:
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
            if isinstance(value, Personal):
                held = value._held
                if isinstance(held, _Sealed):
                    return value
                fitting = held.fitting
                if fitting is None or fitting[0] is not kind:
                    fitting = held.fit(kind, validate)
                return _holding(fitting[1])
            keys = info.context
            if not isinstance(keys, Keys):
                return _holding(_Clear(validate(value), is_copy=True))
            if type(value) is str and value.startswith(MARK):
                return _holding(_Sealed(value, keys.find(value[len(MARK) : BODY]), kind))
            return _holding(_Clear(validate(value), is_copy=True, is_stored=True))

        def dump(personal: Personal[Any], info: core_schema.SerializationInfo) -> Any:
            if isinstance(info.context, Writing):
                return info.context.write(personal, kind)
            return personal.reveal_or(ERASED)

        return core_schema.with_info_wrap_validator_function(
            load,
            handler(kind),
            serialization=core_schema.plain_serializer_function_ser_schema(dump, info_arg=True),
        )


class _Clear:
    """A value that is not sealed. The copies of a `Personal` share it.

    So many lines of one invoice cost one check and one sealing.
    """

    __slots__ = ("fitting", "is_copy", "is_stored", "sealed", "value")

    def __init__(self, value: Any, *, is_copy: bool = False, is_stored: bool = False) -> None:
        self.value = value
        self.is_copy = is_copy
        """It was validated: who holds it may hold it sealed. Else it is the program's own."""
        self.is_stored = is_stored
        """It was read from where it lies in the clear: from before there were keys."""
        self.fitting: tuple[Any, _Clear] | None = None
        """The type that it was asked to be last, and the value as one of that."""
        self.sealed: _Sealed | None = None
        """What it was sealed as last."""

    def fit(self, kind: Any, validate: Callable[[Any], Any]) -> tuple[Any, _Clear]:
        """Make the value one of a type. Raises pydantic's `ValidationError`."""
        value = validate(self.value)
        is_same = self.is_copy and value is self.value
        copy = self if is_same else _Clear(value, is_copy=True, is_stored=self.is_stored)
        self.fitting = kind, copy
        return self.fitting

    def seal(self, key: Key, kind: Any) -> _Sealed:
        """Return the value sealed under a key."""
        sealed = self.sealed
        if sealed is None or sealed.key is not key or sealed.kind is not kind:
            plain = _adapter(kind).dump_json(self.value, warnings="none")
            token = f"{MARK}{key.id}{b64encode(key.encrypt(plain)).decode()}"
            sealed = self.sealed = _Sealed(token, key, kind)
        return sealed


class _Sealed:
    """A value under a key; `kind` is its type."""

    __slots__ = ("key", "kind", "token")

    def __init__(self, token: str, key: Key, kind: Any) -> None:
        self.token = token
        self.key = key
        self.kind = kind


def _holding(held: _Clear | _Sealed) -> Personal[Any]:
    personal: Personal[Any] = Personal.__new__(Personal)
    personal._held = held
    return personal


class Writing(ABC):
    """Given to a serializer as its context: says what is written in a personal value's place."""

    error: LeftfoldError | None = None
    """Why something cannot be written. Serializers would wrap it."""
    is_key_wanted = False
    """A key is not at hand: what was written must not be used."""
    found_unsealed = False
    """There was a value that no event holds: what was written must not be used."""

    @abstractmethod
    def write(self, personal: Personal[Any], kind: Any) -> Any:
        """Return what stands for a value."""


class SealingOf(Writing):
    """Seals the personal data of an event under its subject's key, and writes tokens.

    What is sealed already must be sealed under that key, or it would not be erased with it.
    """

    _key: Key | None = None

    def __init__(self, event: Event, keys: Keys) -> None:
        """Seal for an event; the key is looked for when the first value is met."""
        self._event = event
        self._keys = keys

    @override
    def write(self, personal: Personal[Any], kind: Any) -> str:
        held = personal._held
        if isinstance(held, _Sealed) and held.key.is_gone:
            return held.token  # nothing is left to be erased
        try:
            key = self._key or self._find()
            if key is None:
                self.is_key_wanted = True
                return ""
            if isinstance(held, _Clear):
                is_copy, held = held.is_copy, held.seal(key, kind)
                if is_copy:
                    personal._held = held
            elif held.key is not key:
                raise OtherSubjectError(self._event.TOPIC)
        except LeftfoldError as error:
            self.error = error
            return ""
        return held.token

    def _find(self) -> Key | None:
        subject = self._event.subject
        if subject is None:
            raise SubjectMissingError(self._event.TOPIC)
        self._key = self._keys.of(subject)
        return self._key


class TokensOnly(Writing):
    """Writes what is sealed as its token, and in the clear only what lies so in the store.

    Copies of what some events hold are sealed as it is there.
    """

    def __init__(self, keys: Keys, events: Iterable[Event] = ()) -> None:
        """Write beside events, which were sealed under these keys."""
        self._keys = keys
        self._events = events

    @override
    def write(self, personal: Personal[Any], kind: Any) -> Any:
        held = personal._held
        if isinstance(held, _Sealed):
            return held.token
        sealed = held.sealed
        if sealed is not None and self._is_of_events(sealed.key):
            if held.is_copy:
                personal._held = sealed
            return sealed.token
        if held.is_stored:
            return held.value
        self.found_unsealed = True
        return ""

    def _is_of_events(self, key: Key) -> bool:
        try:
            return any(self._keys.of(event.subject or "") is key for event in self._events)
        except LeftfoldError as error:
            self.error = error
            return False


class Noticing(Writing):
    """Notices personal values, and writes none."""

    has_met_some = False
    """There was a personal value."""

    @override
    def write(self, personal: Personal[Any], kind: Any) -> str:
        self.has_met_some = True
        return ""


class Showing(Writing):
    """Writes values in the clear, and `[erased]` in the place of those that are erased."""

    @override
    def write(self, personal: Personal[Any], kind: Any) -> Any:
        try:
            return personal.reveal_or(ERASED)
        except LeftfoldError as error:
            self.error = error
            return ERASED


UNSEALED = "personal data that no event holds"
_GONE, _ALSO_GONE = object(), object()
_noting: ContextVar[list[Personal[Any]] | None] = ContextVar("leftfold_revealed", default=None)


@contextmanager
def noting() -> Iterator[list[Personal[Any]]]:
    """Note what sealed values are revealed inside of the block, in this task or thread.

    Blocks nest: what is noted inside is noted outside too.
    """
    noted: list[Personal[Any]] = []
    token = _noting.set(noted)
    try:
        yield noted
    finally:
        _noting.reset(token)
        note(noted)


def note(revealed: Iterable[Personal[Any]]) -> None:
    """Note values that were revealed for this task by another."""
    outer = _noting.get()
    if outer is not None:
        outer.extend(revealed)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    # As text what JSON has no form for; and errors must not quote the value.
    forms = ConfigDict(
        hide_input_in_errors=True,
        ser_json_bytes="base64",
        val_json_bytes="base64",
        ser_json_inf_nan="strings",
    )
    try:
        return TypeAdapter(kind, config=forms)
    except PydanticUserError:  # a type with a configuration of its own
        return TypeAdapter(kind)


def is_personal(kind: Any) -> bool:
    """Tell whether a type is `Personal`, or a union with it."""
    return getattr(kind, "__origin__", kind) is Personal or any(map(is_personal, get_args(kind)))
