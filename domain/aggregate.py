"""Aggregates: a left fold of events, and the rules that decide which events may follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any, ClassVar, Self, TypeVar, cast, get_origin, get_type_hints
from uuid import NAMESPACE_URL, UUID, uuid5

import eventsourcing.domain
from eventsourcing.domain import CanSnapshotAggregate
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    FieldSerializationInfo,
    TypeAdapter,
    ValidationInfo,
    field_serializer,
    field_validator,
)
from typing_extensions import TypedDict

from leftfold.domain import clock
from leftfold.domain.errors import InvalidAggregateError
from leftfold.domain.event import Created, Event
from leftfold.domain.personal import Keys, TokensOnly, Writing

A = TypeVar("A", bound="Aggregate")


class Snapshot(BaseModel, CanSnapshotAggregate[UUID]):
    """The state of an aggregate at one version, so that a replay may begin there.

    The state is typed by the aggregate's annotations, so that a `Decimal` comes back as one.
    """

    model_config = ConfigDict(frozen=True)

    TOPIC: ClassVar[str] = ""
    aggregate_type: ClassVar[type[Aggregate]]

    originator_id: UUID
    originator_version: int
    timestamp: AwareDatetime
    topic: str = ""
    state: dict[str, Any]  # typed by the aggregate's annotations, both ways
    created_on: AwareDatetime
    modified_on: AwareDatetime

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__()

    @field_validator("state")
    @classmethod
    def _read(cls, state: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return _state_adapter(cls.aggregate_type).validate_python(state, context=info.context)

    @field_serializer("state")
    def _write(self, state: dict[str, Any], info: FieldSerializationInfo) -> dict[str, Any]:
        adapter = _state_adapter(self.aggregate_type)
        # Without warnings: they quote the value.
        written: dict[str, Any] = adapter.dump_python(
            state, mode="json", warnings="none", context=info.context
        )
        return written

    @classmethod
    def take(cls, aggregate: Any) -> Snapshot:
        """Take the snapshot of an aggregate that has no pending events; write it before it changes.

        Raises `TypeError` for an attribute without annotation, which would be lost.
        """
        state = {k: v for k, v in vars(aggregate).items() if k not in _BASE_ATTRIBUTES}
        unknown = state.keys() - _state_hints(cls.aggregate_type).keys()
        if unknown:
            msg = f"{cls.aggregate_type.__name__}: {sorted(unknown)} have no annotation"
            raise TypeError(msg)
        return cls.model_construct(
            originator_id=aggregate.id,
            originator_version=aggregate.version,
            timestamp=clock.now(),
            topic=cls.TOPIC,
            state=state,
            created_on=aggregate.created_on,
            modified_on=aggregate.modified_on,
        )

    def writing(self, keys: Keys) -> Writing:
        """Say how personal data is written: as events hold it."""
        return TokensOnly(keys)

    def mutate(self, _: object) -> Any:
        """Make the aggregate again."""
        aggregate = object.__new__(self.aggregate_type)
        aggregate.__base_init__(self.originator_id, self.originator_version, self.created_on)
        aggregate.modified_on = self.modified_on
        vars(aggregate).update(self.state)
        return aggregate


class Aggregate(eventsourcing.domain.Aggregate):
    """A thing with an identity whose state follows from its events.

    A subclass names its stable topic and its events, annotates its attributes, and offers
    methods that check the rules and `record` events; an event that begins one is its own:

        class Item(Aggregate, topic="leftfold.item", events=(ItemRegistered, StockSold)):
            on_hand: int

            def sell(self, quantity: int) -> None:
                if quantity > self.on_hand:
                    raise InsufficientStock(self.sku, quantity, self.on_hand)
                self.record(StockSold(quantity=quantity))

    Nothing is generated: an attribute changes only in an event's `apply`.
    Raises `InvalidAggregateError` for a first event that begins another aggregate.
    """

    TOPIC: ClassVar[str] = ""
    EVENTS: ClassVar[tuple[type[Event], ...]] = ()
    SNAPSHOT: ClassVar[type[Snapshot]]

    def __init_subclass__(
        cls, *, topic: str = "", events: tuple[type[Event], ...] = (), **_: Any
    ) -> None:
        # The library's own __init_subclass__ would generate classes and register topics globally.
        if not topic:
            return
        cls.TOPIC, cls.EVENTS = topic, events
        for event in events:
            if issubclass(event, Created):
                begun = vars(event).get("aggregate_type", cls)
                if topic != begun.TOPIC:  # a notebook may define the same class again
                    reason = f"{event.__name__} begins {begun.__name__} already"
                    raise InvalidAggregateError(cls.__name__, reason)
                event.aggregate_type = cls
        cls.SNAPSHOT = type(
            "Snapshot",
            (Snapshot,),
            {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Snapshot"},
        )
        cls.SNAPSHOT.TOPIC, cls.SNAPSHOT.aggregate_type = f"{topic}.snapshot", cls
        # The library types it by its own dataclass.
        cls.Snapshot = cast("type[eventsourcing.domain.Snapshot]", cls.SNAPSHOT)

    @classmethod
    def id_of(cls, key: str) -> UUID:
        """Return the id of the aggregate with this natural key: UUIDv5 of topic and key.

        Two creations of one key therefore race for one primary key in the store.
        """
        return _id_of(cls.TOPIC, key)

    @classmethod
    def begin(cls, created: Created, key: str) -> Self:
        """Make a new aggregate by its first event. Raises `InvalidAggregateError`."""
        cls._check_named(created)
        created.stamp(cls.id_of(key), cls.INITIAL_VERSION, clock.now())
        aggregate: Self = created.mutate(None)
        aggregate._pending_events.append(created)
        return aggregate

    def record(self, event: Event) -> None:
        """Apply a new event and keep it until the aggregate is saved.

        Raises `InvalidAggregateError` for one that is not among the class's `events`.
        """
        self._check_named(event)
        event.stamp(self._id, self._version + 1, clock.now())
        event.mutate(self)
        self._pending_events.append(event)

    @classmethod
    def _check_named(cls, event: Event) -> None:
        if type(event) not in cls.EVENTS:  # else it shows at the commit, or at a replay
            reason = f"{type(event).__name__} is not among its events"
            raise InvalidAggregateError(cls.__name__, reason)

    def collect_events(self) -> Sequence[Event]:
        """Return the events recorded since the last time, in order."""
        recorded: list[Any] = [*self._pending_events]  # the library types them by its own class
        self._pending_events.clear()
        return recorded

    @property
    def unsaved(self) -> int:
        """How many events were recorded and not yet collected."""
        return len(self._pending_events)

    @classmethod
    def fold(cls, events: Iterable[Event], aggregate: Self | None = None) -> Self | None:
        """Return the aggregate after these events, which must follow its version."""
        return project(aggregate, events)


_BASE_ATTRIBUTES = frozenset({"_id", "_version", "_created_on", "_modified_on", "_pending_events"})


def project(aggregate: A | None, events: Iterable[Event]) -> A | None:
    """Fold events into an aggregate: a projector function for the library's `Repository.get`.

    It leaves out the library's check of every event against a runtime protocol, which takes
    most of the time of its own `project_aggregate`.
    """
    for event in events:
        aggregate = event.mutate(aggregate)
    return aggregate


@lru_cache(maxsize=65_536)
def _id_of(topic: str, key: str) -> UUID:
    return uuid5(uuid5(NAMESPACE_URL, f"leftfold:{topic}"), key)


@cache
def _state_hints(aggregate_type: type[Aggregate]) -> dict[str, Any]:
    of_every_aggregate = get_type_hints(Aggregate).keys()
    return {
        name: hint
        for name, hint in get_type_hints(aggregate_type).items()
        if get_origin(hint) is not ClassVar and name not in of_every_aggregate
    }


@cache
def _state_adapter(aggregate_type: type[Aggregate]) -> TypeAdapter[dict[str, Any]]:
    hints = _state_hints(aggregate_type)
    typed_dict: Any = TypedDict  # made at run time, where no checker can follow
    state = typed_dict(f"{aggregate_type.__name__}State", hints)
    # Errors without the input: it is the model's data, and they are logged.
    state.__pydantic_config__ = ConfigDict(hide_input_in_errors=True)
    return TypeAdapter(state)
