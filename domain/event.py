"""Events: what happened, as pydantic models that the eventsourcing library can store and replay."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast
from uuid import UUID, uuid5

from eventsourcing.domain import (
    CanInitAggregate,
    CanMutateAggregate,
    OriginatorIDError,
    OriginatorVersionError,
)
from pydantic import AwareDatetime, BaseModel, ConfigDict

from leftfold.domain import metadata
from leftfold.domain.metadata import NO_METADATA, Metadata
from leftfold.domain.personal import Keys, Personal, SealingOf, Showing, Writing

if TYPE_CHECKING:
    from leftfold.domain.aggregate import Aggregate

TAggregate = TypeVar("TAggregate")

NOBODY = UUID(int=0)
WHEN_RECORDED = datetime.min.replace(tzinfo=UTC)
"""Stands for "not given": the event occurred when it was recorded."""
ENVELOPE = frozenset(
    {"originator_id", "originator_version", "timestamp", "occurred_at", "metadata"}
)


class Event(BaseModel, CanMutateAggregate[UUID]):
    """Something that happened to one aggregate.

    A subclass names its stable `topic`, declares its facts as fields, and says in `apply` what
    it does to the aggregate:

        class StockReceived(Event, topic="leftfold.item.stock_received"):
            quantity: int

            def apply(self, item: Item) -> None:
                item.on_hand += self.quantity

    `Aggregate.record` fills in the envelope: whose event it is, which version (1, 2, …), when it
    was recorded. `occurred_at` may be given, and is otherwise the time of recording.
    A field that is added, renamed or removed raises `class_version` (in the class body) and adds
    `upcast_vN_vM(state)`, a static method that turns the older stored state into the newer.
    An event whose personal data is not about its aggregate names the field that says about whom:
    `subject="customer_id"`.
    An event whose topic is changed names the topics that it had before as `aliases=("…",)`.
    """

    # Errors without the input: it may be personal, and they are logged.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    TOPIC: ClassVar[str] = ""
    ALIASES: ClassVar[tuple[str, ...]] = ()
    SUBJECT: ClassVar[str] = ""
    class_version: ClassVar[int] = 1

    originator_id: UUID = NOBODY
    originator_version: int = 0
    timestamp: AwareDatetime = WHEN_RECORDED
    occurred_at: AwareDatetime = WHEN_RECORDED
    metadata: Metadata = NO_METADATA

    def __init_subclass__(
        cls,
        *,
        topic: str = "",
        aliases: tuple[str, ...] = (),
        subject: str = "",
        **kwargs: Any,
    ) -> None:
        # The library's __init_subclass__ takes no arguments; pydantic's metaclass reads its own.
        super().__init_subclass__()
        if topic:
            cls.TOPIC, cls.ALIASES, cls.SUBJECT = topic, aliases, subject

    @property
    def recorded_at(self) -> datetime:
        """When the event was recorded (UTC)."""
        return self.timestamp

    @property
    def subject(self) -> str | None:
        """Whom the event's personal data is about: by default its aggregate, by its id."""
        if not self.SUBJECT:
            return str(self.originator_id)
        named = getattr(self, self.SUBJECT)
        if isinstance(named, Personal):
            named = named.reveal()
        return None if named is None else str(named)

    def writing(self, keys: Keys) -> Writing:
        """Say how personal data is written: sealed for whom it is about."""
        return SealingOf(self, keys)

    def facts(self) -> dict[str, object]:
        """Return the event's own fields, without the envelope."""
        return {name: value for name, value in self.__dict__.items() if name not in ENVELOPE}

    def stamp(self, aggregate_id: UUID, version: int, recorded_at: datetime) -> None:
        """Fill in the envelope, before anyone else sees the event.

        Raises `ValueError` the second time: an event is recorded once.
        """
        envelope = vars(self)  # the model is frozen for everyone but its aggregate
        if envelope["originator_version"]:
            msg = f"this {type(self).__name__} was recorded before"
            raise ValueError(msg)
        envelope["originator_id"] = aggregate_id
        envelope["originator_version"] = version
        envelope["timestamp"] = recorded_at
        occurred_at: datetime = envelope["occurred_at"]
        if occurred_at == WHEN_RECORDED:
            envelope["occurred_at"] = recorded_at
        elif occurred_at.tzinfo is not UTC:
            envelope["occurred_at"] = occurred_at.astimezone(UTC)
        envelope["metadata"] = metadata.current()

    # Positional, so that each event may name its aggregate as it likes.
    def apply(self, aggregate: Any, /) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change the aggregate as the event says; nothing, unless a subclass overrides it."""

    def mutate(self, aggregate: TAggregate | None) -> TAggregate:
        """Apply the event to its aggregate, which must be at the version before.

        Raises `OriginatorIDError` or `OriginatorVersionError` for another's event or a gap.
        """
        target: Any = aggregate  # the library types it by its own base class
        whose = self.originator_id
        if whose is not target._id and whose != target._id:  # the first is quicker, and usual
            raise OriginatorIDError(whose, target._id)
        if self.originator_version != target._version + 1:
            raise OriginatorVersionError(self.originator_version, target._version + 1)
        self.apply(target)
        target._version = self.originator_version
        target._modified_on = self.timestamp
        made: TAggregate = target  # `cast` would be a call, once an event
        return made


class Created(Event, CanInitAggregate[UUID]):  # pyright: ignore[reportIncompatibleMethodOverride]  # see Event.apply
    """The first event of an aggregate; `apply` sets every attribute."""

    aggregate_type: ClassVar[type[Aggregate]]
    """Set by the aggregate class that names this event."""

    # The class is known: there is no topic of it to store or resolve.
    originator_topic: ClassVar[str] = ""  # type: ignore[misc]  # the library's instance attribute

    def mutate(self, aggregate: TAggregate | None) -> TAggregate:
        """Make the aggregate."""
        if aggregate is not None:
            raise OriginatorVersionError(self.originator_version, aggregate)
        created = object.__new__(self.aggregate_type)
        created.__base_init__(self.originator_id, self.originator_version, self.timestamp)
        self.apply(created)
        return cast("TAggregate", created)


class DomainEvent(BaseModel):
    """A stored event as others see it: plain data, the same at each reading."""

    model_config = ConfigDict(frozen=True)

    event_id: str
    """Derived from the aggregate's id and the version."""
    event_type: str
    """The event's topic."""
    aggregate_id: str
    aggregate_type: str
    """The aggregate's topic."""
    timestamp: AwareDatetime
    """When it was recorded (UTC)."""
    version: int
    """Its place in the aggregate's stream, from 1."""
    payload: dict[str, Any]  # the shape that users asked for: facts of any event
    """The event's facts and its `occurred_at`, with personal fields in the clear."""
    metadata: Metadata = NO_METADATA
    """Its correlation, its cause, its user."""

    @classmethod
    def of(cls, event: Event, aggregate_type: str) -> DomainEvent:
        """Show a recorded event to others. Raises what `Personal.reveal` does, but for erased."""
        showing = Showing()
        facts = event.model_dump(exclude=set(ENVELOPE - {"occurred_at"}), context=showing)
        if showing.error is not None:
            raise showing.error
        return cls(
            event_id=str(event_id(event)),
            event_type=event.TOPIC,
            aggregate_id=str(event.originator_id),
            aggregate_type=aggregate_type,
            timestamp=event.timestamp.astimezone(UTC),
            version=event.originator_version,
            payload=facts,
            metadata=event.metadata,
        )


def event_id(event: Event) -> UUID:
    """Return an event's id, the same at each reading: of its aggregate's id and the version."""
    return uuid5(event.originator_id, str(event.originator_version))


def upcast_gap(event_type: type[Event]) -> str | None:
    """Return the name of the first upcaster that is missing; None if the chain is whole."""
    steps = range(1, event_type.class_version)
    names = (f"upcast_v{step}_v{step + 1}" for step in steps)
    return next((name for name in names if not callable(getattr(event_type, name, None))), None)


def upcast(event_type: type[Event], state: Mapping[str, object], version: int) -> dict[str, object]:
    """Bring the stored state of an event from `version` to the class's present version.

    Raises `LookupError` where a step of the chain is missing or the state is newer than the class.
    """
    if version > event_type.class_version:
        known = event_type.class_version
        msg = f"{event_type.TOPIC}: stored as version {version}, known up to {known}"
        raise LookupError(msg)
    current = dict(state)
    for step in range(version, event_type.class_version):
        name = f"upcast_v{step}_v{step + 1}"
        caster = getattr(event_type, name, None)
        if caster is None:
            msg = f"{event_type.TOPIC}: {name} is missing"
            raise LookupError(msg)
        current = caster(current) or current  # the library's casters change the state in place
    return current
