"""The store on SQLite: one file, several processes, no server."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any
from uuid import UUID

from eventsourcing.persistence import (
    DataError,
    IntegrityError,
    PersistenceError,
    StoredEvent,
    Tracking,
)
from eventsourcing.sqlite import SQLiteCursor, SQLiteProcessRecorder

from leftfold.application.checkpoints import Reader
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
    RecordedCommand,
    Repeated,
    Save,
    Stale,
    StoredSnapshot,
    Verdict,
)
from leftfold.domain import LeftfoldError
from leftfold.domain.personal import Keys
from leftfold.infrastructure.errors import (
    SchemaMissingError,
    SchemaVersionError,
    StoreUnavailableError,
)
from leftfold.infrastructure.stores.common import (
    EACH_TOPIC,
    MAX_VERSION,
    SCHEMA_VERSION,
    Notifying,
    Run,
    as_uuid,
    commit_in_runs,
    dump_aggregates,
    encoded,
    failing,
    in_views,
    is_of_views,
    load_aggregates,
    refused,
)
from leftfold.infrastructure.stores.sqlite_file import (
    Joined,
    SQLiteFile,
    as_stored,
    chunks,
    insert_rows,
    marks,
)
from leftfold.infrastructure.stores.sqlite_views import SQLiteViews

ATTEMPTS_AT_WAL = 100  # others that open the same new file may come between
# VALUES as a table: an IN of pairs would read the whole index.
OUTDATED = (
    # Only what is: to fetch a row is to wait for the interpreter's lock.
    "WITH given (id, version) AS (VALUES {}) SELECT id, version FROM given "
    "WHERE version <> coalesce((SELECT max(originator_version) FROM stored_events "
    "WHERE originator_id = id AND originator_version >= version), 0)"
)
KNOWN_COMMANDS = "SELECT command_id FROM leftfold_commands WHERE command_id IN ({})"
ADDED = {
    "reads": "TEXT NOT NULL DEFAULT ''",
    "built": "INTEGER NOT NULL DEFAULT 1",
    "failure": "TEXT",
    "failed_in": "INTEGER",
}
"""Columns of checkpoints that older schemas lack."""
TOGETHER = 250  # of what a compound query may have 500
OF_TOPIC = (
    "SELECT * FROM (SELECT position FROM stored_events WHERE topic = ? AND position > ? "
    "ORDER BY position LIMIT ?)"
)

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
        failure TEXT,
        failed_in INTEGER,
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


class SQLiteEvents:
    """The log as it is read page by page."""

    def __init__(self, datastore: SQLiteFile | Joined) -> None:
        self.datastore = datastore

    def read(self, after: int, limit: int, topics: Sequence[str] = ()) -> list[LoggedEvent]:
        if len(topics) > TOGETHER:
            halves = topics[:TOGETHER], topics[TOGETHER:]
            return sorted(chain(*(self.read(after, limit, half) for half in halves)))[:limit]
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
                LoggedEvent(position, as_stored(aggregate_id), version, topic, state)
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
        return commit_in_runs(groups, self._commit, self.inline)

    def _commit(self, run: Run) -> list[Verdict]:
        """Write the groups of a run that are neither stale nor repeated, in one transaction."""
        try:
            with self.datastore.writing(sum(map(_size, run.groups))) as connection:
                return self.write(connection, run)
        except LeftfoldError as error:  # an inline view does not take it
            return [refused(error)] * len(run.groups)
        except Exception as error:
            if is_of_views(error):
                return failing(error, run)
            if isinstance(error, (DataError, IntegrityError)):  # it is just what is in a group
                return [Failed(type(error).__name__, is_refusal=True)] * len(run.groups)
            if not isinstance(error, PersistenceError):
                raise
            # SQLite is in this process: a commit that fails is rolled back.
            return [Failed(str(error))] * len(run.groups)

    def write(self, connection: sqlite3.Connection, run: Run) -> list[Verdict]:
        """Write what may be written in a transaction, and what inline views make of it."""
        verdicts = _judge(connection, run)
        good = [g for g, verdict in zip(run.groups, verdicts, strict=True) if not verdict]
        positions = iter(_insert_saves(connection, [s for g in good for s in g.saves]))
        if self.inline is not None and good:
            joined = Joined(connection)
            with in_views():
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
            for ids in chunks([command_id.bytes for command_id in command_ids]):
                cursor.execute(
                    "SELECT command_id, command, aggregates, position, answer "
                    f"FROM leftfold_commands WHERE command_id IN ({marks(len(ids))})",
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
    into = "stored_events (originator_id, originator_version, topic, state)"
    if len(rows) == 1:
        return connection.execute(f"INSERT INTO {into} VALUES (?,?,?,?)", rows[0]).lastrowid or 0
    insert_rows(connection, into, rows)
    # The database gives each row the position after the highest, and none is ever deleted.
    return connection.execute("SELECT last_insert_rowid()").fetchone()[0] if rows else 0


def _size(group: Group) -> int:
    return sum(len(save.events) for save in group.saves)


def _judge(connection: sqlite3.Connection, run: Run) -> list[Verdict | None]:
    """Return what speaks against each group, while nobody else can write."""
    bases = [(i.to_bytes(16), v) for versions in run.bases for i, v in versions.items()]
    stale: set[tuple[bytes, int]] = set()
    for chunk in chunks(bases):
        query = OUTDATED.format(",".join(["(?,?)"] * len(chunk)))
        found = connection.execute(query, list(chain.from_iterable(chunk))).fetchall()
        stale.update((aggregate_id, version) for aggregate_id, version in found)
    known: set[bytes] = set()
    for ids in chunks([save.command_id.bytes for group in run.groups for save in group.saves]):
        found = connection.execute(KNOWN_COMMANDS.format(marks(len(ids))), ids).fetchall()
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
    into = "leftfold_commands (command_id, command, position, aggregates, answer)"
    insert_rows(connection, into, commands)
    return positions


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
            self.views = SQLiteViews(self.name, file, keys, may_define=create_tables)
            self.log.views, self.log.inline, self.views.log = self.views, inline, self.log
            with file.writing() as connection:
                _set_up(connection, self.name, self.log, create_tables=create_tables)
                for reader in readers:
                    self.views.within(Joined(connection)).define(reader)
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


def _has_table(connection: sqlite3.Connection, table: str) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return connection.execute(query, (table,)).fetchone() is not None
