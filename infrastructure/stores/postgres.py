"""The store on PostgreSQL."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar
from uuid import UUID

import psycopg
from eventsourcing.persistence import (
    InterfaceError,
    Notification,
    OperationalError,
    PersistenceError,
    StoredEvent,
    Tracking,
)
from eventsourcing.postgres import (
    PostgresDatastore,
    PostgresProcessRecorder,
)
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow, dict_row, tuple_row

from leftfold.application import Projection
from leftfold.application.ports import (
    Committed,
    EncodedEvent,
    Failed,
    Group,
    LoggedEvent,
    Order,
    RecordedCommand,
    Repeated,
    Save,
    Seek,
    Stale,
    Verdict,
)
from leftfold.infrastructure.errors import (
    SchemaMissingError,
    SchemaVersionError,
    StoreUnavailableError,
    ViewChangedError,
)
from leftfold.infrastructure.settings import masked
from leftfold.infrastructure.tables import POSTGRES, ViewTable

R = TypeVar("R")
Cursor = psycopg.Cursor[TupleRow]

SCHEMA_VERSION = 1
CHANNEL = "stored_events"
DDL_LOCK = 0x1EF7F01D  # one number for all processes: whoever holds it changes tables
MAX_INSERTED = 1_000  # events in one INSERT

TABLES = (
    """CREATE TABLE IF NOT EXISTS stored_events (
        originator_id uuid NOT NULL,
        originator_version bigint NOT NULL,
        topic text NOT NULL,
        state bytea NOT NULL,
        notification_id bigserial UNIQUE,
        PRIMARY KEY (originator_id, originator_version))""",
    """CREATE TABLE IF NOT EXISTS leftfold_commands (
        command_id uuid PRIMARY KEY,
        command text NOT NULL,
        recorded_at timestamptz NOT NULL DEFAULT now(),
        position bigint NOT NULL,
        aggregates text NOT NULL,
        answer bytea)""",
    """CREATE TABLE IF NOT EXISTS leftfold_checkpoints (
        name text NOT NULL,
        version int NOT NULL,
        position bigint NOT NULL,
        definition text NOT NULL,
        owner text,
        epoch bigint NOT NULL DEFAULT 0,
        lease timestamptz,
        PRIMARY KEY (name, version))""",
    """CREATE TABLE IF NOT EXISTS notification_tracking (
        application_name text PRIMARY KEY,
        notification_id bigint)""",
    "CREATE TABLE IF NOT EXISTS leftfold_schema (version int NOT NULL)",
)


class PostgresDatabase(PostgresDatastore):
    """The library's connections to one database."""

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


class PostgresLog(PostgresProcessRecorder):
    """The log and the recorder of the library, on one table of events."""

    is_local = False
    datastore: PostgresDatabase

    @property
    def _begin(self) -> bytes:
        patience = f"SET LOCAL lock_timeout = '{self.datastore.lock_timeout}s'"
        lock = "LOCK TABLE stored_events IN EXCLUSIVE MODE"
        return f"BEGIN; {patience}; {lock}; NOTIFY stored_events".encode()

    # The application's port

    def commit(self, groups: Sequence[Group]) -> list[Verdict]:
        if len(groups) > 1:
            together = [save for group in groups for save in group]
            verdict, positions = self._write(together)
            if isinstance(verdict, Committed):
                each = iter(positions)
                return [Committed(tuple(next(each) for _ in group)) for group in groups]
            if isinstance(verdict, Failed):
                return [verdict] * len(groups)
        return [self._write(group)[0] for group in groups]

    def _write(self, saves: Group) -> tuple[Verdict, list[int]]:
        is_committing = False
        try:
            with (
                self.datastore.get_connection() as connection,
                connection.cursor(row_factory=tuple_row) as cursor,
            ):
                try:
                    # The lock makes the order of commits the order of positions.
                    cursor.execute(self._begin)
                    positions = _insert_saves(cursor, saves)
                    is_committing = True
                    cursor.execute("COMMIT")
                except psycopg.errors.UniqueViolation as error:
                    connection.rollback()
                    return _verdict(error), []
                except BaseException:
                    with contextlib.suppress(psycopg.Error):
                        connection.rollback()
                    raise
        except (OperationalError, InterfaceError, PersistenceError) as error:
            return Failed(str(error), in_doubt=is_committing), []
        return Committed(tuple(positions)), positions

    def streams(self, aggregate_ids: Sequence[UUID]) -> dict[UUID, list[EncodedEvent]]:
        found: dict[UUID, list[EncodedEvent]] = {i: [] for i in aggregate_ids}
        with self.datastore.reading(binary=True) as cursor:
            if len(aggregate_ids) == 1:
                where, value = "= %s", aggregate_ids[0]
            else:
                where, value = "= ANY(%s)", list(aggregate_ids)  # type: ignore[assignment]  # either fits its mark
            cursor.execute(
                "SELECT originator_id, originator_version, topic, state FROM stored_events "
                f"WHERE originator_id {where} ORDER BY originator_id, originator_version",
                (value,),
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
                    command_id, command, _aggregates(aggregates), position, answer
                )
                for command_id, command, aggregates, position, answer in cursor
            }

    def read(self, after: int, limit: int, topics: Sequence[str] = ()) -> list[LoggedEvent]:
        with self.datastore.reading(binary=True) as cursor:
            cursor.execute(
                "SELECT notification_id, originator_id, originator_version, topic, state "
                "FROM stored_events WHERE notification_id > %s "
                "AND (%s::text[] IS NULL OR topic = ANY(%s)) "
                "ORDER BY notification_id LIMIT %s",
                (after, list(topics) or None, list(topics) or None, limit),
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
            cursor.execute(f"SET LOCAL lock_timeout = '{self.datastore.lock_timeout}s'".encode())
            cursor.execute("LOCK TABLE stored_events IN EXCLUSIVE MODE")
            cursor.execute("NOTIFY stored_events")
            events = [
                EncodedEvent(_as_uuid(e.originator_id), e.originator_version, e.topic, e.state)
                for e in stored_events
            ]
            positions = _insert_events(cursor, events)
            tracking: Tracking | None = kwargs.get("tracking")
            if tracking is not None:
                rows = cursor.connection.cursor(row_factory=dict_row)
                self._insert_tracking(rows, tracking)
        return positions

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
                (originator_id, gt or 0, 2**62 if lte is None else lte, limit),
                prepare=True,
            )
            return [StoredEvent(originator_id, *values) for values in cursor]

    def select_notifications(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
    ) -> list[Notification]:
        after = 0 if start is None else start - 1 if inclusive_of_start else start
        return [
            Notification(
                event.aggregate_id, event.version, event.topic, event.state, event.position
            )
            for event in self.read(after, limit, topics)
            if stop is None or event.position <= stop
        ]


def _insert_events(cursor: Cursor, events: Sequence[EncodedEvent]) -> list[int]:
    positions: list[int] = []
    for begin in range(0, len(events), MAX_INSERTED):
        chunk = events[begin : begin + MAX_INSERTED]
        cursor.execute(
            "INSERT INTO stored_events (originator_id, originator_version, topic, state) "
            "SELECT i, v, t, s FROM unnest(%b::uuid[], %b::bigint[], %b::text[], %b::bytea[]) "
            "WITH ORDINALITY AS e (i, v, t, s, n) ORDER BY n RETURNING notification_id",
            (
                [e.aggregate_id for e in chunk],
                [e.version for e in chunk],
                [e.topic for e in chunk],
                [e.state for e in chunk],
            ),
            prepare=True,
        )
        positions += [position for (position,) in cursor]
    return positions


def _insert_saves(cursor: Cursor, saves: Sequence[Save]) -> list[int]:
    at = _insert_events(cursor, [event for save in saves for event in save.events])
    positions: list[int] = []
    end = 0
    for save in saves:
        end += len(save.events)
        positions.append(at[end - 1] if save.events else 0)
    cursor.execute(
        "INSERT INTO leftfold_commands (command_id, command, position, aggregates, answer) "
        "SELECT * FROM unnest(%b::uuid[], %b::text[], %b::bigint[], %b::text[], %b::bytea[])",
        (
            [save.command_id for save in saves],
            [save.command for save in saves],
            positions,
            [json.dumps([[i.hex, version] for i, version in s.aggregates]) for s in saves],
            [save.answer for save in saves],
        ),
        prepare=True,
    )
    return positions


def _verdict(error: psycopg.errors.UniqueViolation) -> Verdict:
    return Repeated() if error.diag.table_name == "leftfold_commands" else Stale()


def _aggregates(text: str) -> tuple[tuple[UUID, int], ...]:
    return tuple((UUID(i), version) for i, version in json.loads(text))


def _as_uuid(aggregate_id: UUID | str) -> UUID:
    return aggregate_id if isinstance(aggregate_id, UUID) else UUID(aggregate_id)


class PostgresViews:
    """Views and their checkpoints as tables beside the events."""

    def __init__(self, database: PostgresDatabase) -> None:
        self._database = database
        self._tables: dict[str, ViewTable[Any]] = {}

    def table(self, projection: Projection[R]) -> ViewTable[R]:
        if projection.table not in self._tables:
            self._tables[projection.table] = ViewTable(projection, POSTGRES)
        return self._tables[projection.table]

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

    def get(self, projection: Projection[R], key: str) -> R | None:
        row = self.load(projection, (key,)).get(key)
        return row if row is not None and projection.shows(row) else None

    def select(
        self,
        projection: Projection[R],
        order: Order | None,
        limit: int | None,
        seek: Seek | None = None,
    ) -> list[tuple[str, R]]:
        table = self.table(projection)
        query = table.select(order, limit, seek)
        with self._database.reading() as cursor:
            cursor.execute(query.sql.encode(), query.parameters)
            return [(key, table.decode(values)) for key, *values in cursor]


class PostgresStore:
    """A database with events, views and checkpoints."""

    hints = True

    def __init__(self, url: str, lock_timeout: int) -> None:
        """Use this database. Raises `StoreUnavailableError` for a malformed URL."""
        self.name = masked(url)
        self._url = url
        self._lock_timeout = lock_timeout
        self._database: PostgresDatabase | None = None
        self._listener: psycopg.Connection[TupleRow] | None = None
        try:
            self._parts: dict[str, Any] = conninfo_to_dict(url)
        except psycopg.ProgrammingError as error:
            raise StoreUnavailableError(self.name, masked(str(error))) from None

    def open(self, projections: Sequence[Projection[Any]], *, create_tables: bool) -> None:
        """Connect, and see to the tables.

        Raises `StoreUnavailableError`, `SchemaMissingError`, `SchemaVersionError`,
        `ViewChangedError`.
        """
        try:
            with psycopg.connect(
                self._url, connect_timeout=self._lock_timeout, row_factory=tuple_row
            ) as connection:
                cursor = connection.cursor()
                cursor.execute("SELECT pg_advisory_xact_lock(%s)", (DDL_LOCK,))
                self._set_up(cursor, projections, create_tables=create_tables)
        except psycopg.Error as error:
            raise StoreUnavailableError(self.name, str(error).strip()) from None
        database = PostgresDatabase(
            dbname=self._parts.get("dbname", ""),
            host=self._parts.get("host", ""),
            port=self._parts.get("port", ""),
            user=self._parts.get("user", ""),
            password=self._parts.get("password", ""),
            pool_size=1,
            max_overflow=7,
            lock_timeout=self._lock_timeout,
            connect_timeout=self._lock_timeout,
        )
        # The library knows five parameters; the URL's others (sslmode, …) hold for the pool too.
        database.pool.kwargs = {**self._parts, "row_factory": dict_row}
        self._database = database
        self.views = PostgresViews(database)
        for projection in projections:
            self.views.table(projection)
        self.log = PostgresLog(database, events_table_name="stored_events")

    def _set_up(
        self, cursor: Cursor, projections: Sequence[Projection[Any]], *, create_tables: bool
    ) -> None:
        ours, theirs = "leftfold_schema", "stored_events"
        made = cursor.execute("SELECT to_regclass(%s), to_regclass(%s)", (ours, theirs)).fetchone()
        if made is not None and made[0] is None and made[1] is not None:
            raise StoreUnavailableError(self.name, f"its table {theirs} was not made by leftfold")
        if create_tables:
            for statement in TABLES:
                cursor.execute(statement.encode())
            if not cursor.execute("SELECT 1 FROM leftfold_schema").fetchone():
                cursor.execute("INSERT INTO leftfold_schema VALUES (%s)", (SCHEMA_VERSION,))
        elif made is None or made[0] is None:
            raise SchemaMissingError(self.name, ours)
        row = cursor.execute("SELECT version FROM leftfold_schema").fetchone()
        if row != (SCHEMA_VERSION,):
            raise SchemaVersionError(self.name, row[0] if row else 0, SCHEMA_VERSION)
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
            return
        if not create_tables:
            raise SchemaMissingError(self.name, projection.table)
        cursor.execute(table.definition.encode())
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
            self._listener = psycopg.connect(
                self._url, autocommit=True, connect_timeout=self._lock_timeout
            )
            self._listener.execute(f"LISTEN {CHANNEL}")
        return self._listener.fileno()

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

    def has_changed(self) -> bool:
        """Tell nothing: the listener does."""
        return False

    def close(self) -> None:
        """Close all connections."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._database is not None:
            self._database.close()
            self._database = None
