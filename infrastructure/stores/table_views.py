"""Views as tables beside the events: what is the same on every database."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import astuple, replace
from itertools import chain
from operator import attrgetter
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar
from uuid import UUID

import sqlalchemy as sa

from leftfold.application import Projection
from leftfold.application.checkpoints import Change, Checkpoint, Comparison, DeadLetter, Reader
from leftfold.application.errors import NotUnique
from leftfold.application.ports import Group, Inline, Order, Seek, Verdict
from leftfold.application.projection import Execute
from leftfold.domain import ALWAYS, Specification
from leftfold.domain.personal import Keys
from leftfold.infrastructure.errors import SchemaMissingError
from leftfold.infrastructure.platform import collector_paused
from leftfold.infrastructure.stores.common import Run, check_unchanged, is_written, runs
from leftfold.infrastructure.tables import Encoded, Statement, ViewTable, index_name

R = TypeVar("R")
D = TypeVar("D")
C = TypeVar("C")


AT_ONCE = 250
"""Events that a query asks for at once."""


class Rows(Protocol):
    """What a statement has found."""

    def fetchone(self) -> Any:
        """Return the next row; None after the last."""
        ...

    def fetchall(self) -> list[Any]:
        """Return all rows."""
        ...

    @property
    def rowcount(self) -> int:
        """How many rows were changed."""
        ...


class Writing(Protocol):
    """The log, where events are written in a transaction under way."""

    def write(self, connection: Any, run: Run) -> list[Verdict]:
        """Write what may be written; each group gets its own verdict."""
        ...

    @property
    def inline(self) -> Inline | None:
        """The views that are written with the events."""
        ...


class Moved(Exception):
    """A checkpoint is not as a page found it, or events were written first by others."""


class NotFresh(Exception):
    """Rows cannot be put as those that are not there yet."""


class TableViews(Generic[D, C]):
    """Views and their checkpoints on one kind of database (`D`), through its cursors (`C`).

    Statements have `?` where their values belong.
    """

    dialect: ClassVar[sa.Dialect]
    head: ClassVar[str]
    """The query for the log's last position."""

    # Releases that know nothing of it move the epoch on, too.
    failure: ClassVar[str] = "CASE WHEN failed_in = epoch THEN failure ELSE '' END"
    """The column of a checkpoint that says why its reader stopped."""

    log: Writing
    """Set before pages with events are written."""

    def __init__(self, name: str, database: D, keys: Keys | None, *, may_define: bool) -> None:
        """Keep views in a store of this name; make tables only if it `may_define` them."""
        self._name = name
        self._database = database
        self._keys = keys
        self._may_define = may_define
        self._tables: dict[str, ViewTable[Any]] = {}

    def within(self, joined: D) -> Self:
        """Return the same views, in a transaction under way."""
        views = copy(self)
        views._database = joined
        return views

    # Each database's own ----------------------------------------------------------------------

    now: ClassVar[str]
    """The database's clock, as leases are kept."""

    @abstractmethod
    def _reading(self) -> AbstractContextManager[C]: ...

    @abstractmethod
    def _changing(
        self, rows: int = 0, /, *, has_events: bool = False, defines: bool = False
    ) -> AbstractContextManager[C]:
        """Begin a transaction of about so many rows; one without events may be lost as a whole."""

    @abstractmethod
    def _comparing(self) -> AbstractContextManager[C]:
        """Read several times, as if at once."""

    @abstractmethod
    def _run(self, cursor: C, sql: str, values: Sequence[object] = ()) -> Rows: ...

    @abstractmethod
    def _run_many(self, cursor: C, sql: str, rows: Sequence[Sequence[object]]) -> None: ...

    @abstractmethod
    def _ask(self, cursor: C, statement: Statement) -> Rows:
        """Run a statement that was compiled."""

    @abstractmethod
    def _executing(self, cursor: C) -> Execute:
        """Return what runs a projection's own statements."""

    @abstractmethod
    def _checkpoints(self, cursor: C, readers: Sequence[Reader]) -> list[Checkpoint]: ...

    @abstractmethod
    def _move(
        self,
        cursor: C,
        changes: Sequence[Change],
        position: int,
        *,
        is_built: bool,
        is_fence: bool,
    ) -> None:
        """Move checkpoints. Raises `Moved` unless all are as the changes found them."""

    @abstractmethod
    def _commit(self, cursor: C, run: Run) -> list[Verdict]:
        """Write events in the transaction of a page."""

    @abstractmethod
    def _prepared(self, table: ViewTable[Any], encoded: Encoded, fresh: Collection[str], /) -> Any:
        """Return rows as `_put` takes them."""

    @abstractmethod
    def _put(self, cursor: C, table: ViewTable[Any], prepared: Any) -> None:
        """Insert or change rows."""

    @abstractmethod
    def _refusal(self, projection: Projection[Any], error: Exception) -> NotUnique | None:
        """Return the refusal that the driver's error stands for."""

    @abstractmethod
    def _delete(self, cursor: C, table: ViewTable[Any], keys: Sequence[str]) -> None: ...

    @abstractmethod
    def _exists(self, cursor: C, name: str) -> bool:
        """Tell whether there is a table, a view or an index of a name."""

    @abstractmethod
    def _is_shown(self, cursor: C, projection: Projection[Any]) -> bool:
        """Tell whether the view for people is on just this version's table."""

    @abstractmethod
    def load(self, projection: Projection[R], keys: Sequence[str]) -> dict[str, R]: ...

    def _stored(self, value: object) -> object:
        """Return a value as dead letters keep it."""
        return value

    def _letter(self, position: int, key: str, values: Sequence[Any]) -> DeadLetter:
        return DeadLetter(position, key, *values)

    def _allow_time(self, cursor: C) -> None:
        """Let what follows, which concerns all rows of a view, take long."""

    def _lock(self, cursor: C, readers: Sequence[Reader]) -> None:
        """Let no page of these readers come between."""

    def _tell(self, cursor: C) -> None:
        """Let others know that something has got on."""

    # Rows -------------------------------------------------------------------------------------

    def table(self, projection: Projection[R]) -> ViewTable[R]:
        table = self._tables.get(projection.table)
        if table is None or table.projection is not projection:
            table = ViewTable(projection, self.dialect, self._keys)
            self._tables[projection.table] = table
        return table

    def get(self, projection: Projection[R], key: str) -> R | None:
        row = self.load(projection, (key,)).get(key)
        return row if row is not None and projection.shows(row) else None

    def select(
        self,
        projection: Projection[R],
        order: Order | None,
        limit: int | None,
        seek: Seek | None = None,
        where: Specification[Any] = ALWAYS,
    ) -> list[tuple[str, R]]:
        table = self.table(projection)
        with self._reading() as cursor:
            found = self._ask(cursor, table.select(order, limit, seek, where)).fetchall()
        return [(key, table.decode(values)) for key, *values in found]

    def count(self, projection: Projection[Any], where: Specification[Any] = ALWAYS) -> int:
        with self._reading() as cursor:
            (counted,) = self._ask(cursor, self.table(projection).count(where)).fetchone()
            return int(counted)

    # Pages ------------------------------------------------------------------------------------

    def checkpoints(self, readers: Sequence[Reader]) -> list[Checkpoint]:
        with self._reading() as cursor:
            return self._checkpoints(cursor, readers)

    def release(self, owner: str) -> None:
        with self._changing() as cursor:
            self._run(
                cursor,
                "UPDATE leftfold_checkpoints SET owner = NULL, lease = NULL WHERE owner = ?",
                (owner,),
            )
            self._tell(cursor)

    def halt(self, reader: Reader, at: Checkpoint, failure: str) -> None:
        with self._changing() as cursor:
            self._run(
                cursor,
                "UPDATE leftfold_checkpoints SET failure = ?, failed_in = epoch "
                "WHERE name = ? AND version = ? AND position = ? AND epoch = ?",
                (failure, reader.name, reader.version, at.position, at.epoch),
            )
            self._tell(cursor)

    def dead_letters(self, reader: Reader) -> list[DeadLetter]:
        with self._reading() as cursor:
            found = self._run(
                cursor,
                "SELECT position, key, originator_id, originator_version, topic, error, parked_at "
                "FROM leftfold_dead_letters WHERE name = ? AND version = ?",
                (reader.name, reader.version),
            ).fetchall()
        # Sorted here: databases order texts in different ways.
        letters = [self._letter(position, key, values) for position, key, *values in found]
        return sorted(letters, key=attrgetter("position", "key"))

    def parked(
        self, reader: Reader, positions: Iterable[int], versions: Iterable[tuple[UUID, int]]
    ) -> int | None:
        is_one = "(originator_id = ? AND originator_version = ?)"
        asked: list[tuple[str, tuple[object, ...]]] = [
            *(("position = ?", (position,)) for position in positions),
            *((is_one, (self._stored(i), version)) for i, version in versions),
        ]
        found: list[int] = []
        with self._reading() as cursor:
            for begin in range(0, len(asked), AT_ONCE):
                conditions, values = zip(*asked[begin : begin + AT_ONCE], strict=True)
                (position,) = self._run(
                    cursor,
                    "SELECT min(position) FROM leftfold_dead_letters "
                    f"WHERE name = ? AND version = ? AND ({' OR '.join(conditions)})",
                    (reader.name, reader.version, *chain.from_iterable(values)),
                ).fetchone()
                found += [] if position is None else [position]
        return min(found, default=None)

    def write(
        self,
        changes: Sequence[Change],
        position: int,
        *,
        group: Group | None = None,
        is_built: bool = False,
        is_fence: bool = False,
    ) -> bool:
        rows = self._encode(changes)
        size = sum(map(len, rows))
        prepared = list(map(self._prepare, changes, rows))
        try:
            with self._changing(size, has_events=group is not None) as cursor:
                self._move(cursor, changes, position, is_built=is_built, is_fence=is_fence)
                for change, made in zip(changes, prepared, strict=True):
                    self._write(cursor, change, made)
                    if is_built and not change.checkpoint.is_built:
                        self._show(cursor, change.reader)
                if group is not None:
                    self._commit_whole(cursor, group)
        except Moved:
            return False
        except NotFresh:
            changes = [replace(change, fresh=frozenset()) for change in changes]
            return self.write(changes, position, group=group, is_built=is_built, is_fence=is_fence)
        except Exception:
            inline = None if group is None else self.log.inline
            if inline is None or not inline.make_good():
                raise
            return False
        return True

    def _encode(self, changes: Sequence[Change]) -> list[Encoded]:
        """Encode the rows of a page, before any lock is taken; those that views share, once."""
        shared: dict[tuple[int, type], Encoded] = {}
        found: list[Encoded] = []
        for change in changes:
            reader, encoded = change.reader, Encoded()
            if isinstance(reader, Projection) and change.rows:
                same = (id(change.rows), reader.row)
                with collector_paused():
                    encoded = self.table(reader).encode(change.rows, shared.get(same))
                shared[same] = encoded
            found.append(encoded)
        return found

    def _prepare(self, change: Change, encoded: Encoded) -> Any:
        if not encoded or not isinstance(change.reader, Projection):
            return None
        return self._prepared(self.table(change.reader), encoded, change.fresh)

    def _write(self, cursor: C, change: Change, prepared: Any) -> None:
        reader = change.reader
        self._keep_letters(cursor, change)
        if not isinstance(reader, Projection):
            return
        table = self.table(reader)
        # Two rows may change places in a unique column: there all go before any comes.
        gone = [key for key, row in change.rows.items() if row is None or reader.unique]
        if gone:
            self._delete(cursor, table, gone)
        if prepared is not None:
            with self._refusing(reader):
                self._put(cursor, table, prepared)
        if reader.writes is not None and change.events:
            reader.writes(self._executing(cursor), change.events)

    @contextmanager
    def _refusing(self, projection: Projection[Any]) -> Iterator[None]:
        """Raise `NotUnique` for rows that a unique column does not take."""
        try:
            yield
        except Exception as error:
            refusal = self._refusal(projection, error)
            if refusal is None:
                raise
            raise refusal from None

    def _keep_letters(self, cursor: C, change: Change) -> None:
        """Keep new dead letters, and drop those that are none any more."""
        who = (change.reader.name, change.reader.version)
        if change.released:
            self._run_many(
                cursor,
                "DELETE FROM leftfold_dead_letters "
                "WHERE name = ? AND version = ? AND position = ? AND key = ?",
                [(*who, letter.position, letter.key) for letter in change.released],
            )
        if change.parked:
            self._run_many(
                cursor,
                "INSERT INTO leftfold_dead_letters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (name, version, position, key) DO UPDATE "
                "SET error = excluded.error, parked_at = excluded.parked_at",
                [(*who, *map(self._stored, astuple(letter))) for letter in change.parked],
            )

    def _commit_whole(self, cursor: C, group: Group) -> None:
        """Write the events of a page. Raises `Moved` if others were first."""
        for run in runs([group]):
            if run is None or not is_written(self._commit(cursor, run)[0]):
                raise Moved

    # Versions ---------------------------------------------------------------------------------

    def versions(self, name: str) -> dict[int, bool]:
        with self._reading() as cursor:
            found = self._run(
                cursor,
                f"SELECT version, lease > {self.now} FROM leftfold_checkpoints WHERE name = ?",
                (name,),
            ).fetchall()
        return {version: bool(is_held) for version, is_held in found}

    def define(self, reader: Reader) -> None:
        with self._changing(defines=True) as cursor:
            self._set_up(cursor, reader)

    def _set_up(self, cursor: C, reader: Reader) -> None:
        """Make what a reader needs, or check that it is there, and as it was made.

        Raises `SchemaMissingError` where nothing may be made, `ViewChangedError`.
        """
        table = self.table(reader) if isinstance(reader, Projection) else None
        who, columns = (reader.name, reader.version), table.description if table else ""
        found = self._run(
            cursor,
            "SELECT definition, reads, built FROM leftfold_checkpoints "
            "WHERE name = ? AND version = ?",
            who,
        ).fetchone()
        if found is not None:
            definition, reads, is_built = found
            check_unchanged(reader, columns, (definition, reads))
            if self._may_define and reads != reader.reads:
                self._run(
                    cursor,
                    "UPDATE leftfold_checkpoints SET reads = ? WHERE name = ? AND version = ?",
                    (reader.reads, *who),
                )
        elif self._may_define:
            is_built = self._make(cursor, reader, table)
        else:
            raise SchemaMissingError(self._name, table.table.name if table else reader.name)
        if self._may_define and table is not None:
            for name, statement in table.indexes.items():
                # One that is there is left alone: to make it again takes a lock from pages.
                if not self._exists(cursor, name):
                    self._allow_time(cursor)
                    self._run(cursor, statement)
            if is_built:
                self._show(cursor, reader)

    def _make(self, cursor: C, reader: Reader, table: ViewTable[Any] | None) -> bool:
        """Make a reader's table and checkpoint; tell whether it is as far as the log."""
        (head,) = self._run(cursor, self.head).fetchone()
        begin = head if reader.begins_now else 0
        if table is not None:
            self._run(cursor, table.definition)
        self._run(
            cursor,
            "INSERT INTO leftfold_checkpoints (name, version, position, definition, reads, built) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (
                *(reader.name, reader.version, begin),
                *(table.description if table else "", reader.reads, begin == head),
            ),
        )
        return bool(begin == head)

    def drop(self, reader: Reader) -> None:
        with self._changing(defines=True) as cursor:
            self._allow_time(cursor)
            self._drop(cursor, reader)

    def _drop(self, cursor: C, reader: Reader) -> None:
        for kept in ("leftfold_dead_letters", "leftfold_checkpoints"):
            self._run(
                cursor,
                f"DELETE FROM {kept} WHERE name = ? AND version = ?",
                (reader.name, reader.version),
            )
        if isinstance(reader, Projection):
            if reader.version > 0 and self._is_shown(cursor, reader):
                self._run(cursor, f'DROP VIEW IF EXISTS "{reader.name}"')
            self._run(cursor, f'DROP TABLE IF EXISTS "{reader.table}"')

    def before(self, projection: Projection[Any]) -> Projection[Any] | None:
        with self._reading() as cursor:
            found = self._run(
                cursor,
                "SELECT version, definition FROM leftfold_checkpoints "
                "WHERE name = ? AND version > 0 AND version < ? ORDER BY version DESC LIMIT 1",
                (projection.name, projection.version),
            ).fetchone()
        if found is None or found[1] != self.table(projection).description:
            return None
        return projection.at(found[0])

    def compare(self, projection: Projection[Any], other: Projection[Any]) -> Comparison | None:
        with self._comparing() as cursor:
            self._allow_time(cursor)
            return self._compare(cursor, projection, other)

    def _compare(
        self, cursor: C, projection: Projection[Any], other: Projection[Any]
    ) -> Comparison | None:
        one, two = self._checkpoints(cursor, [projection, other])
        if one.position != two.position:
            return None
        query = self.table(projection).comparison(self.table(other))
        return Comparison(*self._run(cursor, query).fetchone())

    def take_over(self, projection: Projection[Any], anew: Projection[Any]) -> Comparison | None:
        who = (projection.name, projection.version)
        with self._changing() as cursor:
            self._allow_time(cursor)
            self._lock(cursor, [projection, anew])
            compared = self._compare(cursor, anew, projection)
            if compared is not None:
                with self._refusing(projection):
                    for statement in self.table(projection).replacing(self.table(anew)):
                        self._run(cursor, statement)
                self._run(
                    cursor, "DELETE FROM leftfold_dead_letters WHERE name = ? AND version = ?", who
                )
                self._run(
                    cursor,
                    "UPDATE leftfold_dead_letters SET version = ? WHERE name = ? AND version = ?",
                    (projection.version, anew.name, anew.version),
                )
                self._run(
                    cursor,
                    "UPDATE leftfold_checkpoints SET epoch = epoch + 1 "
                    "WHERE name = ? AND version = ?",
                    who,
                )
                self._drop(cursor, anew)
        return compared

    def _show(self, cursor: C, reader: Reader) -> None:
        """Let the view for people show this version, unless it shows this or a later one.

        If it does it stays: to drop it is to wait for all who read it.
        """
        if not (self._may_define and isinstance(reader, Projection) and reader.version > 0):
            return
        if not (self._is_shown(cursor, reader) or self._has_later(cursor, reader)):
            self._show_now(cursor, self.table(reader))

    def _show_now(self, cursor: C, table: ViewTable[Any]) -> None:
        self._run(cursor, f'DROP VIEW IF EXISTS "{table.projection.name}"')
        self._run(cursor, table.member_view)

    def _has_later(self, cursor: C, reader: Reader) -> bool:
        later = self._run(
            cursor,
            "SELECT count(*) FROM leftfold_checkpoints WHERE name = ? AND version > ? AND built",
            (reader.name, reader.version),
        )
        return bool(later.fetchone()[0]) and self._exists(cursor, reader.name)


def not_unique(projection: Projection[Any], name: str) -> NotUnique | None:
    """Return the refusal that the name of a violated index or its columns stands for."""
    for columns in projection.unique:
        listed = ", ".join(f"{projection.table}.{column}" for column in columns)
        if name in (listed, index_name(projection, columns, "unique")):
            return NotUnique(projection.name, columns)
    return None
