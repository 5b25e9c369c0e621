"""The mapper: events to stored bytes and back, by the model's own dictionary of topics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property, partial
from typing import Any, ClassVar
from uuid import UUID

from eventsourcing.domain import DomainEventProtocol
from eventsourcing.persistence import Mapper, StoredEvent
from pydantic import ValidationError
from pydantic_core import from_json, to_json

from leftfold.application.errors import (
    InvalidModelError,
    KeysUnavailable,
    UnknownTopicError,
    UnreadableEventError,
)
from leftfold.application.ports import EncodedEvent
from leftfold.domain import Aggregate, Event, Snapshot
from leftfold.domain.event import NOBODY, upcast, upcast_gap
from leftfold.domain.metadata import NO_METADATA, Metadata
from leftfold.domain.personal import Keys, UnsealedError, Writing

_METADATA = tuple(field.name for field in fields(Metadata))
_NOT_STORED = {"originator_id", "originator_version", "metadata"}


class KeysWanted(Exception):
    """An event cannot be encoded before its subject's key is at hand."""

    def __init__(self, subject: str) -> None:
        super().__init__()
        self.subject = subject


class EventMapper(Mapper[UUID]):
    """Maps the events and snapshots of certain aggregates, and no others.

    `EventMapper.of(Item)` is a class of its own, since the library makes mappers of followed
    applications again from the class alone. Compression and encryption of whole payloads by
    the library's settings apply.
    """

    types: ClassVar[dict[str, type[Event | Snapshot]]] = {}
    aggregate_topics: ClassVar[dict[str, str]] = {}
    """The aggregate's topic by the event's."""

    keys: Keys | None = None
    """Seal personal data; without them it is stored in the clear."""

    _last_metadata: tuple[Metadata, bytes] = NO_METADATA, b"}"

    first_versions: ClassVar[frozenset[str]] = frozenset()
    """The topics of events that were never changed: their state is read as it stands."""

    @classmethod
    def of(
        cls, *aggregates: type[Aggregate], also: Iterable[type[Event]] = ()
    ) -> type[EventMapper]:
        """Return the mapper class for these aggregates, and for events of others.

        Raises `InvalidModelError` for two types of one topic, for a missing topic, and for a gap
        in the chain of upcasters from version 1 to the present.
        """
        types: dict[str, type[Event | Snapshot]] = {}
        topics: dict[str, str] = {}
        owned: list[tuple[str, Sequence[type[Event | Snapshot]]]] = [
            (aggregate.TOPIC, (*aggregate.EVENTS, aggregate.SNAPSHOT)) for aggregate in aggregates
        ]
        for aggregate_topic, stored in (*owned, ("", tuple(also))):
            for event_type in stored:
                for topic in (event_type.TOPIC, *getattr(event_type, "ALIASES", ())):
                    if not topic or types.get(topic, event_type) != event_type:
                        raise InvalidModelError(f"{event_type.__name__}: topic missing or taken")
                    types[topic] = event_type
                    topics.setdefault(topic, aggregate_topic)
                gap = upcast_gap(event_type) if issubclass(event_type, Event) else None
                if gap is not None:
                    raise InvalidModelError(f"{event_type.__name__}: {gap} is missing")
        unchanged = {t for t, e in types.items() if getattr(e, "class_version", 0) == 1}
        return type(
            "EventMapper",
            (cls,),
            {"types": types, "aggregate_topics": topics, "first_versions": frozenset(unchanged)},
        )

    @classmethod
    def event_topics(cls) -> tuple[str, ...]:
        """Return the topics of all events, without the snapshots'."""
        return tuple(topic for topic, t in cls.types.items() if issubclass(t, Event))

    def to_stored_event(self, domain_event: DomainEventProtocol[UUID]) -> StoredEvent:
        """Encode an event or snapshot for the library; see `encode`. May wait for a key."""
        return StoredEvent(*self.encode_with_key(domain_event))

    def encode_with_key(self, event: Any) -> EncodedEvent:
        """Encode an event or snapshot; see `encode`. May wait for a key."""
        try:
            return self.encode(event)
        except KeysWanted as wanted:
            assert self.keys is not None  # noqa: S101 - they want it
            self.keys.provide([wanted.subject])
            return self.encode(event)

    def encode(self, event: Any) -> EncodedEvent:
        """Encode an event or snapshot as JSON.

        Raises `UnknownTopicError` and `KeysWanted`; for personal data `SubjectMissingError`,
        `OtherSubjectError`, `KeysUnavailable`, `PersonalDataErased`, in snapshots `UnsealedError`.
        """
        event_type = type(event)
        topic: str = event_type.TOPIC
        if self.types.get(topic) is not event_type:
            raise UnknownTopicError(topic or event_type.__name__)
        writing: Writing | None = None if self.keys is None else event.writing(self.keys)
        state: bytes = event_type.__pydantic_serializer__.to_json(
            event, exclude=_NOT_STORED, context=writing
        )
        if writing is not None:
            _check(writing, event)
        metadata = getattr(event, "metadata", NO_METADATA)
        class_version = getattr(event_type, "class_version", 1)
        if metadata is not NO_METADATA:
            last, beside = self._last_metadata
            if metadata is not last:  # the events of a command share it
                beside = _beside(metadata)
                self._last_metadata = metadata, beside
            state = state[:-1] + beside
        if class_version > 1:
            state = b'%s,"class_version":%d}' % (state[:-1], class_version)
        if self.compressor:
            state = self.compressor.compress(state)
        if self.cipher:
            state = self.cipher.encrypt(state)
        return EncodedEvent(event.originator_id, event.originator_version, topic, state)

    def to_domain_event(self, stored_event: StoredEvent) -> Any:
        """Decode a stored event or snapshot.

        Raises `UnknownTopicError`, `UnreadableEventError`, and `KeysUnavailable`.
        """
        return self.decode(
            _as_uuid(stored_event.originator_id),
            stored_event.originator_version,
            stored_event.topic,
            stored_event.state,
        )

    def decode(self, aggregate_id: UUID, version: int, topic: str, state: bytes) -> Any:
        """Decode what is stored at one version of an aggregate; see `to_domain_event`."""
        read = self._readers.get(topic)
        if read is None:
            raise UnknownTopicError(topic)
        try:
            event = read(state, context=self.keys)
        except KeysUnavailable:  # it may be read tomorrow
            raise
        except Exception as error:  # noqa: BLE001 - whatever the classes, ciphers and upcasters raise
            # Without its cause: that quotes the state, and personal data with it.
            reason = _reason(error)
            raise UnreadableEventError(topic, str(aggregate_id), version, reason) from None
        envelope = vars(event)
        envelope["originator_id"] = aggregate_id
        envelope["originator_version"] = version
        return event

    def decode_all(self, stored: Iterable[tuple[UUID, int, str, bytes]]) -> list[Any]:
        """Decode many, as `decode` does one."""
        return [self.decode(*each) for each in stored]

    @cached_property
    def _readers(self) -> Mapping[str, Callable[..., Event | Snapshot]]:
        """What reads a state of a topic: pydantic alone, where it is read as it stands."""
        plain = frozenset[str]() if self.cipher or self.compressor else self.first_versions
        return {
            topic: kind.__pydantic_validator__.validate_json
            if topic in plain
            else partial(self._read, topic, kind)
            for topic, kind in self.types.items()
        }

    def _read(
        self, topic: str, kind: type[Event | Snapshot], state: bytes, *, context: Keys | None
    ) -> Event | Snapshot:
        """Read a state that is encrypted, compressed, or may be of an older class version."""
        if self.cipher:
            state = self.cipher.decrypt(state)
        if self.compressor:
            state = self.compressor.decompress(state)
        if topic in self.first_versions:
            event: Event = kind.__pydantic_validator__.validate_json(state, context=context)
            return event
        parts = from_json(state)
        if issubclass(kind, Snapshot):
            parts |= {"originator_id": NOBODY, "originator_version": 0}  # until `decode` knows
        else:
            parts = upcast(kind, parts, parts.pop("class_version", 1))
        return kind.model_validate(parts, context=context)


def _check(writing: Writing, event: Any) -> None:
    """Raise what a serializer would have wrapped."""
    if writing.error is not None:
        raise writing.error
    if writing.is_key_wanted:
        raise KeysWanted(event.subject)
    if writing.found_unsealed:
        raise UnsealedError(event.TOPIC)


def _beside(metadata: Metadata) -> bytes:
    """Return the end of an event's state."""
    known = {name: value for name in _METADATA if (value := getattr(metadata, name))}
    return b',"metadata":%s}' % to_json(known) if known else b"}"


def _reason(error: Exception) -> str:
    """Say what is wrong with a state without quoting it."""
    if isinstance(error, ValidationError):
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        return "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in faults)
    return str(error) if isinstance(error, LookupError) else type(error).__name__


def _as_uuid(value: UUID | str) -> UUID:
    return value if isinstance(value, UUID) else UUID(value)
