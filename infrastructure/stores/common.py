"""What stores share: runs of commits, verdicts, forms of ids, and the library's notifications."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from uuid import UUID

from eventsourcing.persistence import (
    DataError,
    IntegrityError,
    Notification,
    OperationalError,
    PersistenceError,
    ProgrammingError,
    StoredEvent,
)

from leftfold.application.checkpoints import Checkpoint, Reader, full_name
from leftfold.application.errors import DispatchError
from leftfold.application.ports import (
    Committed,
    EncodedEvent,
    Failed,
    Group,
    Inline,
    LoggedEvent,
    Stale,
    Verdict,
)
from leftfold.domain import LeftfoldError
from leftfold.infrastructure.errors import ViewChangedError

_log = logging.getLogger("leftfold.stores")

OF_VIEWS = "in an inline view"

SCHEMA_VERSION = 4
MAX_VERSION = 2**62
MADE_GOOD = 3
"""Times that a run is written again, while others write what inline views do not take."""
EACH_TOPIC = (
    "WITH RECURSIVE found (topic) AS (SELECT min(topic) FROM stored_events UNION ALL "
    "SELECT (SELECT min(topic) FROM stored_events WHERE topic > found.topic) FROM found "
    "WHERE topic IS NOT NULL) SELECT topic FROM found WHERE topic IS NOT NULL"
)
"""The topics in the log, by one look into their index each."""
ABSENT = Checkpoint(0, is_built=False)
"""Stands for a reader that was dropped: nobody can hold it, and no page of it is written."""


class Run(NamedTuple):
    """Groups of one call that have nothing to do with each other: each is judged by the store."""

    groups: list[Group]
    bases: list[dict[int, int]]
    """Of each group: the version that an aggregate must be at, by the number of its id."""


def halves(run: Run) -> tuple[Run, Run]:
    """Part a run in two."""
    middle = len(run.groups) // 2
    return (
        Run(run.groups[:middle], run.bases[:middle]),
        Run(run.groups[middle:], run.bases[middle:]),
    )


def commit_in_runs(
    groups: Sequence[Group], write: Callable[[Run], list[Verdict]], inline: Inline | None
) -> list[Verdict]:
    """Write groups run by run; where something in a run is refused, find it by halves.

    It is written again first if others had written what is to be made good in inline views.
    """
    verdicts: list[Verdict] = []
    for run in runs(groups):
        verdicts += (Stale(),) if run is None else _isolated(run, write, inline)
    return verdicts


def _isolated(
    run: Run, write: Callable[[Run], list[Verdict]], inline: Inline | None
) -> list[Verdict]:
    verdicts = write(run)
    for _ in range(MADE_GOOD):
        try:
            if not is_refused(verdicts) or inline is None or not inline.make_good():
                break
        except PersistenceError as error:  # the run itself was rolled back
            return [Failed(str(error))] * len(run.groups)
        verdicts = write(run)
    if len(run.groups) > 1 and is_refused(verdicts):
        return [v for half in halves(run) for v in _isolated(half, write, inline)]
    return verdicts


def is_refused(verdicts: Sequence[Verdict]) -> bool:
    """Tell whether the database refused what was written, and not just its moment."""
    return any(isinstance(verdict, Failed) and verdict.is_refusal for verdict in verdicts)


def runs(groups: Sequence[Group]) -> Iterator[Run | None]:
    """Part groups, in their order, into runs; None stands for a group that contradicts itself.

    A group is in another run than what it rests on, and than a repetition of its commands: that
    happens where a caller has gone away and what it asked for is still to be written.
    """
    run, written, commands = Run([], []), set[int](), set[UUID]()
    for group in groups:
        bases, ends = _bases(group)
        ids = [save.command_id for save in group.saves]
        is_apart = bases is None or not (written.isdisjoint(bases) and commands.isdisjoint(ids))
        if run.groups and is_apart:
            yield run
            run, written, commands = Run([], []), set(), set()
        if bases is None:
            yield None
            continue
        run.groups.append(group)
        run.bases.append(bases)
        written.update(ends)
        commands.update(ids)
    if run.groups:
        yield run


def _bases(group: Group) -> tuple[dict[int, int] | None, dict[int, int]]:
    """Return the versions that a group rests on, and those that it leaves; None if they clash."""
    bases = {aggregate_id.int: version for aggregate_id, version in group.based_on}
    ends: dict[int, int] = {}
    for save in group.saves:
        for aggregate_id, version, _, _ in save.events:
            number = aggregate_id.int
            if ends.get(number, bases.get(number, version - 1)) != version - 1:
                return None, ends
            bases.setdefault(number, version - 1)
            ends[number] = version
    return bases, ends


class Notifying:
    """The library's notifications, from the log's own reading."""

    @abstractmethod
    def read(self, after: int, limit: int, topics: Sequence[str] = ()) -> list[LoggedEvent]: ...

    def select_notifications(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
    ) -> list[Notification]:
        after = 0 if start is None else start - 1 if inclusive_of_start else start
        return [
            Notification(
                event.aggregate_id, event.version, event.topic, event.state, event.position
            )
            for event in self.read(after, limit, topics)
            if stop is None or event.position <= stop
        ]


def as_uuid(aggregate_id: UUID | str) -> UUID:
    """Return the id; the library allows text."""
    return aggregate_id if isinstance(aggregate_id, UUID) else UUID(aggregate_id)


def encoded(events: Sequence[StoredEvent]) -> list[EncodedEvent]:
    """Return the library's events as the log takes them in."""
    return [
        EncodedEvent(as_uuid(e.originator_id), e.originator_version, e.topic, e.state)
        for e in events
    ]


def dump_aggregates(aggregates: Sequence[tuple[UUID, int]]) -> str:
    """Return aggregates and their versions as a command's row keeps them."""
    pairs = ",".join([f'["{i.hex}",{version}]' for i, version in aggregates])
    return f"[{pairs}]"


def load_aggregates(text: str) -> tuple[tuple[UUID, int], ...]:
    """Return the aggregates of a command's row."""
    return tuple((UUID(i), version) for i, version in json.loads(text))


def is_written(verdict: Verdict) -> bool:
    """Tell whether events were written; if not, the page is folded again.

    Raises what refuses them, `IntegrityError` if no more is known, and `OperationalError` for a
    store that failed.
    """
    if isinstance(verdict, Failed):
        if verdict.refusal is not None:
            raise verdict.refusal
        raise (IntegrityError if verdict.is_refusal else OperationalError)(verdict.reason)
    return isinstance(verdict, Committed)


def refused(error: LeftfoldError) -> Failed:
    """Return the verdict on events that an inline view does not take."""
    refusal = error if isinstance(error, DispatchError) else None
    return Failed(str(error), is_refusal=True, refusal=refusal)


@contextmanager
def in_views() -> Iterator[None]:
    """Note on what the block raises that it is of inline views."""
    try:
        yield
    except Exception as error:
        error.add_note(OF_VIEWS)
        raise


def is_of_views(error: Exception) -> bool:
    """Tell whether a commit fails with what inline views make of it, and not with the store."""
    raised = error, error.__cause__  # the library's error, and the driver's
    if not any(OF_VIEWS in getattr(each, "__notes__", ()) for each in raised):
        return False
    is_wrong = isinstance(error, (DataError, IntegrityError, ProgrammingError))
    return is_wrong or not isinstance(error, PersistenceError)


def failing(error: Exception, run: Run) -> list[Verdict]:
    """Return the verdicts on events with which an inline view's own statements fail."""
    if len(run.groups) == 1:  # now it is known whose fault it is
        _log.error("what is written with a command's events fails", exc_info=error)
    return [Failed(type(error).__name__, is_refusal=True)] * len(run.groups)


def check_unchanged(reader: Reader, columns: str, found: tuple[str, str]) -> None:
    """Compare a reader with what is stored of it: its columns, and what it reads.

    Raises `ViewChangedError`. Nothing is known of what older releases read.
    """
    now = (columns, reader.reads)
    for then, this in zip(found, now, strict=True):
        if then not in (this, ""):
            raise ViewChangedError(full_name(reader.name, reader.version), then, this)
