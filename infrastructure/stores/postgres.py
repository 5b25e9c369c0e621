"""The store on PostgreSQL."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from threading import Lock  # noqa: TID251 - no thread is started: callers are threads
from typing import Any
from uuid import UUID

import psycopg
from eventsourcing.persistence import PersistenceError, StoredEvent, Tracking
from eventsourcing.postgres import PostgresProcessRecorder
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow, dict_row, tuple_row

from leftfold.application.checkpoints import Reader
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
    RecordedCommand,
    StoredSnapshot,
    Verdict,
)
from leftfold.domain import LeftfoldError
from leftfold.domain.personal import Keys
from leftfold.infrastructure.errors import (
    InvalidSettingsError,
    SchemaMissingError,
    SchemaVersionError,
    StoreUnavailableError,
)
from leftfold.infrastructure.settings import masked
from leftfold.infrastructure.stores.common import (
    EACH_TOPIC,
    MAX_VERSION,
    SCHEMA_VERSION,
    Notifying,
    Run,
    commit_in_runs,
    encoded,
    failing,
    in_views,
    is_of_views,
    load_aggregates,
    refused,
)
from leftfold.infrastructure.stores.postgres_commits import (
    AsyncConnection,
    LoopCommits,
    arrays,
    columns,
    failed,
    judged,
    without_values,
)
from leftfold.infrastructure.stores.postgres_database import (
    KEEPALIVE,
    Cursor,
    Joined,
    PostgresDatabase,
    session,
)
from leftfold.infrastructure.stores.postgres_schema import (
    CALL_INSERT,
    COMMIT_PARAMETERS,
    LOCK,
    STATEMENTS,
)
from leftfold.infrastructure.stores.postgres_views import DDL_LOCK, VIEWS_CHANNEL, PostgresViews

_log = logging.getLogger("leftfold.stores")

CHANNEL = "stored_events"
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
CALL_COMMIT = f"SELECT * FROM leftfold_commit({', '.join(f'%b::{k}' for k in COMMIT_PARAMETERS)})"


class PostgresEvents:
    """The log as it is read page by page."""

    def __init__(self, datastore: PostgresDatabase | Joined) -> None:
        self.datastore = datastore

    def read(self, after: int, limit: int, topics: Sequence[str] = ()) -> list[LoggedEvent]:
        of_topics = (list(topics), after, limit, limit)
        with self.datastore.reading(binary=True) as cursor:
            if topics:
                cursor.execute(READ_TOPICS, of_topics, prepare=True)
            else:
                cursor.execute(READ, (after, limit), prepare=True)
            return list(map(LoggedEvent._make, cursor.fetchall()))

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
        return commit_in_runs(groups, self._commit, self.inline)

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
        except Exception as error:
            if is_of_views(error):
                return failing(error, run)
            if not isinstance(error, PersistenceError):
                raise
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
            joined = Joined(connection, self.datastore)
            with in_views():
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
            for event in map(EncodedEvent._make, cursor.fetchall()):
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
        database = self._database = PostgresDatabase(self._parts, self._lock_timeout)
        self._commits = LoopCommits(database, self._connect_loop)
        try:
            with (
                self._connect() as connection,
                database.lent(connection),
                connection.transaction(),
            ):
                cursor = connection.cursor()
                cursor.execute(session(self._lock_timeout))
                cursor.execute("SELECT pg_advisory_xact_lock(%s)", (DDL_LOCK,))
                self._set_up(cursor, database, readers, create_tables=create_tables)
        except psycopg.Error as error:
            raise StoreUnavailableError(self.name, without_values(error)) from None
        try:
            self.log = PostgresLog(database)
        except PersistenceError as error:  # it asks the database for its settings
            raise StoreUnavailableError(self.name, str(error)) from None
        self.views = PostgresViews(self.name, database, keys, may_define=create_tables)
        self.log.views, self.log.inline, self.views.log = self.views, inline, self.log

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
                await connection.execute(session(self._lock_timeout))
        except BaseException:
            connection.pgconn.finish()
            raise
        return connection

    def _set_up(
        self,
        cursor: Cursor,
        database: PostgresDatabase,
        readers: Sequence[Reader],
        *,
        create_tables: bool,
    ) -> None:
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
            database.allow_time(cursor.connection)
            for statement in STATEMENTS:
                cursor.execute(statement.encode())
            cursor.execute("DELETE FROM leftfold_schema")
            cursor.execute("INSERT INTO leftfold_schema VALUES (%s)", (SCHEMA_VERSION,))
        elif version != SCHEMA_VERSION:
            raise SchemaVersionError(self.name, version, SCHEMA_VERSION)
        joined = Joined(cursor.connection, database)
        views = PostgresViews(self.name, joined, None, may_define=create_tables)
        for reader in readers:
            views.define(reader)

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
