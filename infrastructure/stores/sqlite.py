"""The store on SQLite: one file, several processes, no server."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import astuple
from datetime import datetime
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from threading import Lock  # noqa: TID251 - no thread is started: callers are threads
from typing import Any, TypeVar
from uuid import UUID

from eventsourcing.persistence import (
    DataError,
    IntegrityError,
    OperationalError,
    PersistenceError,
    ProgrammingError,
    StoredEvent,
    Tracking,
)
from eventsourcing.sqlite import (
    SQLiteConnection,
    SQLiteCursor,
    SQLiteDatastore,
    SQLiteProcessRecorder,
)

from leftfold.application import Projection
from leftfold.application.checkpoints import Change, Checkpoint, Comparison, DeadLetter, Reader
from leftfold.application.ports import (
    NOTHING,
    REACTION,
    Committed,
    EncodedEvent,
    Failed,
    Group,
    Heard,
    Inline,
    LoggedEvent,
    Order,
    RecordedCommand,
    Repeated,
    Save,
    Seek,
    Stale,
    StoredSnapshot,
    Verdict,
)
from leftfold.domain import ALWAYS, LeftfoldError, Specification
from leftfold.domain.personal import Keys
from leftfold.infrastructure.errors import (
    SchemaMissingError,
    SchemaVersionError,
    StoreUnavailableError,
)
from leftfold.infrastructure.stores.common import (
    MAX_VERSION,
    SCHEMA_VERSION,
    Notifying,
    Run,
    Tables,
    as_uuid,
    commit_in_runs,
    dump_aggregates,
    encoded,
    load_aggregates,
    not_unique,
    runs,
)
from leftfold.infrastructure.stores.readers import ABSENT, check_unchanged
from leftfold.infrastructure.stores.verdicts import is_written, refused
from leftfold.infrastructure.tables import SQLITE, ViewTable

R = TypeVar("R")
T = TypeVar("T")

AT_ONCE = 512  # values or rows in one statement
IDLE_READERS = 8
ATTEMPTS_AT_WAL = 100  # others that open the same new file may come between
BULK = 500  # rows from which a transaction is large
CHECKPOINT, BULK_CHECKPOINT = 1_000, 8_000  # pages in the write-ahead log before it is moved
CACHE = 32_768  # KiB of pages the writer keeps: the index on aggregates is written at random
# VALUES as a table: an IN of pairs would read the whole index.
LAST_VERSIONS = (
    "WITH given (id, version) AS (VALUES {}) SELECT (SELECT max(originator_version) "
    "FROM stored_events WHERE originator_id = id AND originator_version >= version) FROM given"
)
KNOWN_COMMANDS = "SELECT command_id FROM leftfold_commands WHERE command_id IN ({})"
NOW = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"
ADDED = {"reads": "TEXT NOT NULL DEFAULT ''", "built": "INTEGER NOT NULL DEFAULT 1"}
"""Columns of checkpoints that schema 2 did not have."""
EACH_TOPIC = (
    "WITH RECURSIVE found (topic) AS (SELECT min(topic) FROM stored_events UNION ALL "
    "SELECT (SELECT min(topic) FROM stored_events WHERE topic > found.topic) FROM found "
    "WHERE topic IS NOT NULL) SELECT topic FROM found WHERE topic IS NOT NULL"
)
OF_TOPIC = (
    "SELECT * FROM (SELECT position FROM stored_events WHERE topic = ? AND position > ? "
    "ORDER BY position LIMIT ?)"
)
LIBRARY_ERRORS: dict[type[sqlite3.Error], type[PersistenceError]] = {
    sqlite3.DataError: DataError,
    sqlite3.IntegrityError: IntegrityError,
    sqlite3.OperationalError: OperationalError,
    sqlite3.ProgrammingError: ProgrammingError,
}

TABLES = (
    # The position is declared, since VACUUM may renumber an undeclared rowid.
    """CREATE TABLE IF NOT EXISTS stored_events (
        position INTEGER PRIMARY KEY,
        originator_id BLOB NOT NULL,
        originator_version INTEGER NOT NULL,
        topic TEXT NOT NULL,
        state BLOB NOT NULL,
        UNIQUE (originator_id, originator_version))""",
    """CREATE TABLE IF NOT EXISTS leftfold_commands (
        command_id BLOB PRIMARY KEY,
        command TEXT NOT NULL,
        recorded_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ')),
        position INTEGER NOT NULL,
        aggregates TEXT NOT NULL,
        answer BLOB) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS leftfold_snapshots (
        originator_id BLOB PRIMARY KEY,
        originator_version INTEGER NOT NULL,
        shape TEXT NOT NULL,
        state BLOB NOT NULL) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS leftfold_checkpoints (
        name TEXT NOT NULL,
        version INTEGER NOT NULL,
        position INTEGER NOT NULL,
        definition TEXT NOT NULL,
        owner TEXT,
        epoch INTEGER NOT NULL DEFAULT 0,
        lease TEXT,
        reads TEXT NOT NULL DEFAULT '',
        built INTEGER NOT NULL DEFAULT 1,
        PRIMARY KEY (name, version)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS leftfold_dead_letters (
        name TEXT NOT NULL,
        version INTEGER NOT NULL,
        position INTEGER NOT NULL,
        key TEXT NOT NULL,
        originator_id BLOB NOT NULL,
        originator_version INTEGER NOT NULL,
        topic TEXT NOT NULL,
        error TEXT NOT NULL,
        parked_at TEXT NOT NULL,
        PRIMARY KEY (name, version, position, key)) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS stored_events_topic ON stored_events (topic, position)",
    "CREATE TABLE IF NOT EXISTS leftfold_schema (version INTEGER NOT NULL)",
)


class SQLiteFile(SQLiteDatastore):
    """The connections to one file: one that writes, and as many as are needed that read.

    Where one connection writes, its cache of pages stays valid between its transactions.
    """

    def __init__(self, path: str, lock_timeout: int) -> None:
        """Open connections on demand; wait up to `lock_timeout` seconds for the write lock."""
        self._path = path
        self._lock_timeout = lock_timeout
        self._writers_turn = Lock()
        self._writer: SQLiteConnection | None = None
        self._tuned: dict[str, int | str] = {}
        self._readers: list[SQLiteConnection] = []
        self._is_closed = False
        super().__init__(path, lock_timeout=lock_timeout)

    @contextlib.contextmanager
    def writing(self, rows: int = 0, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Commit what the block writes, about so many rows, or nothing.

        The transaction holds the write lock from its beginning: a deferred BEGIN that reads and
        then writes fails at once where another process wrote in between, in spite of the busy
        timeout. One that is not `durable` may be gone, as a whole, after a loss of power.
        """
        with _library_errors(), self._lend_writer(rows, durable=durable) as lent:
            connection = lent._sqlite_conn
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.commit()
            except BaseException:
                connection.rollback()
                raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Cursor]:
        """Lend a cursor whose rows are plain tuples."""
        with _library_errors(), self._lend_reader() as lent:
            cursor = lent._sqlite_conn.cursor()
            cursor.row_factory = None
            try:
                yield cursor
            finally:
                cursor.close()

    @contextlib.contextmanager
    def get_connection(self, *, commit: bool) -> Iterator[SQLiteConnection]:
        """Lend a connection to the library's own recorders."""
        with self._lend_writer() if commit else self._lend_reader() as connection:
            yield connection

    @contextlib.contextmanager
    def _lend_writer(self, rows: int = 0, *, durable: bool = True) -> Iterator[SQLiteConnection]:
        if not self._writers_turn.acquire(timeout=self._lock_timeout):
            msg = "database is locked by this process"
            raise OperationalError(msg)
        try:
            if self._writer is None:
                self._writer = self._connect()
                self._tune(self._writer, "cache_size", -CACHE)
            self._tune(self._writer, "synchronous", "FULL" if durable else "NORMAL")
            # Large transactions write the same pages again and again: move them once for many.
            # Small ones are better served by a short log, which stops growing sooner.
            checkpoint = CHECKPOINT if rows < BULK else BULK_CHECKPOINT
            self._tune(self._writer, "wal_autocheckpoint", checkpoint)
            yield self._writer
        finally:
            self._writers_turn.release()

    def _tune(self, writer: SQLiteConnection, pragma: str, value: int | str) -> None:
        if self._tuned.get(pragma) != value:
            writer._sqlite_conn.execute(f"PRAGMA {pragma} = {value}")
            self._tuned[pragma] = value

    @contextlib.contextmanager
    def _lend_reader(self) -> Iterator[SQLiteConnection]:
        try:
            reader = self._readers.pop()  # the last returned: its cache is the newest
        except IndexError:
            reader = self._connect()
        try:
            yield reader
        finally:
            if self._is_closed or len(self._readers) >= IDLE_READERS:
                reader.close()
            else:
                self._readers.append(reader)

    def _connect(self) -> SQLiteConnection:
        if self._is_closed:
            msg = "the file is closed"
            raise OperationalError(msg)
        # As the library's pool does it, but for the statements: that keeps one, and compiles anew.
        connection = sqlite3.connect(
            self._path, timeout=self._lock_timeout, isolation_level=None, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        return SQLiteConnection(connection, max_age=None)

    def close(self) -> None:
        """Close all connections, those in use as soon as they are returned."""
        self._is_closed = True
        super().close()
        while self._readers:
            self._readers.pop().close()
        with self._writers_turn:
            if self._writer is not None:
                self._writer.close()
                self._writer = None


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    """Raise the driver's errors as the library's."""
    try:
        yield
    except sqlite3.Error as error:
        raise LIBRARY_ERRORS.get(type(error), PersistenceError)(str(error)) from error


class _Joined:
    """A transaction under way, for those who else begin one."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Cursor]:
        with contextlib.closing(self._connection.cursor()) as cursor:
            cursor.row_factory = None
            yield cursor

    @contextlib.contextmanager
    def writing(self, rows: int = 0, *, durable: bool = True) -> Iterator[sqlite3.Connection]:  # noqa: ARG002 - the transaction is as it is
        yield self._connection


class SQLiteEvents:
    """The log as it is read page by page."""

    def __init__(self, datastore: SQLiteFile | _Joined) -> None:
        self.datastore = datastore

    def read(self, after: int, limit: int, topics: Sequence[str] = ()) -> list[LoggedEvent]:
        given: tuple[object, ...] = (after, limit)
        wanted = "position > ?"
        if topics:
            given = (*chain(*((topic, after, limit) for topic in topics)), limit, limit)
            each = " UNION ALL ".join([OF_TOPIC] * len(topics))
            wanted = f"position IN ({each} ORDER BY position LIMIT ?)"
        with self.datastore.reading() as cursor:
            cursor.execute(
                "SELECT position, originator_id, originator_version, topic, state "
                f"FROM stored_events WHERE {wanted} ORDER BY position LIMIT ?",
                given,
            )
            return [
                LoggedEvent(position, _uuid(aggregate_id), version, topic, state)
                for position, aggregate_id, version, topic, state in cursor
            ]

    def topics(self) -> frozenset[str]:
        with self.datastore.reading() as cursor:
            return frozenset(topic for (topic,) in cursor.execute(EACH_TOPIC))

    def head(self) -> int:
        with self.datastore.reading() as cursor:
            cursor.execute("SELECT max(position) FROM stored_events")
            (position,) = cursor.fetchone()
            return position or 0


class SQLiteLog(SQLiteEvents, Notifying, SQLiteProcessRecorder):
    """The log and the recorder of the library, on one table of events."""

    is_local = False
    datastore: SQLiteFile
    views: SQLiteViews
    inline: Inline | None = None

    def __init__(self, datastore: SQLiteFile) -> None:
        SQLiteProcessRecorder.__init__(self, datastore)

    def construct_create_table_statements(self) -> list[str]:
        return [*TABLES, *super().construct_create_table_statements()[1:]]

    # The application's port

    def commit(self, groups: Sequence[Group]) -> list[Verdict]:
        return commit_in_runs(groups, self._commit)

    def _commit(self, run: Run) -> list[Verdict]:
        """Write the groups of a run that are neither stale nor repeated, in one transaction."""
        try:
            with self.datastore.writing(sum(map(_size, run.groups))) as connection:
                return self.write(connection, run)
        except LeftfoldError as error:  # an inline view does not take it
            return [refused(error)] * len(run.groups)
        except (DataError, IntegrityError) as error:  # something refuses just what is in a group
            return [Failed(type(error).__name__, is_refusal=True)] * len(run.groups)
        except PersistenceError as error:
            # SQLite is in this process: a commit that fails is rolled back.
            return [Failed(str(error))] * len(run.groups)

    def write(self, connection: sqlite3.Connection, run: Run) -> list[Verdict]:
        """Write what may be written in a transaction, and what inline views make of it."""
        verdicts = _judge(connection, run)
        good = [g for g, verdict in zip(run.groups, verdicts, strict=True) if not verdict]
        positions = iter(_insert_saves(connection, [s for g in good for s in g.saves]))
        if self.inline is not None and good:
            joined = _Joined(connection)
            self.inline(SQLiteEvents(joined), self.views.within(joined))
        return [
            verdict or Committed(tuple(islice(positions, len(group.saves))))
            for group, verdict in zip(run.groups, verdicts, strict=True)
        ]

    def streams(
        self, aggregate_ids: Sequence[UUID], after: Mapping[UUID, int] = NOTHING
    ) -> dict[UUID, list[EncodedEvent]]:
        found: dict[UUID, list[EncodedEvent]] = {}
        with self.datastore.reading() as cursor:
            for aggregate_id in aggregate_ids:
                cursor.execute(
                    "SELECT originator_version, topic, state FROM stored_events "
                    "WHERE originator_id = ? AND originator_version > ? "
                    "ORDER BY originator_version",
                    (aggregate_id.bytes, after.get(aggregate_id, 0)),
                )
                found[aggregate_id] = [EncodedEvent(aggregate_id, *values) for values in cursor]
        return found

    def versions(self, aggregate_ids: Sequence[UUID]) -> dict[UUID, int]:
        found: dict[UUID, int] = {}
        with self.datastore.reading() as cursor:
            for aggregate_id in aggregate_ids:
                cursor.execute(
                    "SELECT max(originator_version) FROM stored_events WHERE originator_id = ?",
                    (aggregate_id.bytes,),
                )
                (version,) = cursor.fetchone()
                if version is not None:
                    found[aggregate_id] = version
        return found

    def commands(self, command_ids: Sequence[UUID]) -> dict[UUID, RecordedCommand]:
        found: dict[UUID, RecordedCommand] = {}
        with self.datastore.reading() as cursor:
            for ids in _chunks([command_id.bytes for command_id in command_ids]):
                cursor.execute(
                    "SELECT command_id, command, aggregates, position, answer "
                    f"FROM leftfold_commands WHERE command_id IN ({_marks(len(ids))})",
                    ids,
                )
                for command_id, command, aggregates, position, answer in cursor:
                    key = UUID(bytes=command_id)
                    found[key] = RecordedCommand(
                        key, command, load_aggregates(aggregates), position, answer
                    )
        return found

    def snapshots(self, aggregate_ids: Sequence[UUID]) -> list[StoredSnapshot]:
        found: list[StoredSnapshot] = []
        with self.datastore.reading() as cursor:
            for aggregate_id in aggregate_ids:
                cursor.execute(
                    "SELECT originator_version, shape, state FROM leftfold_snapshots "
                    "WHERE originator_id = ?",
                    (aggregate_id.bytes,),
                )
                found += [StoredSnapshot(aggregate_id, *values) for values in cursor]
        return found

    def keep_snapshots(self, snapshots: Sequence[StoredSnapshot]) -> None:
        rows = [(s.aggregate_id.bytes, s.version, s.shape, s.state) for s in snapshots]
        with self.datastore.writing(durable=False) as connection:
            connection.executemany(
                "INSERT INTO leftfold_snapshots VALUES (?, ?, ?, ?) "
                "ON CONFLICT (originator_id) DO UPDATE SET shape = excluded.shape, "
                "originator_version = excluded.originator_version, state = excluded.state "
                "WHERE shape <> excluded.shape OR originator_version < excluded.originator_version",
                rows,
            )

    def purge(self, older_than: float, limit: int) -> int:
        with self.datastore.reading() as cursor:  # all are looked at, before the lock is taken
            cursor.execute(
                "SELECT command_id FROM leftfold_commands "
                "WHERE recorded_at < strftime('%Y-%m-%dT%H:%M:%fZ', 'now', ?) "
                f"AND command NOT LIKE '{REACTION}%' LIMIT ?",
                (f"-{older_than:.3f} seconds", limit),
            )
            old = cursor.fetchall()
        if old:
            with self.datastore.writing(durable=False) as connection:
                connection.executemany("DELETE FROM leftfold_commands WHERE command_id = ?", old)
        return len(old)

    # The library's recorder

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> list[int]:
        with self.datastore.writing(len(stored_events)) as connection:
            last = _insert_events(connection, encoded(stored_events))
            tracking: Tracking | None = kwargs.get("tracking")
            if tracking is not None:
                self._insert_tracking(SQLiteCursor(connection.cursor()), tracking)
        return list(range(last - len(stored_events) + 1, last + 1))

    def select_events(
        self,
        originator_id: UUID | str,
        *,
        gt: int | None = None,
        lte: int | None = None,
        desc: bool = False,
        limit: int | None = None,
    ) -> list[StoredEvent]:
        direction = "DESC" if desc else "ASC"
        aggregate_id = as_uuid(originator_id)
        with self.datastore.reading() as cursor:
            cursor.execute(
                "SELECT originator_version, topic, state FROM stored_events "
                "WHERE originator_id = ? AND originator_version > ? AND originator_version <= ? "
                f"ORDER BY originator_version {direction} LIMIT ?",
                (
                    aggregate_id.bytes,
                    gt or 0,
                    MAX_VERSION if lte is None else lte,
                    -1 if limit is None else limit,
                ),
            )
            return [StoredEvent(originator_id, *values) for values in cursor]


def _insert_events(connection: sqlite3.Connection, events: Sequence[EncodedEvent]) -> int:
    """Insert events at the positions that follow; return the last one's (0 without events)."""
    rows = [
        (aggregate_id.bytes, version, topic, state)
        for aggregate_id, version, topic, state in events
    ]
    insert = "INSERT INTO stored_events (originator_id, originator_version, topic, state) VALUES "
    if len(rows) == 1:
        return connection.execute(insert + "(?,?,?,?)", rows[0]).lastrowid or 0
    _insert_rows(connection, insert, "", rows)
    # The database gives each row the position after the highest, and none is ever deleted.
    return connection.execute("SELECT last_insert_rowid()").fetchone()[0] if rows else 0


def _insert_rows(
    connection: sqlite3.Connection, insert: str, conflict: str, rows: Sequence[Sequence[object]]
) -> None:
    """Insert rows, many in one statement.

    The driver gives up the interpreter's lock at every step of a statement. One row a step
    makes it wait for the lock after each, while other threads compute.
    """
    for chunk in _chunks(rows):
        statement = _insert_statement(insert, len(rows[0]), len(chunk), conflict)
        connection.execute(statement, list(chain.from_iterable(chunk)))


@lru_cache
def _insert_statement(insert: str, columns: int, rows: int, conflict: str) -> str:
    return insert + ",".join([f"({_marks(columns)})"] * rows) + conflict


def _marks(number: int) -> str:
    return ",".join("?" * number)


def _size(group: Group) -> int:
    return sum(len(save.events) for save in group.saves)


def _judge(connection: sqlite3.Connection, run: Run) -> list[Verdict | None]:
    """Return what speaks against each group, while nobody else can write."""
    bases = [(i.to_bytes(16), v) for versions in run.bases for i, v in versions.items()]
    stale: set[tuple[bytes, int]] = set()
    for chunk in _chunks(bases):
        query = LAST_VERSIONS.format(",".join(["(?,?)"] * len(chunk)))
        found = connection.execute(query, list(chain.from_iterable(chunk))).fetchall()
        stale.update(b for b, (last,) in zip(chunk, found, strict=True) if b[1] != (last or 0))
    known: set[bytes] = set()
    for ids in _chunks([save.command_id.bytes for group in run.groups for save in group.saves]):
        found = connection.execute(KNOWN_COMMANDS.format(_marks(len(ids))), ids).fetchall()
        known.update(command_id for (command_id,) in found)
    if not stale and not known:
        return [None] * len(run.groups)
    verdicts: list[Verdict | None] = []
    for group, versions in zip(run.groups, run.bases, strict=True):
        is_stale = any((i.to_bytes(16), v) in stale for i, v in versions.items())
        is_repeated = any(save.command_id.bytes in known for save in group.saves)
        verdicts.append(Stale() if is_stale else Repeated() if is_repeated else None)
    return verdicts


def _insert_saves(connection: sqlite3.Connection, saves: Sequence[Save]) -> list[int]:
    """Insert the events and the ids of commands; return the position of each one's last event."""
    events = [event for save in saves for event in save.events]
    position = _insert_events(connection, events) - len(events)
    commands: list[tuple[object, ...]] = []
    positions: list[int] = []
    for save in saves:
        position += len(save.events)
        positions.append(position if save.events else 0)
        aggregates = dump_aggregates(save.aggregates)
        commands.append(
            (save.command_id.bytes, save.command, positions[-1], aggregates, save.answer)
        )
    insert = "INSERT INTO leftfold_commands (command_id, command, position, aggregates, answer) "
    _insert_rows(connection, insert + "VALUES ", "", commands)
    return positions


@lru_cache(maxsize=65_536)
def _uuid(stored: bytes) -> UUID:
    return UUID(bytes=stored)


def _chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Part values by halves: 512, 256, …, 1, so that statements are few.

    A connection remembers the statements that it has compiled.
    """
    begin, at_once = 0, AT_ONCE
    while begin < len(values):
        while at_once > len(values) - begin:
            at_once //= 2
        yield values[begin : begin + at_once]
        begin += at_once


class SQLiteViews(Tables):
    """Views and their checkpoints as tables beside the events."""

    dialect = SQLITE

    def __init__(
        self, name: str, file: SQLiteFile, log: SQLiteLog, keys: Keys | None, *, may_define: bool
    ) -> None:
        super().__init__(keys, may_define=may_define)
        self._name = name
        self._file: SQLiteFile | _Joined = file
        self._log = log

    def within(self, joined: _Joined) -> SQLiteViews:
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
            _set_up_reader(connection, self._name, reader, table, create_tables=self._may_define)

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
                DeadLetter(at, key, _uuid(i), v, topic, error, datetime.fromisoformat(parked_at))
                for at, key, i, v, topic, error, parked_at in cursor
            ]

    def load(self, projection: Projection[R], keys: Sequence[str]) -> dict[str, R]:
        table = self.table(projection)
        found: dict[str, R] = {}
        with self._file.reading() as cursor:
            for chunk in _chunks(list(keys)):
                marks = _marks(len(chunk))
                cursor.execute(f"{table.select_by_key} IN ({marks})", chunk)
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
            _insert_rows(connection, table.insert, table.on_conflict, rows)
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


class SQLiteStore:
    """A file with events, views and checkpoints."""

    hints = False

    def __init__(self, path: str, lock_timeout: int) -> None:
        """Use this file; wait up to `lock_timeout` seconds for its write lock."""
        self.name = f"sqlite:///{path}"
        # Once for all connections: the program may change its directory.
        self._path = Path(path).absolute()
        self._lock_timeout = lock_timeout
        self._watched: sqlite3.Connection | None = None
        self._seen = 0
        self._file: SQLiteFile | None = None

    def open(
        self,
        readers: Sequence[Reader],
        *,
        create_tables: bool,
        keys: Keys | None = None,
        inline: Inline | None = None,
    ) -> None:
        """Open the file and see to its tables.

        Raises `StoreUnavailableError`, `SchemaMissingError`, `SchemaVersionError`,
        `ViewChangedError`.
        """
        if not create_tables and not self._path.exists():
            raise SchemaMissingError(self.name, "stored_events")
        try:
            self._prepare_file()
            file = SQLiteFile(str(self._path), self._lock_timeout)
            self._file = file
            self.log = SQLiteLog(file)
            self.views = SQLiteViews(self.name, file, self.log, keys, may_define=create_tables)
            self.log.views, self.log.inline = self.views, inline
            with file.writing() as connection:
                _set_up(connection, self.name, self.log, create_tables=create_tables)
                for reader in readers:
                    table = self.views.table(reader) if isinstance(reader, Projection) else None
                    _set_up_reader(
                        connection, self.name, reader, table, create_tables=create_tables
                    )
        except (sqlite3.Error, PersistenceError, OSError) as error:
            self.close()
            raise StoreUnavailableError(self.name, str(error)) from error
        except BaseException:
            self.close()
            raise

    def _prepare_file(self) -> None:
        """Set the journal's mode, which no other connection may be in the way of."""
        connection = sqlite3.connect(self._path, timeout=self._lock_timeout, isolation_level=None)
        with contextlib.closing(connection):
            for attempts_left in reversed(range(ATTEMPTS_AT_WAL)):
                (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
                if mode.lower() == "wal":
                    return
                try:
                    # The pragma does not wait for the lock; a transaction before it does.
                    connection.execute("BEGIN EXCLUSIVE")
                    connection.execute("COMMIT")
                    connection.execute("PRAGMA journal_mode = WAL")
                except sqlite3.OperationalError:
                    if not attempts_left:
                        raise

    def listen(self) -> None:
        """SQLite sends no hints; `has_changed` is asked instead."""

    def heard(self) -> Heard:
        return Heard.NOTHING

    def committing(self) -> None:
        """Commit by `log.commit` only."""

    def cut(self, seconds: float) -> None:
        """Cut nothing: the file is here, and waits for its lock have their own end."""

    def has_changed(self) -> bool:
        """Tell whether another connection has written since the last look."""
        if self._watched is None:
            self._watched = sqlite3.connect(self._path, check_same_thread=False)
        (version,) = self._watched.execute("PRAGMA data_version").fetchone()
        changed: bool = version != self._seen
        self._seen = version
        return changed

    def close(self) -> None:
        """Close all connections."""
        if self._watched is not None:
            self._watched.close()
            self._watched = None
        if self._file is not None:
            self._file.close()
            self._file = None


def _set_up(
    connection: sqlite3.Connection, name: str, log: SQLiteLog, *, create_tables: bool
) -> None:
    if _has_table(connection, "stored_events") and not _has_table(connection, "leftfold_schema"):
        raise StoreUnavailableError(name, "its table stored_events was not made by leftfold")
    if create_tables:
        for statement in log.create_table_statements:
            connection.execute(statement)
        if not connection.execute("SELECT 1 FROM leftfold_schema").fetchone():
            connection.execute("INSERT INTO leftfold_schema VALUES (?)", (SCHEMA_VERSION,))
    elif not _has_table(connection, "leftfold_schema"):
        raise SchemaMissingError(name, "leftfold_schema")
    (found,) = connection.execute("SELECT version FROM leftfold_schema").fetchone()
    if create_tables and found < SCHEMA_VERSION:  # each version has only added to the one before
        columns = connection.execute("PRAGMA table_info (leftfold_checkpoints)").fetchall()
        for column in ADDED.keys() - {there[1] for there in columns}:
            connection.execute(
                f"ALTER TABLE leftfold_checkpoints ADD COLUMN {column} {ADDED[column]}"
            )
        connection.execute("UPDATE leftfold_schema SET version = ?", (SCHEMA_VERSION,))
    elif found != SCHEMA_VERSION:
        raise SchemaVersionError(name, found, SCHEMA_VERSION)


def _set_up_reader(
    connection: sqlite3.Connection,
    name: str,
    reader: Reader,
    table: ViewTable[Any] | None,
    *,
    create_tables: bool,
) -> None:
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
        f"INSERT OR REPLACE INTO leftfold_dead_letters VALUES ({_marks(9)})",
        [
            (*who, at, key, i.bytes, version, topic, error, parked_at.isoformat())
            for at, key, i, version, topic, error, parked_at in map(astuple, change.parked)
        ],
    )


class _Moved(Exception):
    """A checkpoint is not as a page found it, or events were written first by others."""


def _has_table(connection: sqlite3.Connection, table: str) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return connection.execute(query, (table,)).fetchone() is not None
