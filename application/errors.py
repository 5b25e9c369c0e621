"""What can go wrong between a command and its answer, apart from the domain's own refusals."""

from __future__ import annotations

from uuid import UUID

from leftfold.domain import LeftfoldError


class DispatchError(LeftfoldError):
    """A dispatch failed for a reason outside the domain's rules; comes as `Err`."""


class ValidationFailed(DispatchError):
    """Input from outside does not fit the command or query."""

    name: str
    reasons: tuple[tuple[str, str], ...]
    """Pairs of a field (dotted path) and what is wrong with it."""

    def __str__(self) -> str:
        faults = "; ".join(f"{field} {reason}".strip() for field, reason in self.reasons)
        return f"{self.name}: {faults}"


class Conflict(DispatchError):
    """Other writers changed the aggregates first, also on retries; nothing was written."""

    aggregates: tuple[tuple[UUID, int], ...]
    """Pairs of an aggregate's id and the version that it would have been brought to, or had when it
    was only looked at: others have changed one of them at least."""

    def __str__(self) -> str:
        changed = " or ".join(str(aggregate_id) for aggregate_id, _ in self.aggregates)
        return f"others changed {changed} while the command was handled"


class OutcomeUnknown(DispatchError, message="command {command_id}: its outcome is not known"):
    """Time ran out, or the connection was lost at the commit.

    Dispatching the same command again with this `command_id` is safe: it is done at most once.
    """

    command_id: UUID


class CommandIdReused(
    DispatchError, message="command id {command_id} is {first}'s, and cannot be {now}'s too"
):
    """The `command_id` was given to another command before; nothing was written."""

    command_id: UUID
    first: str
    now: str


class Overloaded(
    DispatchError, message="{limit} commands are under way, as many as may be; nothing was written"
):
    """There is no room for another command; a later one may find some."""

    limit: int


class Unstorable(DispatchError, message="the event store does not take it: {reason}"):
    """The database refuses just this command's events; nothing was written."""

    reason: str


class NotUnique(
    DispatchError, message="{projection} has a row with the same {columns}; nothing was written"
):
    """An inline view may not have two rows that are equal in these columns."""

    projection: str
    columns: tuple[str, ...]


class ShuttingDown(DispatchError, message="the runtime is shutting down"):
    """The runtime takes no more commands; nothing was written."""


class ViewBehind(DispatchError, message="{projection} is at {position}, not yet at {wanted}"):
    """A view did not reach the wanted position in time."""

    projection: str
    position: int
    wanted: int

    @property
    def lag(self) -> int:
        """How many positions are missing."""
        return max(0, self.wanted - self.position)


class ViewBuilding(
    ViewBehind, message="{projection} is being built, and is at {position} of {wanted}"
):
    """A new version of a view has not been as far as the log yet; until then it is not shown."""


class ViewStopped(
    ViewBehind, message="{projection} stopped at {position}, before {wanted}: {reason}"
):
    """A view met an event that it cannot fold, and stopped before the wanted position.

    It is told at once where the view stopped, and elsewhere after the time to wait: another
    process may know how to go on.
    """

    reason: str


class EventPutAside(
    ViewBehind, message="{projection} has put aside what was written at {wanted}: see dead letters"
):
    """A view could not take in a command's event, or one of the same row before it."""


class NoHandlerError(LeftfoldError, message="no handler for {name}"):
    """Nothing handles this command or query: an error in the program."""

    name: str


class InvalidAnswerError(LeftfoldError, message="the handler of {name} answered {answer}"):
    """A handler answered no result, or one that cannot be given again: an error in the program."""

    name: str
    answer: str
    """What is wrong with it, without its value."""


class AlreadyHandledError(LeftfoldError, message="{name} has a handler already"):
    """A second handler was registered: an error in the program."""

    name: str


class InvalidModelError(LeftfoldError, message="the model is not sound: {reason}"):
    """A model's parts do not fit together: an error in the program."""

    reason: str


class UnknownTopicError(LeftfoldError, message="no event of the model has the topic {topic!r}"):
    """A stored event's type is not part of the model."""

    topic: str


class UnreadableEventError(
    LeftfoldError,
    message="cannot read {topic} version {version} of {aggregate_id}: {reason}",
):
    """A stored event does not fit its class."""

    topic: str
    aggregate_id: str
    version: int
    reason: str


class EventStoreUnavailable(DispatchError, message="the event store cannot be reached: {reason}"):
    """The database failed before anything was committed; nothing was written."""

    reason: str


class KeysUnavailable(DispatchError, message="the keys cannot be reached: {reason}"):
    """Personal data can neither be sealed nor opened now; nothing of it is lost."""

    reason: str


class InvalidSubject(DispatchError, message="nobody can be named so: the subject {reason}"):
    """Personal data is about a subject whose name no store of keys takes; nothing was written."""

    reason: str


class NestedDispatchError(LeftfoldError, message="{name} was dispatched from within a handler"):
    """A handler dispatched a command: an error in the program, since it could wait for itself."""

    name: str


class DispatchOverError(
    LeftfoldError, message="aggregates were used after their command was carried out"
):
    """A handler left a task behind that loads or saves: an error in the program."""


class UnsavedEventsError(
    LeftfoldError, message="the handler of {name} recorded events and did not save them"
):
    """A handler answered `Ok` and forgot `save`: an error in the program."""

    name: str
