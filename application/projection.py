"""Projections: a read model is a left fold of events into rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar, get_type_hints

from leftfold.application.errors import InvalidModelError
from leftfold.domain import ALWAYS, Event, Specification
from leftfold.domain.personal import is_personal

R = TypeVar("R")
E = TypeVar("E", bound=Event)


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
    kept, since they may come to satisfy it, and not shown.
    """

    def __init__(
        self,
        name: str,
        *,
        version: int,
        row: type[R],
        specification: Specification[R] = ALWAYS,
        key: Callable[[Any], str] = aggregate_key,
        indexes: Iterable[str | tuple[str, ...]] = (),
    ) -> None:
        """Name a view. Raises `InvalidModelError` for a bad name, row type or index.

        `indexes` are the columns, or tuples of columns, that questions often ask for: each makes
        finding faster and every change of a row slower.
        """
        if not name.isidentifier() or not name.islower() or version < 1:
            raise InvalidModelError(f"projection {name!r} version {version}: bad name or version")
        if not is_dataclass(row):
            raise InvalidModelError(f"projection {name}: {row.__name__} is not a dataclass")
        self.name = name
        self.version = version
        self.row: type[R] = row
        self.specification = specification
        self.key = key
        hints = get_type_hints(row)
        self.column_types: dict[str, Any] = {f.name: hints[f.name] for f in fields(row)}
        self.indexes = tuple((index,) if isinstance(index, str) else index for index in indexes)
        unknown = {column for index in self.indexes for column in index} - set(self.column_types)
        if unknown or () in self.indexes:
            raise InvalidModelError(f"projection {name}: no column {sorted(unknown)} to index")
        indexed = {column for index in self.indexes for column in index}
        if indexed - set(self.ordering):
            raise InvalidModelError(f"projection {name}: personal data has no order to index")
        self._evolve: dict[type[Event], Callable[[R | None, Any], R | None]] = {}

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the row's fields, in order."""
        return tuple(self.column_types)

    @property
    def ordering(self) -> tuple[str, ...]:
        """The names of the fields that rows can be put in order by: not by personal data."""
        return tuple(name for name, kind in self.column_types.items() if not is_personal(kind))

    @property
    def table(self) -> str:
        """The name of its table: `name_vN`."""
        return f"{self.name}_v{self.version}"

    @property
    def event_types(self) -> tuple[type[Event], ...]:
        """The event types it reads."""
        return tuple(self._evolve)

    def on(
        self, event_type: type[E]
    ) -> Callable[[Callable[[R | None, E], R | None]], Callable[[R | None, E], R | None]]:
        """Say how events of one type change a row."""

        def remember(
            evolve: Callable[[R | None, E], R | None],
        ) -> Callable[[R | None, E], R | None]:
            if event_type in self._evolve:
                raise InvalidModelError(f"projection {self.name}: {event_type.__name__} twice")
            self._evolve[event_type] = evolve
            return evolve

        return remember

    def evolve(self, row: R | None, event: Event) -> R | None:
        """Return the row after the event; an event of a type it does not read changes nothing."""
        evolve = self._evolve.get(type(event))
        return evolve(row, event) if evolve else row

    def fold(
        self, events: Iterable[Event], load: Callable[[set[str]], MutableMapping[str, R | None]]
    ) -> dict[str, R | None]:
        """Fold events into the rows that `load` answers for their keys; return the touched rows."""
        evolve_by_type, key_of = self._evolve, self.key
        keyed = [(key_of(event), event) for event in events if type(event) in evolve_by_type]
        keys = {key for key, _ in keyed}
        rows = load(keys) if keys else {}
        for key, event in keyed:
            rows[key] = evolve_by_type[type(event)](rows.get(key), event)
        return {key: rows[key] for key in keys}

    def shows(self, row: R) -> bool:
        """Tell whether the row is a member of the view."""
        return self.specification is ALWAYS or self.specification.is_satisfied_by(row)


@dataclass(frozen=True, slots=True)
class Page(Generic[R]):
    """Some rows of a view in order, and where the next ones begin."""

    rows: tuple[R, ...]
    next: str | None
    """The cursor of the next page; None after the last."""
