"""Views on SQLite."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

from leftfold.application import Projection
from leftfold.application.checkpoints import Change, Checkpoint, DeadLetter, Reader
from leftfold.application.errors import NotUnique
from leftfold.application.ports import Verdict
from leftfold.application.projection import Execute
from leftfold.infrastructure.stores.common import ABSENT, Run
from leftfold.infrastructure.stores.sqlite_file import (
    Joined,
    SQLiteFile,
    as_stored,
    chunks,
    insert_rows,
    marks,
)
from leftfold.infrastructure.stores.table_views import Moved, Rows, TableViews, not_unique
from leftfold.infrastructure.tables import SQLITE, Encoded, Statement, ViewTable

R = TypeVar("R")


class SQLiteViews(TableViews[SQLiteFile | Joined, sqlite3.Cursor]):
    """Views and their checkpoints as tables beside the events."""

    dialect = SQLITE
    head = "SELECT ifnull(max(position), 0) FROM stored_events"
    now = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"

    def hold(self, readers: Sequence[Reader], owner: str, seconds: float) -> list[Checkpoint]:
        until = f"+{seconds:.3f} seconds"
        with self._changing() as cursor:
            cursor.executemany(
                "UPDATE leftfold_checkpoints SET epoch = epoch + (owner IS NOT ?1), owner = ?1, "
                "lease = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', ?2) WHERE name = ?3 "
                f"AND version = ?4 AND (owner IS ?1 OR owner IS NULL OR lease < {self.now})",
                [(owner, until, reader.name, reader.version) for reader in readers],
            )
            return self._checkpoints(cursor, readers)

    def load(self, projection: Projection[R], keys: Sequence[str]) -> dict[str, R]:
        table = self.table(projection)
        found: dict[str, R] = {}
        with self._reading() as cursor:
            for chunk in chunks(list(keys)):
                cursor.execute(f"{table.select_by_key} IN ({marks(len(chunk))})", chunk)
                for key, *values in cursor:
                    found[key] = table.decode(values)
        return found

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Cursor]:
        with self._database.reading() as cursor:
            yield cursor

    @contextmanager
    def _changing(
        self, rows: int = 0, /, *, has_events: bool = False, defines: bool = False
    ) -> Iterator[sqlite3.Cursor]:
        with self._database.writing(rows, durable=has_events or defines) as connection:
            cursor = connection.cursor()
            cursor.row_factory = None
            yield cursor

    @contextmanager
    def _comparing(self) -> Iterator[sqlite3.Cursor]:
        with self._database.reading() as cursor:
            cursor.execute("BEGIN")
            try:
                yield cursor
            finally:
                cursor.connection.rollback()  # nothing, if an error has ended it

    def _run(self, cursor: sqlite3.Cursor, sql: str, values: Sequence[object] = ()) -> Rows:
        return cursor.execute(sql, values)

    def _run_many(self, cursor: sqlite3.Cursor, sql: str, rows: Sequence[Sequence[object]]) -> None:
        cursor.executemany(sql, rows)

    def _ask(self, cursor: sqlite3.Cursor, statement: Statement) -> Rows:
        return cursor.execute(statement.sql, statement.parameters)

    def _executing(self, cursor: sqlite3.Cursor) -> Execute:
        return cursor.connection.execute

    def _checkpoints(self, cursor: sqlite3.Cursor, readers: Sequence[Reader]) -> list[Checkpoint]:
        found: list[Checkpoint] = []
        for reader in readers:
            cursor.execute(
                f"SELECT position, epoch, ifnull(owner, ''), ifnull(lease > {self.now}, 0), built, "
                "(SELECT count(*) FROM leftfold_dead_letters AS d WHERE d.name = c.name "
                f"AND d.version = c.version), {self.failure} FROM leftfold_checkpoints AS c "
                "WHERE name = ? AND version = ?",
                (reader.name, reader.version),
            )
            row = cursor.fetchone()
            if row is None:
                found.append(ABSENT)
                continue
            position, epoch, owner, is_held, is_built, *others = row
            found.append(Checkpoint(position, epoch, owner, bool(is_held), bool(is_built), *others))
        return found

    def _move(
        self,
        cursor: sqlite3.Cursor,
        changes: Sequence[Change],
        position: int,
        *,
        is_built: bool,
        is_fence: bool,
    ) -> None:
        for change in changes:
            reader, at = change.reader, change.checkpoint
            cursor.execute(
                "UPDATE leftfold_checkpoints SET position = ?, epoch = epoch + ?, "
                "built = built OR ? WHERE name = ? AND version = ? AND position = ? AND epoch = ?",
                (position, is_fence, is_built, reader.name, reader.version, at.position, at.epoch),
            )
            if cursor.rowcount != 1:
                raise Moved

    def _commit(self, cursor: sqlite3.Cursor, run: Run) -> list[Verdict]:
        return self.log.write(cursor.connection, run)

    def _prepared(
        self, _table: ViewTable[Any], encoded: Encoded, _fresh: Collection[str], /
    ) -> list[list[object]]:
        return [values for _, values in encoded]

    def _put(
        self, cursor: sqlite3.Cursor, table: ViewTable[Any], prepared: list[list[object]]
    ) -> None:
        insert_rows(cursor.connection, table.into, prepared, table.on_conflict)

    def _refusal(self, projection: Projection[Any], error: Exception) -> NotUnique | None:
        if not isinstance(error, sqlite3.IntegrityError):
            return None
        return not_unique(projection, str(error).partition(": ")[2])

    def _delete(self, cursor: sqlite3.Cursor, table: ViewTable[Any], keys: Sequence[str]) -> None:
        cursor.executemany(f"{table.delete_by_key} = ?", [(key,) for key in keys])

    def _exists(self, cursor: sqlite3.Cursor, name: str) -> bool:
        query = "SELECT count(*) FROM sqlite_master WHERE name = ?"
        return bool(cursor.execute(query, (name,)).fetchone()[0])

    def _is_shown(self, cursor: sqlite3.Cursor, projection: Projection[Any]) -> bool:
        query = "SELECT sql FROM sqlite_master WHERE type = 'view' AND name = ?"
        found = cursor.execute(query, (projection.name,)).fetchone()
        return found is not None and bool(re.search(rf"\b{projection.table}\b", found[0]))

    def _stored(self, value: object) -> object:
        if isinstance(value, UUID):
            return value.bytes
        return value.isoformat() if isinstance(value, datetime) else value

    def _letter(self, position: int, key: str, values: Sequence[Any]) -> DeadLetter:
        aggregate_id, version, topic, error, parked_at = values
        parked = datetime.fromisoformat(parked_at)
        return DeadLetter(position, key, as_stored(aggregate_id), version, topic, error, parked)
