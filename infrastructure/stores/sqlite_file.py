"""Connections to an SQLite file, and statements of many rows."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from threading import Lock  # noqa: TID251 - no thread is started: callers are threads
from typing import TypeVar
from uuid import UUID

from eventsourcing.persistence import (
    DataError,
    IntegrityError,
    OperationalError,
    PersistenceError,
    ProgrammingError,
)
from eventsourcing.sqlite import SQLiteConnection, SQLiteDatastore

T = TypeVar("T")

AT_ONCE = 1_024  # values or rows in one statement
VARIABLES = 32_766  # in one statement, at most
FEW = 32  # of which any number has a statement of its own
STATEMENTS = 512  # that a connection remembers
IDLE_READERS = 8
BULK = 500  # rows from which a transaction is large
CHECKPOINT, BULK_CHECKPOINT = 1_000, 8_000  # pages in the write-ahead log before it is moved
CACHE = 32_768  # KiB of pages the writer keeps: the index on aggregates is written at random
PRIMARY = 0xFF  # of an error's code: the rest tells more
OF_VALUES = re.compile(
    "malformed JSON|JSON path error|JSON cannot hold|integer overflow|ESCAPE expression|"
    "malformed MATCH|unknown special query|fts5"
)
"""What SQLite says of values with the code that it has for wrong statements."""
QUOTED = re.compile("""^near .*: |: ["'].*|(?<=no such column): .*""", re.DOTALL)
"""What of a statement is not repeated: it may be a value that somebody wrote into it."""
LIBRARY_ERRORS: dict[type[sqlite3.Error], type[PersistenceError]] = {
    sqlite3.DataError: DataError,
    sqlite3.IntegrityError: IntegrityError,
    sqlite3.OperationalError: OperationalError,
    sqlite3.ProgrammingError: ProgrammingError,
}


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
        with library_errors(), self._lend_writer(rows, durable=durable) as lent:
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
        with library_errors(), self._lend_reader() as lent:
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
            # Of each page that a statement of many rows changes a copy is kept until it ends.
            if rows:  # not before an index is made; and to change it empties temporary tables
                self._tune(self._writer, "temp_store", "MEMORY")
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
            self._path,
            timeout=self._lock_timeout,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=STATEMENTS,
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
def library_errors() -> Iterator[None]:
    """Raise the driver's errors as the library's."""
    try:
        yield
    except sqlite3.Error as error:
        raise _as_librarys(error) from error


def _as_librarys(error: sqlite3.Error) -> PersistenceError:
    text = str(error)
    if getattr(error, "sqlite_errorcode", 0) & PRIMARY != sqlite3.SQLITE_ERROR:
        return LIBRARY_ERRORS.get(type(error), PersistenceError)(text)
    # The driver calls it operational, but it is no outage.
    found = OF_VALUES.search(text)
    return DataError(found.group()) if found else ProgrammingError(QUOTED.sub("", text))


class Joined:
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


def insert_rows(
    connection: sqlite3.Connection,
    into: str,
    rows: Sequence[Sequence[object]],
    on_conflict: str = "",
) -> None:
    """Insert rows, many in one statement.

    The driver gives up the interpreter's lock at every step of a statement. One row a step
    makes it wait for the lock after each, while other threads compute.
    """
    at_once = AT_ONCE
    while rows and at_once * len(rows[0]) > VARIABLES:
        at_once //= 2
    for chunk in chunks(rows, at_once):
        statement = _insert_statement(into, len(rows[0]), len(chunk), on_conflict)
        connection.execute(statement, list(chain.from_iterable(chunk)))


@lru_cache(STATEMENTS)
def _insert_statement(into: str, columns: int, rows: int, on_conflict: str) -> str:
    values = ",".join([f"({marks(columns)})"] * rows)
    return f"INSERT INTO {into} VALUES {values}{on_conflict}"


def marks(number: int) -> str:
    """Return places for so many values."""
    return ",".join("?" * number)


@lru_cache(maxsize=65_536)
def as_stored(stored: bytes) -> UUID:
    """Return the id that is stored as bytes."""
    return UUID(bytes=stored)


def chunks(values: Sequence[T], at_once: int = AT_ONCE) -> Iterator[Sequence[T]]:
    """Part values by halves, 1024, 512, …, and let the last few together.

    A connection remembers the statements that it has compiled, and for each that it runs it has
    to wait for the interpreter's lock.
    """
    begin = 0
    while begin < len(values):
        left = len(values) - begin
        while at_once > max(left, FEW):
            at_once //= 2
        yield values[begin : begin + at_once]
        begin += at_once
