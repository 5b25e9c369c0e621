"""Projections: a read model is a left fold of events into rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, MutableMapping
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar, get_type_hints

from leftfold.application.checkpoints import full_name
from leftfold.application.errors import InvalidModelError
from leftfold.application.fingerprints import code_of, digest
from leftfold.domain import ALWAYS, Event, Specification
from leftfold.domain.personal import is_personal

R = TypeVar("R")
E = TypeVar("E", bound=Event)

Policy: TypeAlias = Literal["park", "halt"]
"""What becomes of an event that cannot be folded: it is put aside, or it stops its view."""
Execute: TypeAlias = Callable[..., Any]
"""Runs a statement, `execute(sql, parameters)`, and returns the driver's cursor."""
Statements: TypeAlias = Callable[[Execute, Iterable[Event]], None]

MAX_NAME = 40
"""Bytes: with what is added to it, of the 63 that PostgreSQL knows."""


def aggregate_key(event: Event) -> str:
    """Return the id of the event's aggregate, as 32 hexadecimal digits."""
    return event.originator_id.hex


class Projection(Generic[R]):
    """A view: its name and version, its row type, and how each event changes a row.

        balances = Projection("balances", version=1, row=Balance)

        @balances.on(Deposited)
        def deposited(row: Balance | None, event: Deposited) -> Balance | None:
            return Balance(event.originator_id.hex, (row.amount if row else 0) + event.amount)

    A row is a frozen dataclass. Evolving is pure: it looks at the row and the event only, and
    answers the new row, or `None` to delete it. Rows that do not satisfy the specification are
    kept, since they may come to satisfy it, and not shown. Whoever changes what a view reads or
    shows gives it a new version, which is built beside the old.
    """

    begins_now = False
    """A view holds the whole log."""

    def __init__(  # noqa: PLR0913 - what is not given is as most views want it
        self,
        name: str,
        *,
        version: int,
        row: type[R],
        specification: Specification[R] = ALWAYS,
        where: Specification[Any] = ALWAYS,
        key: Callable[[Any], str] = aggregate_key,
        keys: Callable[[Any], Collection[str]] | None = None,
        indexes: Iterable[str | tuple[str, ...]] = (),
        unique: Iterable[str | tuple[str, ...]] = (),
        inline: bool = False,
        on_poison: Policy | None = None,
    ) -> None:
        """Name a view. Raises `InvalidModelError` for what does not fit together.

        Only events that satisfy `where` are read. An event changes the row under its `key`, or
        the rows under its `keys`.
        `indexes` are the columns, or tuples of columns, that questions often ask for: each makes
        finding faster and every change of a row slower. An `inline` view is written in the
        transaction of the events; only such a one may have `unique` columns, since only there
        an event can still be refused. Any other event that cannot be folded is parked while the
        view is live, and halts it while it is built, if `on_poison` does not say which.
        """
        if not is_name(name) or version < 1:
            raise InvalidModelError(f"projection {name!r} version {version}: bad name or version")
        if not is_dataclass(row):
            raise InvalidModelError(f"projection {name}: {row.__name__} is not a dataclass")
        self.name = name
        self.version = version
        self.row: type[R] = row
        self.specification = specification
        self.where = where
        self.key = key
        self.keys = keys
        self.inline = inline
        self.on_poison: Policy | None = on_poison
        self.writes: Statements | None = None
        hints = get_type_hints(row)
        self.column_types: dict[str, Any] = {f.name: hints[f.name] for f in fields(row)}
        self.indexes = self._columns_of(indexes)
        self.unique = self._columns_of(unique)
        if self.unique and not inline:
            raise InvalidModelError(f"projection {name}: only an inline view has unique columns")
        self._evolve: dict[type[Event], Callable[..., R | None]] = {}
        self._keyed: set[type[Event]] = set()

    def _columns_of(self, named: Iterable[str | tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
        groups = tuple((columns,) if isinstance(columns, str) else columns for columns in named)
        columns = {column for group in groups for column in group}
        unknown = columns - set(self.column_types)
        if unknown or () in groups:
            raise InvalidModelError(f"projection {self.name}: no column {sorted(unknown)} to index")
        if columns - set(self.ordering):
            raise InvalidModelError(f"projection {self.name}: personal data has no order to index")
        return groups

    def derive(
        self,
        name: str,
        *,
        version: int,
        specification: Specification[R],
        indexes: Iterable[str | tuple[str, ...]] = (),
    ) -> Projection[R]:
        """Return a view that folds the same rows from the same events, and shows others of them."""
        derived = Projection(
            name,
            version=version,
            row=self.row,
            specification=specification,
            where=self.where,
            key=self.key,
            keys=self.keys,
            indexes=indexes,
            on_poison=self.on_poison,
        )
        derived._evolve, derived._keyed = dict(self._evolve), set(self._keyed)
        return derived

    def folds_as(self, other: Projection[Any]) -> bool:
        """Tell whether it makes the same rows of the same events as another."""
        mine, theirs = (
            (p.row, p.where, p.key, p.keys, p._evolve, p._keyed, p.on_poison) for p in (self, other)
        )
        return mine == theirs

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the row's fields, in order."""
        return tuple(self.column_types)

    @property
    def ordering(self) -> tuple[str, ...]:
        """The names of the fields that rows can be put in order by: not by personal data."""
        return tuple(name for name, kind in self.column_types.items() if not is_personal(kind))

    def anew(self) -> Projection[R]:
        """Return the same to be built beside this one; its version is the negative of this one's.

        What it reads names the code that it folds by: half of it is never another code's.
        """
        return self.at(-self.version)

    def at(self, version: int) -> Projection[R]:
        """Return the same as another version."""
        other = copy(self)
        other.version = version
        return other

    @property
    def table(self) -> str:
        """The name of its table: `name_vN`, and `name_vN_anew` while it is built beside that."""
        return full_name(self.name, self.version)

    @property
    def event_types(self) -> tuple[type[Event], ...]:
        """The event types it reads."""
        return tuple(self._evolve)

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics of the events it reads, also those that they had before."""
        return topics_of(self._evolve)

    @property
    def reads(self) -> str:
        """What it reads and shows, as text; stored, to notice a change without a new version."""
        shown = f"events {', '.join(sorted(e.TOPIC for e in self._evolve))}"
        if self.where != ALWAYS:
            shown += f"; where {self.where!r}"
        if self.specification != ALWAYS:
            shown += f"; shows {self.specification!r}"
        return shown if self.version > 0 else f"{shown}; by {self._code}"

    @property
    def _code(self) -> str:
        """Tells whether the functions are the same, and those of their module that they name."""
        functions = (self.key, self.keys, *self._evolve.values())
        return digest(part for function in functions for part in code_of(function))

    def on(
        self, event_type: type[E]
    ) -> Callable[[Callable[[R | None, E], R | None]], Callable[[R | None, E], R | None]]:
        """Say how events of one type change a row."""

        def remember(
            evolve: Callable[[R | None, E], R | None],
        ) -> Callable[[R | None, E], R | None]:
            self._remember(event_type, evolve)
            return evolve

        return remember

    def on_each(
        self, event_type: type[E]
    ) -> Callable[[Callable[[R | None, E, str], R | None]], Callable[[R | None, E, str], R | None]]:
        """Say how events of one type change the row under each of their keys, which is told too."""

        def remember(
            evolve: Callable[[R | None, E, str], R | None],
        ) -> Callable[[R | None, E, str], R | None]:
            self._remember(event_type, evolve)
            self._keyed.add(event_type)
            return evolve

        return remember

    def _remember(self, event_type: type[Event], evolve: Callable[..., R | None]) -> None:
        if event_type in self._evolve:
            raise InvalidModelError(f"projection {self.name}: {event_type.__name__} twice")
        self._evolve[event_type] = evolve

    def executing(self, statements: Statements) -> Statements:
        """Let a function run statements of its own in each page's transaction.

        It is called as `statements(execute, events)` with the events of the page that the view
        reads, in their order. What it raises is the event's fault, as in `evolve`; so a view that
        is to stop says `on_poison="halt"`. Not on the store in memory.
        """
        self.writes = statements
        return statements

    def evolve(self, row: R | None, event: Event, key: str | None = None) -> R | None:
        """Return the row after the event; an event of a type it does not read changes nothing."""
        event_type = type(event)
        evolve = self._evolve.get(event_type)
        if evolve is None:
            return row
        if event_type not in self._keyed:
            return evolve(row, event)
        return evolve(row, event, self.key(event) if key is None else key)

    def is_of(self, event: Event) -> bool:
        """Tell whether it reads an event."""
        return type(event) in self._evolve and (
            self.where is ALWAYS or self.where.is_satisfied_by(event)
        )

    def keys_of(self, event: Event) -> Collection[str]:
        """Return the keys of the rows that an event changes."""
        return (self.key(event),) if self.keys is None else tuple(dict.fromkeys(self.keys(event)))

    def fold(
        self,
        events: Iterable[Event],
        load: Callable[[set[str]], MutableMapping[str, R | None]],
        react: Callable[[R | None, R | None, Event], None] | None = None,
    ) -> dict[str, R | None]:
        """Fold events into the rows that `load` answers for their keys; return the touched rows.

        `react` is told of each event with the row before and after it.
        """
        evolves, key_of = self._evolve, self.key
        if self.where is not ALWAYS:
            events = filter(self.is_of, events)
        if self.keys is None:
            keyed = [(key_of(event), event) for event in events if type(event) in evolves]
        else:
            read = (event for event in events if type(event) in evolves)
            keyed = [(key, event) for event in read for key in self.keys_of(event)]
        keys = {key for key, _ in keyed}
        rows = load(keys) if keys else {}
        if react is None and not self._keyed:
            for key, event in keyed:
                rows[key] = evolves[type(event)](rows.get(key), event)
        else:
            for key, event in keyed:
                before = rows.get(key)
                rows[key] = after = self.evolve(before, event, key)
                if react is not None:
                    react(before, after, event)
        return {key: rows[key] for key in keys}

    def shows(self, row: R) -> bool:
        """Tell whether the row is a member of the view."""
        return self.specification is ALWAYS or self.specification.is_satisfied_by(row)


def is_name(name: str) -> bool:
    """Tell whether a reader of the log may be called so: PostgreSQL cuts longer names."""
    return name.isidentifier() and name.islower() and len(name.encode()) <= MAX_NAME


def topics_of(event_types: Iterable[type[Event]]) -> tuple[str, ...]:
    """Return the topics of event types, also those that they had before."""
    return tuple(topic for e in event_types for topic in (e.TOPIC, *e.ALIASES))


@dataclass(frozen=True, slots=True)
class Page(Generic[R]):
    """Some rows of a view in order, and where the next ones begin."""

    rows: tuple[R, ...]
    next: str | None
    """The cursor of the next page; None after the last."""
