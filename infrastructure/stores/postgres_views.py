"""Views on PostgreSQL: tables and checkpoints beside the events."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import astuple
from typing import Any, Protocol, TypeVar

import psycopg

from leftfold.application import Projection
from leftfold.application.checkpoints import Change, Checkpoint, Comparison, DeadLetter, Reader
from leftfold.application.ports import Group, Order, Seek, Verdict
from leftfold.domain import ALWAYS, Specification
from leftfold.domain.personal import Keys
from leftfold.infrastructure.errors import SchemaMissingError
from leftfold.infrastructure.stores.common import Run, Tables, not_unique, runs
from leftfold.infrastructure.stores.postgres_commits import without_values
from leftfold.infrastructure.stores.postgres_database import Cursor, Joined, PostgresDatabase
from leftfold.infrastructure.stores.postgres_schema import LOCK
from leftfold.infrastructure.stores.readers import ABSENT, check_unchanged
from leftfold.infrastructure.stores.verdicts import is_written
from leftfold.infrastructure.tables import POSTGRES, Encoded, ViewTable

R = TypeVar("R")

_log = logging.getLogger("leftfold.stores")

VIEWS_CHANNEL = "leftfold_views"
DDL_LOCK = 0x1EF7F01D  # one number for all processes: whoever holds it changes tables
PROLONGED = 3.0
"""Seconds for which a page prolongs its owner's lease."""
CHECKPOINTS = (
    "SELECT name, version, position, epoch, coalesce(owner, ''), "
    "coalesce(lease > clock_timestamp(), false), built, (SELECT count(*) "
    "FROM leftfold_dead_letters AS d WHERE d.name = c.name AND d.version = c.version) "
    "FROM leftfold_checkpoints AS c "
    "WHERE (name, version) IN (SELECT * FROM unnest(%s::text[], %s::int[]))"
)


class Writing(Protocol):
    """The log, where events are written in a transaction under way."""

    def write(self, connection: psycopg.Connection[Any], run: Run) -> list[Verdict]:
        """Write what may be written; each group gets its own verdict."""
        ...


class PostgresViews(Tables):
    """Views and their checkpoints as tables beside the events."""

    dialect = POSTGRES

    def __init__(
        self,
        name: str,
        database: PostgresDatabase,
        log: Writing,
        keys: Keys | None,
        *,
        may_define: bool,
    ) -> None:
        super().__init__(keys, may_define=may_define)
        self._name = name
        self._database: PostgresDatabase | Joined = database
        self._log = log

    def within(self, joined: Joined) -> PostgresViews:
        """Return the same views, in a transaction under way."""
        views = copy(self)
        views._database = joined
        return views

    def checkpoints(self, readers: Sequence[Reader]) -> list[Checkpoint]:
        with self._database.reading() as cursor:
            return _checkpoints(cursor, readers)

    def hold(self, readers: Sequence[Reader], owner: str, seconds: float) -> list[Checkpoint]:
        with self._database.writing() as cursor:
            cursor.execute("SET LOCAL synchronous_commit = off")
            cursor.execute(
                "UPDATE leftfold_checkpoints SET owner = %(owner)s, "
                "epoch = epoch + (owner IS DISTINCT FROM %(owner)s)::int, "
                "lease = clock_timestamp() + make_interval(secs => %(seconds)s) "
                # Of those whose page is being written the page prolongs the lease: to wait for it
                # with others in hand would make all wait for one.
                "WHERE (name, version) IN (SELECT name, version FROM leftfold_checkpoints "
                "WHERE (name, version) IN (SELECT * FROM unnest(%(names)s::text[], "
                "%(versions)s::int[])) AND (owner = %(owner)s OR owner IS NULL "
                "OR lease < clock_timestamp()) ORDER BY name, version FOR UPDATE SKIP LOCKED)",
                {"owner": owner, "seconds": seconds, **_named(readers)},
            )
            return _checkpoints(cursor, readers)

    def release(self, owner: str) -> None:
        with self._database.writing() as cursor:
            cursor.execute(
                "UPDATE leftfold_checkpoints SET owner = NULL, lease = NULL WHERE owner = %s",
                (owner,),
            )
            cursor.execute(f"NOTIFY {VIEWS_CHANNEL}")

    def define(self, reader: Reader) -> None:
        table = self.table(reader) if isinstance(reader, Projection) else None
        with self._database.writing() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (DDL_LOCK,))
            set_up_reader(cursor, self._name, reader, table, create_tables=self._may_define)

    def drop(self, reader: Reader) -> None:
        with self._database.writing() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (DDL_LOCK,))
            self._drop(cursor, reader)

    def _drop(self, cursor: Cursor, reader: Reader) -> None:
        for table in ("leftfold_dead_letters", "leftfold_checkpoints"):
            cursor.execute(
                f"DELETE FROM {table} WHERE name = %s AND version = %s".encode(),
                (reader.name, reader.version),
            )
        if isinstance(reader, Projection):
            if reader.version > 0 and _is_shown(cursor, reader):
                cursor.execute(f'DROP VIEW IF EXISTS "{reader.name}"'.encode())
            cursor.execute(f'DROP TABLE IF EXISTS "{reader.table}"'.encode())

    def versions(self, name: str) -> dict[int, bool]:
        with self._database.reading() as cursor:
            cursor.execute(
                "SELECT version, coalesce(lease > clock_timestamp(), false) "
                "FROM leftfold_checkpoints WHERE name = %s",
                (name,),
            )
            return dict(cursor.fetchall())

    def compare(self, projection: Projection[Any], other: Projection[Any]) -> Comparison | None:
        with self._database.writing() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            return self._compare(cursor, projection, other)

    def _compare(
        self, cursor: Cursor, projection: Projection[Any], other: Projection[Any]
    ) -> Comparison | None:
        one, two = _checkpoints(cursor, [projection, other])
        if one.position != two.position:
            return None
        cursor.execute(self.table(projection).comparison(self.table(other)).encode())
        return Comparison(*(cursor.fetchone() or (0, 0, 0, 0)))

    def take_over(self, projection: Projection[Any], anew: Projection[Any]) -> Comparison | None:
        who = {"name": projection.name, "version": projection.version, "anew": anew.version}
        with self._database.writing() as cursor:
            cursor.execute(  # no page of either comes between
                "SELECT FROM leftfold_checkpoints WHERE name = %(name)s "
                "AND version IN (%(version)s, %(anew)s) ORDER BY version FOR UPDATE",
                who,
            )
            compared = self._compare(cursor, anew, projection)
            if compared is not None:
                for statement in self.table(projection).replacing(self.table(anew)):
                    cursor.execute(statement.encode())
                cursor.execute(
                    "DELETE FROM leftfold_dead_letters "
                    "WHERE name = %(name)s AND version = %(version)s",
                    who,
                )
                cursor.execute(
                    "UPDATE leftfold_dead_letters SET version = %(version)s "
                    "WHERE name = %(name)s AND version = %(anew)s",
                    who,
                )
                cursor.execute(
                    "UPDATE leftfold_checkpoints SET epoch = epoch + 1 "
                    "WHERE name = %(name)s AND version = %(version)s",
                    who,
                )
                self._drop(cursor, anew)
        return compared

    def dead_letters(self, reader: Reader) -> list[DeadLetter]:
        with self._database.reading() as cursor:
            cursor.execute(
                "SELECT position, key, originator_id, originator_version, topic, error, parked_at "
                "FROM leftfold_dead_letters WHERE name = %s AND version = %s "
                'ORDER BY position, key COLLATE "C"',
                (reader.name, reader.version),
            )
            return [DeadLetter(*values) for values in cursor]

    def load(self, projection: Projection[R], keys: Sequence[str]) -> dict[str, R]:
        table = self.table(projection)
        with self._database.reading() as cursor:
            sql = f"{table.select_by_key} = ANY(%s)"
            cursor.execute(sql.encode(), (list(keys),), prepare=True)
            return {key: table.decode(values) for key, *values in cursor}

    def write(
        self,
        changes: Sequence[Change],
        position: int,
        *,
        group: Group | None = None,
        is_built: bool = False,
        is_fence: bool = False,
    ) -> bool:
        documents = list(map(self._dumped, changes, self.encode(changes)))
        try:
            with self._database.writing() as cursor:
                if group is None:
                    # If the transaction is lost, then with its checkpoint: it is folded again.
                    cursor.execute("SET LOCAL synchronous_commit = off")
                else:
                    cursor.execute(LOCK)  # before any row is: as commits do it
                _move(cursor, changes, position, is_built=is_built, is_fence=is_fence)
                for change, document in zip(changes, documents, strict=True):
                    self._write(cursor, change, document)
                    if is_built and not change.checkpoint.is_built:
                        self._show(cursor, change.reader)
                for run in runs([group]) if group is not None else ():
                    if run is None or not is_written(self._log.write(cursor.connection, run)[0]):
                        raise _Moved  # noqa: TRY301 - it undoes what the block has written
        except _Moved:
            return False
        return True

    def _dumped(self, change: Change, encoded: Encoded) -> str:
        if not encoded or not isinstance(change.reader, Projection):
            return ""
        return self.table(change.reader).dump(encoded)

    def _write(self, cursor: Cursor, change: Change, document: str) -> None:
        reader = change.reader
        _put_aside(cursor, change)
        if not isinstance(reader, Projection):
            return
        table = self.table(reader)
        # Two rows may change places in a unique column: there all go before any comes.
        deleted = [key for key, row in change.rows.items() if row is None or reader.unique]
        if deleted:
            cursor.execute(f"{table.delete_by_key} = ANY(%s)".encode(), (deleted,))
        try:
            if document:
                cursor.execute(table.upsert_json.encode(), (document,), prepare=True)
        except psycopg.errors.UniqueViolation as error:
            refusal = not_unique(reader, error.diag.constraint_name or "")
            if refusal is None:
                raise
            raise refusal from None
        if reader.writes is not None:
            reader.writes(cursor.execute, change.events)

    def _show(self, cursor: Cursor, reader: Reader) -> None:
        if (
            self._may_define
            and isinstance(reader, Projection)
            and reader.version > 0
            and not _shows(cursor, reader)
        ):
            try:
                with cursor.connection.transaction():
                    _show(cursor, self.table(reader))
            except psycopg.Error as error:  # others may have made something of it
                _log.warning(
                    "%s does not show %s: %s", reader.name, reader.table, without_values(error)
                )

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
        with self._database.reading() as cursor:
            cursor.execute(query.sql.encode(), query.parameters)
            return [(key, table.decode(values)) for key, *values in cursor]

    def count(self, projection: Projection[Any], where: Specification[Any] = ALWAYS) -> int:
        query = self.table(projection).count(where)
        with self._database.reading() as cursor:
            cursor.execute(query.sql.encode(), query.parameters)
            (counted,) = cursor.fetchone() or (0,)
            return int(counted)


def set_up_reader(
    cursor: Cursor,
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
    found = cursor.execute(
        "SELECT definition, reads, built FROM leftfold_checkpoints "
        "WHERE name = %s AND version = %s",
        who,
    ).fetchone()
    if found is None:
        if not create_tables:
            raise SchemaMissingError(
                name, reader.table if isinstance(reader, Projection) else reader.name
            )
        end = cursor.execute("SELECT max(notification_id) FROM stored_events").fetchone()
        head = (end[0] if end else 0) or 0
        begin = head if reader.begins_now else 0
        is_built = begin == head
        if table is not None:
            cursor.execute(table.definition.encode())
        cursor.execute(
            "INSERT INTO leftfold_checkpoints "
            "(name, version, position, definition, reads, built) "
            "VALUES (%s, %s, %s, %s, %s, %s)",
            (*who, begin, columns, reader.reads, is_built),
        )
    else:
        check_unchanged(reader, columns, (found[0], found[1]))
        is_built = found[2]
        if create_tables and not found[1]:
            cursor.execute(
                "UPDATE leftfold_checkpoints SET reads = %s WHERE name = %s AND version = %s",
                (reader.reads, *who),
            )
    if create_tables and table is not None:
        _make_indexes(cursor, table)
        if is_built and reader.version > 0 and not _shows(cursor, table.projection):
            _show(cursor, table)


def _named(readers: Sequence[Reader]) -> dict[str, object]:
    return {"names": [r.name for r in readers], "versions": [r.version for r in readers]}


def _checkpoints(cursor: Cursor, readers: Sequence[Reader]) -> list[Checkpoint]:
    cursor.execute(CHECKPOINTS, tuple(_named(readers).values()))
    found = {(name, version): Checkpoint(*values) for name, version, *values in cursor}
    return [found.get((reader.name, reader.version), ABSENT) for reader in readers]


def _move(
    cursor: Cursor, changes: Sequence[Change], position: int, *, is_built: bool, is_fence: bool
) -> None:
    """Move checkpoints. Raises `_Moved` unless all are as the changes found them."""
    if len(changes) > 1:  # in one order, so that no two wait for each other
        cursor.execute(
            "SELECT FROM leftfold_checkpoints WHERE (name, version) IN "
            "(SELECT * FROM unnest(%(names)s::text[], %(versions)s::int[])) "
            "ORDER BY name, version FOR UPDATE",
            _named([change.reader for change in changes]),
            prepare=True,
        )
    cursor.execute(
        "UPDATE leftfold_checkpoints AS c SET position = %(position)s, "
        "epoch = c.epoch + %(is_fence)s::int, built = built OR %(is_built)s, "
        "lease = CASE WHEN %(is_fence)s OR lease IS NULL OR lease < clock_timestamp() THEN lease "
        "ELSE greatest(lease, clock_timestamp() + make_interval(secs => %(prolonged)s)) END "
        "FROM unnest(%(names)s::text[], %(versions)s::int[], %(positions)s::bigint[], "
        "%(epochs)s::bigint[]) AS found (name, version, position, epoch) "
        "WHERE c.name = found.name AND c.version = found.version "
        "AND c.position = found.position AND c.epoch = found.epoch",
        {
            **_named([change.reader for change in changes]),
            "positions": [change.checkpoint.position for change in changes],
            "epochs": [change.checkpoint.epoch for change in changes],
            "position": position,
            "is_built": is_built,
            "is_fence": is_fence,
            "prolonged": PROLONGED,
        },
        prepare=True,
    )
    if cursor.rowcount != len(changes):
        raise _Moved
    cursor.execute(f"NOTIFY {VIEWS_CHANNEL}")


def _put_aside(cursor: Cursor, change: Change) -> None:
    """Keep new dead letters, and drop those that are none any more."""
    who = (change.reader.name, change.reader.version)
    if change.released:
        cursor.executemany(
            "DELETE FROM leftfold_dead_letters "
            "WHERE name = %s AND version = %s AND position = %s AND key = %s",
            [(*who, letter.position, letter.key) for letter in change.released],
        )
    if change.parked:
        cursor.executemany(
            "INSERT INTO leftfold_dead_letters VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s) "
            "ON CONFLICT (name, version, position, key) DO UPDATE SET error = excluded.error, "
            "parked_at = excluded.parked_at",
            [(*who, *astuple(letter)) for letter in change.parked],
        )


class _Moved(Exception):
    """A checkpoint is not as a page found it, or events were written first by others."""


def _show(cursor: Cursor, table: ViewTable[Any]) -> None:
    """Let the view for people show this version."""
    cursor.execute(f'DROP VIEW IF EXISTS "{table.projection.name}"'.encode())
    cursor.execute(table.member_view.encode())


def _shows(cursor: Cursor, projection: Projection[Any]) -> bool:
    """Tell whether the view for people is on this version's table already, or on a later one's.

    If it is it stays: to drop it is to wait for all who read it.
    """
    later = cursor.execute(
        "SELECT to_regclass(%s) IS NOT NULL AND EXISTS (SELECT FROM leftfold_checkpoints "
        "WHERE name = %s AND version > %s AND built)",
        (f'"{projection.name}"', projection.name, projection.version),
    ).fetchone()
    return later == (True,) or _is_shown(cursor, projection)


def _is_shown(cursor: Cursor, projection: Projection[Any]) -> bool:
    """Tell whether the view for people is on just this version's table."""
    cursor.execute(
        "SELECT EXISTS (SELECT FROM pg_depend JOIN pg_rewrite ON pg_rewrite.oid = objid "
        "WHERE ev_class = to_regclass(%s) AND refobjid = to_regclass(%s))",
        (f'"{projection.name}"', f'"{projection.table}"'),
    )
    return cursor.fetchone() == (True,)


def _make_indexes(cursor: Cursor, table: ViewTable[Any]) -> None:
    for name, statement in table.indexes.items():
        # One that is there is left alone: to make it again, even in vain, takes a lock from pages.
        if cursor.execute("SELECT to_regclass(%s)", (f'"{name}"',)).fetchone() == (None,):
            cursor.execute(statement.encode())
