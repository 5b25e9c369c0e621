"""Views on SQLite: tables and checkpoints beside the events."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from copy import copy
from dataclasses import astuple
from datetime import datetime
from typing import Any, Protocol, TypeVar

from leftfold.application import Projection
from leftfold.application.checkpoints import Change, Checkpoint, Comparison, DeadLetter, Reader
from leftfold.application.ports import Group, Order, Seek, Verdict
from leftfold.domain import ALWAYS, Specification
from leftfold.domain.personal import Keys
from leftfold.infrastructure.errors import SchemaMissingError
from leftfold.infrastructure.stores.common import Run, Tables, not_unique, runs
from leftfold.infrastructure.stores.readers import ABSENT, check_unchanged
from leftfold.infrastructure.stores.sqlite_file import (
    Joined,
    SQLiteFile,
    as_stored,
    chunks,
    insert_rows,
    marks,
)
from leftfold.infrastructure.stores.verdicts import is_written
from leftfold.infrastructure.tables import SQLITE, ViewTable

R = TypeVar("R")

NOW = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"


class Writing(Protocol):
    """The log, where events are written in a transaction under way."""

    def write(self, connection: sqlite3.Connection, run: Run) -> list[Verdict]:
        """Write what may be written; each group gets its own verdict."""
        ...


class SQLiteViews(Tables):
    """Views and their checkpoints as tables beside the events."""

    dialect = SQLITE

    def __init__(
        self, name: str, file: SQLiteFile, log: Writing, keys: Keys | None, *, may_define: bool
    ) -> None:
        super().__init__(keys, may_define=may_define)
        self._name = name
        self._file: SQLiteFile | Joined = file
        self._log = log

    def within(self, joined: Joined) -> SQLiteViews:
        """Return the same views, in a transaction under way."""
        views = copy(self)
        views._file = joined
        return views

    def checkpoints(self, readers: Sequence[Reader]) -> list[Checkpoint]:
        with self._file.reading() as cursor:
            return _checkpoints(cursor, readers)

    def hold(self, readers: Sequence[Reader], owner: str, seconds: float) -> list[Checkpoint]:
        until = f"+{seconds:.3f} seconds"
        with self._file.writing(durable=False) as connection:
            connection.executemany(
                "UPDATE leftfold_checkpoints SET epoch = epoch + (owner IS NOT ?1), owner = ?1, "
                "lease = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', ?2) WHERE name = ?3 "
                f"AND version = ?4 AND (owner IS ?1 OR owner IS NULL OR lease < {NOW})",
                [(owner, until, reader.name, reader.version) for reader in readers],
            )
            return _checkpoints(connection.cursor(), readers)

    def release(self, owner: str) -> None:
        with self._file.writing(durable=False) as connection:
            connection.execute(
                "UPDATE leftfold_checkpoints SET owner = NULL, lease = NULL WHERE owner = ?",
                (owner,),
            )

    def define(self, reader: Reader) -> None:
        table = self.table(reader) if isinstance(reader, Projection) else None
        with self._file.writing() as connection:
            set_up_reader(connection, self._name, reader, table, create_tables=self._may_define)

    def drop(self, reader: Reader) -> None:
        with self._file.writing() as connection:
            self._drop(connection, reader)

    def _drop(self, connection: sqlite3.Connection, reader: Reader) -> None:
        for table in ("leftfold_dead_letters", "leftfold_checkpoints"):
            connection.execute(
                f"DELETE FROM {table} WHERE name = ? AND version = ?",
                (reader.name, reader.version),
            )
        if isinstance(reader, Projection):
            if re.search(rf"\b{reader.table}\b", _shown(connection, reader.name)):
                connection.execute(f'DROP VIEW IF EXISTS "{reader.name}"')
            connection.execute(f'DROP TABLE IF EXISTS "{reader.table}"')

    def versions(self, name: str) -> dict[int, bool]:
        with self._file.reading() as cursor:
            cursor.execute(
                f"SELECT version, ifnull(lease > {NOW}, 0) FROM leftfold_checkpoints "
                "WHERE name = ?",
                (name,),
            )
            return {version: bool(is_held) for version, is_held in cursor}

    def compare(self, projection: Projection[Any], other: Projection[Any]) -> Comparison | None:
        with self._file.reading() as cursor:
            cursor.execute("BEGIN")
            try:
                return self._compare(cursor, projection, other)
            finally:
                cursor.execute("ROLLBACK")

    def _compare(
        self, cursor: sqlite3.Cursor, projection: Projection[Any], other: Projection[Any]
    ) -> Comparison | None:
        one, two = _checkpoints(cursor, [projection, other])
        if one.position != two.position:
            return None
        cursor.execute(self.table(projection).comparison(self.table(other)))
        return Comparison(*cursor.fetchone())

    def take_over(self, projection: Projection[Any], anew: Projection[Any]) -> Comparison | None:
        with self._file.writing(durable=False) as connection:
            compared = self._compare(connection.cursor(), anew, projection)
            if compared is not None:
                for statement in self.table(projection).replacing(self.table(anew)):
                    connection.execute(statement)
                name, version = projection.name, projection.version
                connection.execute(
                    "DELETE FROM leftfold_dead_letters WHERE name = ? AND version = ?",
                    (name, version),
                )
                connection.execute(
                    "UPDATE leftfold_dead_letters SET version = ? WHERE name = ? AND version = ?",
                    (version, name, anew.version),
                )
                connection.execute(
                    "UPDATE leftfold_checkpoints SET epoch = epoch + 1 "
                    "WHERE name = ? AND version = ?",
                    (name, version),
                )
                self._drop(connection, anew)
        return compared

    def dead_letters(self, reader: Reader) -> list[DeadLetter]:
        with self._file.reading() as cursor:
            cursor.execute(
                "SELECT position, key, originator_id, originator_version, topic, error, parked_at "
                "FROM leftfold_dead_letters WHERE name = ? AND version = ? ORDER BY position, key",
                (reader.name, reader.version),
            )
            return [
                DeadLetter(
                    at, key, as_stored(i), v, topic, error, datetime.fromisoformat(parked_at)
                )
                for at, key, i, v, topic, error, parked_at in cursor
            ]

    def load(self, projection: Projection[R], keys: Sequence[str]) -> dict[str, R]:
        table = self.table(projection)
        found: dict[str, R] = {}
        with self._file.reading() as cursor:
            for chunk in chunks(list(keys)):
                places = marks(len(chunk))
                cursor.execute(f"{table.select_by_key} IN ({places})", chunk)
                for key, *values in cursor:
                    found[key] = table.decode(values)
        return found

    def write(
        self,
        changes: Sequence[Change],
        position: int,
        *,
        group: Group | None = None,
        is_built: bool = False,
        is_fence: bool = False,
    ) -> bool:
        rows = [[values for _, values in encoded] for encoded in self.encode(changes)]
        size = sum(map(len, rows))
        try:
            # Rows and checkpoint share the transaction: if it is lost, the page is folded again.
            with self._file.writing(size, durable=group is not None) as connection:
                for change, encoded_rows in zip(changes, rows, strict=True):
                    _move(connection, change, position, is_built=is_built, is_fence=is_fence)
                    self._write(connection, change, encoded_rows)
                    if is_built and not change.checkpoint.is_built:
                        self._show(connection, change.reader)
                for run in runs([group]) if group is not None else ():
                    if run is None or not is_written(self._log.write(connection, run)[0]):
                        raise _Moved  # noqa: TRY301 - it undoes what the block has written
        except _Moved:
            return False
        return True

    def _write(
        self, connection: sqlite3.Connection, change: Change, rows: list[list[object]]
    ) -> None:
        reader = change.reader
        _put_aside(connection, change)
        if not isinstance(reader, Projection):
            return
        table = self.table(reader)
        # Two rows may change places in a unique column: there all go before any comes.
        gone = [(key,) for key, row in change.rows.items() if row is None or reader.unique]
        connection.executemany(f"{table.delete_by_key} = ?", gone)
        try:
            insert_rows(connection, table.insert, table.on_conflict, rows)
        except sqlite3.IntegrityError as error:
            refusal = not_unique(reader, str(error).partition(": ")[2])
            if refusal is None:
                raise
            raise refusal from None
        if reader.writes is not None:
            reader.writes(connection.execute, change.events)

    def _show(self, connection: sqlite3.Connection, reader: Reader) -> None:
        if (
            self._may_define
            and isinstance(reader, Projection)
            and reader.version > 0
            and not _shows(connection, self.table(reader))
        ):
            _show(connection, self.table(reader))

    def select(
        self,
        projection: Projection[R],
        order: Order | None,
        limit: int | None,
        seek: Seek | None = None,
        where: Specification[Any] = ALWAYS,
    ) -> list[tuple[str, R]]:
        table = self.table(projection)
        query = table.select(order, limit, seek, where)
        with self._file.reading() as cursor:
            cursor.execute(query.sql, query.parameters)
            return [(key, table.decode(values)) for key, *values in cursor]

    def count(self, projection: Projection[Any], where: Specification[Any] = ALWAYS) -> int:
        query = self.table(projection).count(where)
        with self._file.reading() as cursor:
            cursor.execute(query.sql, query.parameters)
            (counted,) = cursor.fetchone()
            return int(counted)


def set_up_reader(
    connection: sqlite3.Connection,
    name: str,
    reader: Reader,
    table: ViewTable[Any] | None,
    *,
    create_tables: bool,
) -> None:
    """Make what a reader needs, or check that it is there, and as it was made.

    Raises `SchemaMissingError` where nothing may be made, `ViewChangedError`.
    """
    who, columns = (reader.name, reader.version), table.description if table else ""
    found = connection.execute(
        "SELECT definition, reads, built FROM leftfold_checkpoints WHERE name = ? AND version = ?",
        who,
    ).fetchone()
    if found is None:
        if not create_tables:
            raise SchemaMissingError(
                name, reader.table if isinstance(reader, Projection) else reader.name
            )
        (head,) = connection.execute("SELECT max(position) FROM stored_events").fetchone()
        begin = (head or 0) if reader.begins_now else 0
        is_built = begin == (head or 0)
        if table is not None:
            connection.execute(table.definition)
        connection.execute(
            "INSERT INTO leftfold_checkpoints (name, version, position, definition, reads, built) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (*who, begin, columns, reader.reads, is_built),
        )
    else:
        check_unchanged(reader, columns, (found[0], found[1]))
        is_built = bool(found[2])
        if create_tables and not found[1]:
            connection.execute(
                "UPDATE leftfold_checkpoints SET reads = ? WHERE name = ? AND version = ?",
                (reader.reads, *who),
            )
    if create_tables and table is not None:
        for index in table.indexes.values():
            connection.execute(index)
        if is_built and reader.version > 0 and not _shows(connection, table):
            _show(connection, table)


def _shows(connection: sqlite3.Connection, table: ViewTable[Any]) -> bool:
    """Tell whether the view for people is on this version's table, or a later one's."""
    later = connection.execute(
        "SELECT 1 FROM leftfold_checkpoints AS c JOIN sqlite_master AS m ON m.name = c.name "
        "WHERE c.name = ? AND version > ? AND built AND type = 'view'",
        (table.projection.name, table.projection.version),
    ).fetchone()
    return later is not None or _shown(connection, table.projection.name) == table.member_view


def _shown(connection: sqlite3.Connection, name: str) -> str:
    """Return the statement that made the view for people; empty if there is none."""
    query = "SELECT sql FROM sqlite_master WHERE type = 'view' AND name = ?"
    found: tuple[str] | None = connection.execute(query, (name,)).fetchone()
    return "" if found is None else found[0]


def _show(connection: sqlite3.Connection, table: ViewTable[Any]) -> None:
    """Let the view for people show this version."""
    connection.execute(f'DROP VIEW IF EXISTS "{table.projection.name}"')
    connection.execute(table.member_view)


def _checkpoints(cursor: sqlite3.Cursor, readers: Sequence[Reader]) -> list[Checkpoint]:
    found: list[Checkpoint] = []
    cursor.row_factory = None
    for reader in readers:
        cursor.execute(
            f"SELECT position, epoch, ifnull(owner, ''), ifnull(lease > {NOW}, 0), built, "
            "(SELECT count(*) FROM leftfold_dead_letters AS d WHERE d.name = c.name "
            "AND d.version = c.version) FROM leftfold_checkpoints AS c "
            "WHERE name = ? AND version = ?",
            (reader.name, reader.version),
        )
        row = cursor.fetchone()
        if row is None:
            found.append(ABSENT)
            continue
        position, epoch, owner, is_held, is_built, dead_letters = row
        checkpoint = Checkpoint(position, epoch, owner, bool(is_held), bool(is_built), dead_letters)
        found.append(checkpoint)
    return found


def _move(
    connection: sqlite3.Connection,
    change: Change,
    position: int,
    *,
    is_built: bool,
    is_fence: bool,
) -> None:
    """Move a checkpoint. Raises `_Moved` unless it is as the change found it."""
    reader, at = change.reader, change.checkpoint
    moved = connection.execute(
        "UPDATE leftfold_checkpoints SET position = ?, epoch = epoch + ?, built = built OR ? "
        "WHERE name = ? AND version = ? AND position = ? AND epoch = ?",
        (position, is_fence, is_built, reader.name, reader.version, at.position, at.epoch),
    )
    if moved.rowcount != 1:
        raise _Moved


def _put_aside(connection: sqlite3.Connection, change: Change) -> None:
    """Keep new dead letters, and drop those that are none any more."""
    who = (change.reader.name, change.reader.version)
    connection.executemany(
        "DELETE FROM leftfold_dead_letters "
        "WHERE name = ? AND version = ? AND position = ? AND key = ?",
        [(*who, letter.position, letter.key) for letter in change.released],
    )
    connection.executemany(
        f"INSERT OR REPLACE INTO leftfold_dead_letters VALUES ({marks(9)})",
        [
            (*who, at, key, i.bytes, version, topic, error, parked_at.isoformat())
            for at, key, i, version, topic, error, parked_at in map(astuple, change.parked)
        ],
    )


class _Moved(Exception):
    """A checkpoint is not as a page found it, or events were written first by others."""
