"""Connections to a PostgreSQL database."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psycopg
from eventsourcing.persistence import DataError, PersistenceError
from eventsourcing.postgres import PostgresDatastore
from psycopg.rows import DictRow, TupleRow, dict_row, tuple_row

from leftfold.infrastructure.platform import monotonic, shut_down
from leftfold.infrastructure.stores.postgres_arrays import take_packed
from leftfold.infrastructure.stores.postgres_commits import AsyncConnection, without_values

Cursor = psycopg.Cursor[TupleRow]

PROGRAM_LIMIT = "54"
"""The class of errors (SQLSTATE) of what is more than the database takes."""
CONNECT_TIMEOUT = 1.0
"""Seconds to wait for a connection; one that takes longer is there for the next attempt."""
WHOLE_VIEW = 3_600.0
"""Seconds more that may be taken by what is done to all rows of a view."""
KEEPALIVE = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
"""Seconds, and probes: a peer that is gone is noticed, also where nothing is under way."""


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
        prepare, begin = super().after_connect_func(), session(self.lock_timeout)

        def after_connect(connection: psycopg.Connection[Any]) -> None:
            with self.lent(connection):
                prepare(connection)
                connection.execute(begin)
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

    def allow_time(self, connection: psycopg.Connection[Any]) -> None:
        """Let what a lent connection does from now on take as long as a whole view needs."""
        self._lent[connection] = monotonic() + WHOLE_VIEW

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


def session(lock_timeout: int) -> bytes:
    """What every connection begins with.

    In other zones the first and last days of the calendar cannot be read.
    """
    return (
        f"SET TIME ZONE 'UTC'; SET lock_timeout = '{lock_timeout}s'; "
        # What the commit looks at under its lock must be what is there by then.
        "SET default_transaction_isolation = 'read committed'"
    ).encode()


class Joined:
    """A transaction under way, for those who else begin one."""

    def __init__(self, connection: psycopg.Connection[Any], database: PostgresDatabase) -> None:
        self._connection = connection
        self.allow_time = database.allow_time

    @contextlib.contextmanager
    def reading(self, *, binary: bool = False) -> Iterator[Cursor]:
        with self._connection.cursor(row_factory=tuple_row, binary=binary) as cursor:
            yield cursor

    writing = reading
