"""The store on PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock  # noqa: TID251 - no thread is started: callers are threads
from typing import Any, TypeVar
from uuid import UUID

import psycopg
from eventsourcing.persistence import (
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
from leftfold.application.ports import (
    NOTHING,
    Commit,
    EncodedEvent,
    Failed,
    Group,
    LoggedEvent,
    Order,
    RecordedCommand,
    Seek,
    StoredSnapshot,
    Verdict,
)
from leftfold.domain import ALWAYS, Specification
from leftfold.domain.personal import Keys
from leftfold.infrastructure.errors import (
    InvalidSettingsError,
    SchemaMissingError,
    SchemaVersionError,
    StoreUnavailableError,
    ViewChangedError,
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
from leftfold.infrastructure.tables import POSTGRES, ViewTable

R = TypeVar("R")
Cursor = psycopg.Cursor[TupleRow]

CHANNEL = "stored_events"
DDL_LOCK = 0x1EF7F01D  # one number for all processes: whoever holds it changes tables
CONNECT_TIMEOUT = 1.0
"""Seconds to wait for a connection; one that takes longer is there for the next attempt."""
KEEPALIVE = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
"""Seconds, and probes: a peer that is gone is noticed, also where nothing is under way."""
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
            if isinstance(error.__cause__, psycopg.Error):
                raise type(error)(without_values(error.__cause__)) from error.__cause__
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


class PostgresLog(Notifying, PostgresProcessRecorder):
    """The log and the recorder of the library, on one table of events."""

    is_local = False
    datastore: PostgresDatabase

    # The application's port

    def commit(self, groups: Sequence[Group]) -> list[Verdict]:
        return commit_in_runs(groups, self._commit)

    def _commit(self, run: Run) -> list[Verdict]:
        is_sent = False
        try:
            with (
                self.datastore.get_connection() as connection,
                connection.cursor(row_factory=tuple_row, binary=True) as cursor,
            ):
                given = (*arrays(run), len(run.groups))
                is_sent = True
                # One statement outside of a transaction: its end is the commit.
                cursor.execute(CALL_COMMIT.encode(), given, prepare=True)
                verdicts, positions = cursor.fetchone() or ((), ())
        except PersistenceError as error:
            if not isinstance(error.__cause__, psycopg.Error):
                return [Failed(str(error), in_doubt=is_sent)] * len(run.groups)
            return [failed(error.__cause__, is_sent=is_sent)] * len(run.groups)
        return judged(run, verdicts, positions)

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
                "LIMIT %s FOR UPDATE SKIP LOCKED)",
                (older_than, limit),
            )
            return cursor.rowcount

    def read(
        self, after: int, limit: int, topics: Sequence[str] = (), *, without: Sequence[str] = ()
    ) -> list[LoggedEvent]:
        with self.datastore.reading(binary=True) as cursor:
            cursor.execute(
                "SELECT notification_id, originator_id, originator_version, topic, state "
                "FROM stored_events WHERE notification_id > %s "
                "AND (%s::text[] IS NULL OR topic = ANY(%s)) AND topic <> ALL(%s) "
                "ORDER BY notification_id LIMIT %s",
                (after, list(topics) or None, list(topics) or None, list(without), limit),
                prepare=True,
            )
            return [LoggedEvent(*values) for values in cursor]

    def head(self) -> int:
        with self.datastore.reading() as cursor:
            cursor.execute("SELECT max(notification_id) FROM stored_events")
            row = cursor.fetchone()
            return (row[0] if row else 0) or 0

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

    def __init__(self, database: PostgresDatabase, keys: Keys | None) -> None:
        super().__init__(keys)
        self._database = database

    def checkpoint(self, projection: Projection[Any]) -> int:
        with self._database.reading() as cursor:
            cursor.execute(
                "SELECT position FROM leftfold_checkpoints WHERE name = %s AND version = %s",
                (projection.name, projection.version),
            )
            row = cursor.fetchone()
            return int(row[0]) if row else 0

    def load(self, projection: Projection[R], keys: Sequence[str]) -> dict[str, R]:
        table = self.table(projection)
        with self._database.reading() as cursor:
            sql = f"{table.select_by_key} = ANY(%s)"
            cursor.execute(sql.encode(), (list(keys),), prepare=True)
            return {key: table.decode(values) for key, *values in cursor}

    def write(
        self,
        projection: Projection[R],
        rows: Mapping[str, R | None],
        expected: int,
        position: int,
    ) -> bool:
        table = self.table(projection)
        changed = {key: row for key, row in rows.items() if row is not None}
        document = table.encode_json(changed)
        deleted = [key for key, row in rows.items() if row is None]
        with self._database.writing() as cursor:
            # Rows and checkpoint share the transaction: if it is lost, the page is folded again.
            cursor.execute("SET LOCAL synchronous_commit = off")
            cursor.execute(
                "UPDATE leftfold_checkpoints SET position = %s "
                "WHERE name = %s AND version = %s AND position = %s",
                (position, projection.name, projection.version, expected),
                prepare=True,
            )
            if cursor.rowcount != 1:
                return False
            if changed:
                cursor.execute(table.upsert_json.encode(), (document,), prepare=True)
            if deleted:
                cursor.execute(f"{table.delete_by_key} = ANY(%s)".encode(), (deleted,))
        return True

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
        self._parts = _parts(url)

    def open(
        self,
        projections: Sequence[Projection[Any]],
        *,
        create_tables: bool,
        keys: Keys | None = None,
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
                self._set_up(cursor, projections, create_tables=create_tables)
        except psycopg.Error as error:
            raise StoreUnavailableError(self.name, without_values(error)) from None
        database = self._database = PostgresDatabase(self._parts, self._lock_timeout)
        self.views = PostgresViews(database, keys)
        for projection in projections:
            self.views.table(projection)
        self._commits = LoopCommits(database, self._connect_loop)
        try:
            self.log = PostgresLog(database, events_table_name="stored_events")
        except PersistenceError as error:  # it asks the database for its settings
            raise StoreUnavailableError(self.name, str(error)) from None

    def _connect(self, *, autocommit: bool = False) -> psycopg.Connection[TupleRow]:
        return psycopg.connect(
            **{**KEEPALIVE, **self._parts},
            autocommit=autocommit,
            connect_timeout=self._lock_timeout,
            row_factory=tuple_row,
        )

    async def _connect_loop(self) -> AsyncConnection:
        connection = await psycopg.AsyncConnection.connect(
            **{**KEEPALIVE, **self._parts},
            autocommit=True,
            connect_timeout=self._lock_timeout,
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

    def _set_up(
        self, cursor: Cursor, projections: Sequence[Projection[Any]], *, create_tables: bool
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
            for statement in STATEMENTS:
                cursor.execute(statement.encode())
            cursor.execute("DELETE FROM leftfold_schema")
            cursor.execute("INSERT INTO leftfold_schema VALUES (%s)", (SCHEMA_VERSION,))
        elif version != SCHEMA_VERSION:
            raise SchemaVersionError(self.name, version, SCHEMA_VERSION)
        for projection in projections:
            self._set_up_view(cursor, ViewTable(projection, POSTGRES), create_tables=create_tables)

    def _set_up_view(self, cursor: Cursor, table: ViewTable[Any], *, create_tables: bool) -> None:
        projection = table.projection
        found = cursor.execute(
            "SELECT definition FROM leftfold_checkpoints WHERE name = %s AND version = %s",
            (projection.name, projection.version),
        ).fetchone()
        if found is not None:
            if found[0] != table.description:
                raise ViewChangedError(projection.table)
            if create_tables:
                _make_indexes(cursor, table)
            return
        if not create_tables:
            raise SchemaMissingError(self.name, projection.table)
        cursor.execute(table.definition.encode())
        _make_indexes(cursor, table)
        if not _shows(cursor, projection):
            cursor.execute(f'DROP VIEW IF EXISTS "{projection.name}"'.encode())
            cursor.execute(table.member_view.encode())
        cursor.execute(
            "INSERT INTO leftfold_checkpoints (name, version, position, definition) "
            "VALUES (%s, %s, 0, %s)",
            (projection.name, projection.version, table.description),
        )

    def listen(self) -> int | None:
        """Begin to listen for commits; return a descriptor that becomes readable at each."""
        if self._listener is None:
            listener = self._connect(autocommit=True)
            database = self._database
            try:
                with contextlib.nullcontext() if database is None else database.lent(listener):
                    listener.execute(f"LISTEN {CHANNEL}")
                with self._listening:
                    # While it connected, the store may have been closed.
                    if self._database is not None and self._listener is None:
                        self._listener = listener
            finally:
                if self._listener is not listener:
                    listener.close()
        with self._listening:
            return None if self._listener is None else self._listener.fileno()

    def heard(self) -> bool:
        """Take what the listener received; False if its connection was lost."""
        assert self._listener is not None  # noqa: S101 - listen came first
        try:
            self._listener.pgconn.consume_input()
            while self._listener.pgconn.notifies() is not None:
                pass
        except psycopg.OperationalError:
            self._listener.close()
            self._listener = None
            return False
        return True

    def committing(self) -> Commit | None:
        """Return what commits on the running loop; psycopg does not know Windows' own."""
        return self._commits.commit if os.name == "posix" else None

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


def _shows(cursor: Cursor, projection: Projection[Any]) -> bool:
    """Tell whether the view for people is on this version's table already.

    If it is it stays: to drop it is to wait for all who read it.
    """
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
