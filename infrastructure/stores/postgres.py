"""The store on PostgreSQL."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import astuple
from threading import Lock  # noqa: TID251 - no thread is started: callers are threads
from typing import Any, TypeVar
from uuid import UUID

import psycopg
from eventsourcing.persistence import (
    DataError,
    PersistenceError,
    StoredEvent,
    Tracking,
)
from eventsourcing.postgres import (
    PostgresDatastore,
    PostgresProcessRecorder,
)
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, TupleRow, dict_row, tuple_row

from leftfold.application import Projection
from leftfold.application.checkpoints import Change, Checkpoint, Comparison, DeadLetter, Reader
from leftfold.application.ports import (
    NOTHING,
    REACTION,
    Commit,
    Committed,
    EncodedEvent,
    Failed,
    Group,
    Heard,
    Inline,
    LoggedEvent,
    Order,
    RecordedCommand,
    Seek,
    StoredSnapshot,
    Verdict,
)
from leftfold.domain import ALWAYS, LeftfoldError, Specification
from leftfold.domain.personal import Keys
from leftfold.infrastructure.errors import (
    InvalidSettingsError,
    SchemaMissingError,
    SchemaVersionError,
    StoreUnavailableError,
)
from leftfold.infrastructure.platform import monotonic, shut_down
from leftfold.infrastructure.settings import masked
from leftfold.infrastructure.stores.common import (
    MAX_VERSION,
    SCHEMA_VERSION,
    Notifying,
    Run,
    Tables,
    commit_in_runs,
    encoded,
    load_aggregates,
    not_unique,
    runs,
)
from leftfold.infrastructure.stores.postgres_arrays import take_packed
from leftfold.infrastructure.stores.postgres_commits import (
    AsyncConnection,
    LoopCommits,
    arrays,
    columns,
    failed,
    judged,
    without_values,
)
from leftfold.infrastructure.stores.postgres_schema import (
    CALL_INSERT,
    COMMIT_PARAMETERS,
    LOCK,
    STATEMENTS,
)
from leftfold.infrastructure.stores.readers import ABSENT, check_unchanged
from leftfold.infrastructure.stores.verdicts import is_written, refused
from leftfold.infrastructure.tables import POSTGRES, Encoded, ViewTable

R = TypeVar("R")

_log = logging.getLogger("leftfold.stores")
Cursor = psycopg.Cursor[TupleRow]

CHANNEL, VIEWS_CHANNEL = "stored_events", "leftfold_views"
PROLONGED = 3.0
"""Seconds for which a page prolongs its owner's lease."""
DDL_LOCK = 0x1EF7F01D  # one number for all processes: whoever holds it changes tables
PROGRAM_LIMIT = "54"
"""The class of errors (SQLSTATE) of what is more than the database takes."""
CONNECT_TIMEOUT = 1.0
"""Seconds to wait for a connection; one that takes longer is there for the next attempt."""
KEEPALIVE = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
"""Seconds, and probes: a peer that is gone is noticed, also where nothing is under way."""
READ = (
    "SELECT notification_id, originator_id, originator_version, topic, state FROM stored_events "
    "WHERE notification_id > %s ORDER BY notification_id LIMIT %s"
)
# Of one topic, in the order of the index on topics: where it said `topic = wanted`, the planner
# would walk the log instead, and OFFSET 0 keeps it from reading all of the log for the rest.
READ_TOPICS = (
    "SELECT notification_id, originator_id, originator_version, topic, state FROM ("
    "SELECT at FROM unnest(%s::text[]) AS given (wanted), LATERAL ("
    "SELECT notification_id AS at FROM stored_events "
    "WHERE (topic, notification_id) > (wanted, %s::bigint) AND topic <= wanted "
    "ORDER BY topic, notification_id LIMIT %s) AS found ORDER BY at LIMIT %s) AS found, "
    "LATERAL (SELECT * FROM stored_events WHERE notification_id = at OFFSET 0) AS event "
    "ORDER BY notification_id"
)
EACH_TOPIC = (
    "WITH RECURSIVE found (topic) AS (SELECT min(topic) FROM stored_events UNION ALL "
    "SELECT (SELECT min(topic) FROM stored_events WHERE topic > found.topic) FROM found "
    "WHERE topic IS NOT NULL) SELECT topic FROM found WHERE topic IS NOT NULL"
)
CHECKPOINTS = (
    "SELECT name, version, position, epoch, coalesce(owner, ''), "
    "coalesce(lease > clock_timestamp(), false), built, (SELECT count(*) "
    "FROM leftfold_dead_letters AS d WHERE d.name = c.name AND d.version = c.version) "
    "FROM leftfold_checkpoints AS c "
    "WHERE (name, version) IN (SELECT * FROM unnest(%s::text[], %s::int[]))"
)
CALL_COMMIT = f"SELECT * FROM leftfold_commit({', '.join(f'%b::{k}' for k in COMMIT_PARAMETERS)})"


class PostgresDatabase(PostgresDatastore):
    """The library's connections to one database."""

    def __init__(self, parts: Mapping[str, Any], lock_timeout: int) -> None:
        """Connect on demand, with all parts of a URL; the library knows five of them."""
        super().__init__(
            *("", "", "", "", ""),
            pool_size=1,
            max_overflow=7,
            lock_timeout=lock_timeout,
            connect_timeout=CONNECT_TIMEOUT,
        )
        self.pool.kwargs = {**KEEPALIVE, **parts, "row_factory": dict_row}
        # Whoever asks next connects. The pool itself would try ever more seldom, and be away for
        # as long again as the server was.
        self.pool.reconnect_timeout = 0.0
        self._lent: dict[psycopg.Connection[Any] | AsyncConnection, float] = {}

    def after_connect_func(self) -> Callable[[psycopg.Connection[Any]], None]:
        prepare, session = super().after_connect_func(), _session(self.lock_timeout)

        def after_connect(connection: psycopg.Connection[Any]) -> None:
            with self.lent(connection):
                prepare(connection)
                connection.execute(session)
            take_packed(connection)

        return after_connect

    @contextlib.contextmanager
    def get_connection(self) -> Iterator[psycopg.Connection[DictRow]]:
        """Lend a connection; what is wrong with it is said without values of rows."""
        try:
            with super().get_connection() as connection, self.lent(connection):
                yield connection
        except PersistenceError as error:
            cause = error.__cause__
            if isinstance(cause, psycopg.Error):
                # A value that is too large for an index is no trouble of the store's.
                is_too_large = (cause.sqlstate or "").startswith(PROGRAM_LIMIT)
                kind = DataError if is_too_large else type(error)
                raise kind(without_values(cause)) from cause
            raise

    @contextlib.contextmanager
    def lent(self, connection: psycopg.Connection[Any] | AsyncConnection) -> Iterator[None]:
        """Note since when a connection is used: one that hangs is cut."""
        self._lent[connection] = monotonic()
        try:
            yield
        finally:
            del self._lent[connection]

    def cut(self, seconds: float) -> None:
        """End the connections whose server has not answered for so long.

        A server that is stopped, or a network that swallows, says nothing; whoever waits for
        it gets an error at once when the socket is shut down, which any thread may do.
        """
        latest = monotonic() - seconds
        for connection, since in list(self._lent.items()):
            if since < latest:
                with contextlib.suppress(psycopg.Error, OSError):
                    shut_down(connection.fileno())

    @contextlib.contextmanager
    def reading(self, *, binary: bool = False) -> Iterator[Cursor]:
        """Lend a cursor whose rows are plain tuples."""
        with (
            self.get_connection() as connection,
            connection.cursor(row_factory=tuple_row, binary=binary) as cursor,
        ):
            yield cursor

    @contextlib.contextmanager
    def writing(self) -> Iterator[Cursor]:
        """Commit what the block writes, or nothing."""
        with (
            self.get_connection() as connection,
            connection.transaction(),
            connection.cursor(row_factory=tuple_row) as cursor,
        ):
            yield cursor


def _session(lock_timeout: int) -> bytes:
    """What every connection begins with.

    In other zones the first and last days of the calendar cannot be read.
    """
    return (
        f"SET TIME ZONE 'UTC'; SET lock_timeout = '{lock_timeout}s'; "
        # What the commit looks at under its lock must be what is there by then.
        "SET default_transaction_isolation = 'read committed'"
    ).encode()


class _Joined:
    """A transaction under way, for those who else begin one."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    @contextlib.contextmanager
    def reading(self, *, binary: bool = False) -> Iterator[Cursor]:
        with self._connection.cursor(row_factory=tuple_row, binary=binary) as cursor:
            yield cursor

    writing = reading


class PostgresEvents:
    """The log as it is read page by page."""

    def __init__(self, datastore: PostgresDatabase | _Joined) -> None:
        self.datastore = datastore

    def read(self, after: int, limit: int, topics: Sequence[str] = ()) -> list[LoggedEvent]:
        of_topics = (list(topics), after, limit, limit)
        with self.datastore.reading(binary=True) as cursor:
            if topics:
                cursor.execute(READ_TOPICS, of_topics, prepare=True)
            else:
                cursor.execute(READ, (after, limit), prepare=True)
            return [LoggedEvent(*values) for values in cursor]

    def topics(self) -> frozenset[str]:
        with self.datastore.reading() as cursor:
            return frozenset(topic for (topic,) in cursor.execute(EACH_TOPIC))

    def head(self) -> int:
        with self.datastore.reading() as cursor:
            cursor.execute("SELECT max(notification_id) FROM stored_events")
            row = cursor.fetchone()
            return (row[0] if row else 0) or 0


class PostgresLog(PostgresEvents, Notifying, PostgresProcessRecorder):
    """The log and the recorder of the library, on one table of events."""

    is_local = False
    datastore: PostgresDatabase
    views: PostgresViews
    inline: Inline | None = None

    def __init__(self, datastore: PostgresDatabase) -> None:
        PostgresProcessRecorder.__init__(self, datastore, events_table_name="stored_events")

    # The application's port

    def commit(self, groups: Sequence[Group]) -> list[Verdict]:
        return commit_in_runs(groups, self._commit)

    def _commit(self, run: Run) -> list[Verdict]:
        is_sent = False
        try:
            with self.datastore.get_connection() as connection:
                is_sent = True
                if self.inline is None:
                    # One statement outside of a transaction: its end is the commit.
                    return self.write(connection, run)
                with connection.transaction():
                    return self.write(connection, run)
        except LeftfoldError as error:  # an inline view does not take it
            return [refused(error)] * len(run.groups)
        except PersistenceError as error:
            if not isinstance(error.__cause__, psycopg.Error):
                return [Failed(str(error), in_doubt=is_sent)] * len(run.groups)
            return [failed(error.__cause__, is_sent=is_sent)] * len(run.groups)

    def write(self, connection: psycopg.Connection[Any], run: Run) -> list[Verdict]:
        """Write what may be written, and what inline views make of it."""
        with connection.cursor(row_factory=tuple_row, binary=True) as cursor:
            given = (*arrays(run), len(run.groups))
            cursor.execute(CALL_COMMIT.encode(), given, prepare=True)
            verdicts = judged(run, *(cursor.fetchone() or ((), ())))
        if self.inline is not None and any(isinstance(v, Committed) for v in verdicts):
            joined = _Joined(connection)
            self.inline(PostgresEvents(joined), self.views.within(joined))
        return verdicts

    def streams(
        self, aggregate_ids: Sequence[UUID], after: Mapping[UUID, int] = NOTHING
    ) -> dict[UUID, list[EncodedEvent]]:
        found: dict[UUID, list[EncodedEvent]] = {i: [] for i in aggregate_ids}
        with self.datastore.reading(binary=True) as cursor:
            cursor.execute(
                "SELECT originator_id, originator_version, topic, state "
                "FROM unnest(%s::uuid[], %s::bigint[]) AS wanted (id, version), "
                # OFFSET 0 keeps the planner from reading the whole table.
                "LATERAL (SELECT * FROM stored_events WHERE originator_id = id "
                "AND originator_version > version ORDER BY originator_version OFFSET 0) AS stream",
                (list(aggregate_ids), [after.get(i, 0) for i in aggregate_ids]),
                prepare=True,
            )
            for values in cursor:
                event = EncodedEvent(*values)
                found[event.aggregate_id].append(event)
        return found

    def versions(self, aggregate_ids: Sequence[UUID]) -> dict[UUID, int]:
        with self.datastore.reading(binary=True) as cursor:
            cursor.execute(
                "SELECT originator_id, max(originator_version) FROM stored_events "
                "WHERE originator_id = ANY(%s) GROUP BY originator_id",
                (list(aggregate_ids),),
                prepare=True,
            )
            return dict(cursor.fetchall())

    def commands(self, command_ids: Sequence[UUID]) -> dict[UUID, RecordedCommand]:
        with self.datastore.reading(binary=True) as cursor:
            cursor.execute(
                "SELECT command_id, command, aggregates, position, answer FROM leftfold_commands "
                "WHERE command_id = ANY(%s)",
                (list(command_ids),),
                prepare=True,
            )
            return {
                command_id: RecordedCommand(
                    command_id, command, load_aggregates(aggregates), position, answer
                )
                for command_id, command, aggregates, position, answer in cursor
            }

    def snapshots(self, aggregate_ids: Sequence[UUID]) -> list[StoredSnapshot]:
        with self.datastore.reading(binary=True) as cursor:
            cursor.execute(
                "SELECT originator_id, originator_version, shape, state FROM leftfold_snapshots "
                "WHERE originator_id = ANY(%s)",
                (list(aggregate_ids),),
                prepare=True,
            )
            return [StoredSnapshot(*values) for values in cursor]

    def keep_snapshots(self, snapshots: Sequence[StoredSnapshot]) -> None:
        with self.datastore.writing() as cursor:
            cursor.execute("SET LOCAL synchronous_commit = off")
            cursor.executemany(
                "INSERT INTO leftfold_snapshots AS kept VALUES (%s, %s, %s, %s) "
                "ON CONFLICT (originator_id) DO UPDATE SET shape = excluded.shape, "
                "originator_version = excluded.originator_version, state = excluded.state "
                "WHERE kept.shape <> excluded.shape "
                "OR kept.originator_version < excluded.originator_version",
                sorted(snapshots),  # in one order, so that no two wait for each other
            )

    def purge(self, older_than: float, limit: int) -> int:
        with self.datastore.writing() as cursor:
            cursor.execute("SET LOCAL synchronous_commit = off")
            cursor.execute(
                "DELETE FROM leftfold_commands WHERE command_id IN ("
                "SELECT command_id FROM leftfold_commands "
                "WHERE recorded_at < now() - make_interval(secs => %s) "
                f"AND command NOT LIKE '{REACTION}%%' "
                "LIMIT %s FOR UPDATE SKIP LOCKED)",
                (older_than, limit),
            )
            return cursor.rowcount

    # The library's recorder

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> list[int]:
        with self.datastore.writing() as cursor:
            cursor.execute(LOCK)
            cursor.execute(CALL_INSERT, columns(encoded(stored_events)))
            (first,) = cursor.fetchone() or (None,)
            tracking: Tracking | None = kwargs.get("tracking")
            if tracking is not None:
                rows = cursor.connection.cursor(row_factory=dict_row)
                self._insert_tracking(rows, tracking)
        return [] if first is None else list(range(first, first + len(stored_events)))

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
        with self.datastore.reading(binary=True) as cursor:
            cursor.execute(
                "SELECT originator_version, topic, state FROM stored_events "
                "WHERE originator_id = %s AND originator_version > %s "
                f"AND originator_version <= %s ORDER BY originator_version {direction} LIMIT %s",
                (originator_id, gt or 0, MAX_VERSION if lte is None else lte, limit),
                prepare=True,
            )
            return [StoredEvent(originator_id, *values) for values in cursor]


class PostgresViews(Tables):
    """Views and their checkpoints as tables beside the events."""

    dialect = POSTGRES

    def __init__(
        self,
        name: str,
        database: PostgresDatabase,
        log: PostgresLog,
        keys: Keys | None,
        *,
        may_define: bool,
    ) -> None:
        super().__init__(keys, may_define=may_define)
        self._name = name
        self._database: PostgresDatabase | _Joined = database
        self._log = log

    def within(self, joined: _Joined) -> PostgresViews:
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
            _set_up_reader(cursor, self._name, reader, table, create_tables=self._may_define)

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


class PostgresStore:
    """A database with events, views and checkpoints."""

    hints = True

    def __init__(self, url: str, lock_timeout: int) -> None:
        """Use this database. Raises `InvalidSettingsError` for a malformed URL."""
        self.name = masked(url)
        self._url = url
        self._lock_timeout = lock_timeout
        self._database: PostgresDatabase | None = None
        self._listener: psycopg.Connection[TupleRow] | None = None
        self._listening = Lock()
        # One that hangs as it begins would take its place in the pool for minutes.
        self._parts = {"connect_timeout": lock_timeout, **_parts(url)}

    def open(
        self,
        readers: Sequence[Reader],
        *,
        create_tables: bool,
        keys: Keys | None = None,
        inline: Inline | None = None,
    ) -> None:
        """Connect, and see to the tables.

        Raises `StoreUnavailableError`, `SchemaMissingError`, `SchemaVersionError`,
        `ViewChangedError`.
        """
        try:
            with self._connect() as connection:
                cursor = connection.cursor()
                cursor.execute(_session(self._lock_timeout))
                cursor.execute("SELECT pg_advisory_xact_lock(%s)", (DDL_LOCK,))
                self._set_up(cursor, readers, create_tables=create_tables)
        except psycopg.Error as error:
            raise StoreUnavailableError(self.name, without_values(error)) from None
        database = self._database = PostgresDatabase(self._parts, self._lock_timeout)
        self._commits = LoopCommits(database, self._connect_loop)
        try:
            self.log = PostgresLog(database)
        except PersistenceError as error:  # it asks the database for its settings
            raise StoreUnavailableError(self.name, str(error)) from None
        self.views = PostgresViews(self.name, database, self.log, keys, may_define=create_tables)
        self.log.views, self.log.inline = self.views, inline

    def _connect(self, *, autocommit: bool = False) -> psycopg.Connection[TupleRow]:
        return psycopg.connect(
            **{**KEEPALIVE, **self._parts},
            autocommit=autocommit,
            row_factory=tuple_row,
        )

    async def _connect_loop(self) -> AsyncConnection:
        connection = await psycopg.AsyncConnection.connect(
            **{**KEEPALIVE, **self._parts},
            autocommit=True,
            row_factory=tuple_row,
        )
        database = self._database
        try:
            with contextlib.nullcontext() if database is None else database.lent(connection):
                await connection.execute(_session(self._lock_timeout))
        except BaseException:
            connection.pgconn.finish()
            raise
        return connection

    def _set_up(self, cursor: Cursor, readers: Sequence[Reader], *, create_tables: bool) -> None:
        ours, theirs = "leftfold_schema", "stored_events"
        made = cursor.execute("SELECT to_regclass(%s), to_regclass(%s)", (ours, theirs)).fetchone()
        if made is not None and made[0] is None and made[1] is not None:
            raise StoreUnavailableError(self.name, f"its table {theirs} was not made by leftfold")
        version = 0
        if made is not None and made[0] is not None:
            found = cursor.execute("SELECT version FROM leftfold_schema").fetchone()
            version = found[0] if found else 0
        elif not create_tables:
            raise SchemaMissingError(self.name, ours)
        # What is there is left alone: to make it again, even in vain, takes locks from commits.
        # Every version up to now has only added to the one before.
        if create_tables and version < SCHEMA_VERSION:
            for statement in STATEMENTS:
                cursor.execute(statement.encode())
            cursor.execute("DELETE FROM leftfold_schema")
            cursor.execute("INSERT INTO leftfold_schema VALUES (%s)", (SCHEMA_VERSION,))
        elif version != SCHEMA_VERSION:
            raise SchemaVersionError(self.name, version, SCHEMA_VERSION)
        for reader in readers:
            table = ViewTable(reader, POSTGRES) if isinstance(reader, Projection) else None
            _set_up_reader(cursor, self.name, reader, table, create_tables=create_tables)

    def listen(self) -> int | None:
        """Begin to listen for commits; return a descriptor that becomes readable at each."""
        if self._listener is None:
            listener = self._connect(autocommit=True)
            database = self._database
            try:
                with contextlib.nullcontext() if database is None else database.lent(listener):
                    listener.execute(f"LISTEN {CHANNEL}; LISTEN {VIEWS_CHANNEL}")
                with self._listening:
                    # While it connected, the store may have been closed.
                    if self._database is not None and self._listener is None:
                        self._listener = listener
            finally:
                if self._listener is not listener:
                    listener.close()
        with self._listening:
            return None if self._listener is None else self._listener.fileno()

    def heard(self) -> Heard:
        """Take what the listener received."""
        assert self._listener is not None  # noqa: S101 - listen came first
        heard = Heard.NOTHING
        try:
            self._listener.pgconn.consume_input()
            while (told := self._listener.pgconn.notifies()) is not None:
                heard |= Heard.EVENTS if told.relname == CHANNEL.encode() else Heard.VIEWS
        except psycopg.OperationalError:
            self._listener.close()
            self._listener = None
            return Heard.END
        return heard

    def committing(self) -> Commit | None:
        """Return what commits on the running loop; psycopg does not know Windows' own."""
        is_plain = os.name == "posix" and self.log.inline is None
        return self._commits.commit if is_plain else None

    def cut(self, seconds: float) -> None:
        """End the calls that the server has not answered for so long."""
        database = self._database
        if database is not None:
            database.cut(seconds)

    def has_changed(self) -> bool:
        """Tell nothing: the listener does."""
        return False

    def close(self) -> None:
        """Close all connections; one that begins to listen meanwhile closes its own."""
        with self._listening:
            database, self._database = self._database, None
            listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        if database is not None:
            self._commits.close()
            database.close()


def _parts(url: str) -> dict[str, Any]:
    """Return what a URL says. Raises `InvalidSettingsError`, which quotes nothing, if malformed.

    The driver also takes URLs whose password is not encoded, and reads parts of it as other
    things, which it then quotes in its errors.
    """
    malformed = InvalidSettingsError("store", f"{masked(url)!r} is malformed")
    try:
        parts: dict[str, Any] = conninfo_to_dict(url)
    except (psycopg.Error, ValueError):
        raise malformed from None
    address = re.sub(r"^\w+://([^@/]*@)?", "", url).partition("?")[0]
    ports = str(parts.get("port", "")).split(",")
    if "@" in address or not all(port.isdecimal() for port in ports if port):
        raise malformed
    return parts


def _set_up_reader(
    cursor: Cursor,
    name: str,
    reader: Reader,
    table: ViewTable[Any] | None,
    *,
    create_tables: bool,
) -> None:
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
