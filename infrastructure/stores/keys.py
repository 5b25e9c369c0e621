"""Where keys of personal data are kept, and how they are forgotten."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from eventsourcing.persistence import OperationalError

from leftfold.infrastructure.errors import (
    InvalidSettingsError,
    MissingPackageError,
    StoreUnavailableError,
)
from leftfold.infrastructure.platform import Lock, monotonic, shut_down
from leftfold.infrastructure.settings import Settings, masked

KEY_BITS = 256
TOGETHER = 1_024
"""Keys read or made at a time: those made together are often wanted together."""
MIGRATE = "are missing, and may not be made here: run `leftfold migrate`"
SQLITE = "sqlite:///"


class StoredKey(NamedTuple):
    """A subject's key as it is kept."""

    id: str
    subject: str
    secret: bytes

    def __repr__(self) -> str:
        return f"StoredKey({self.id})"


class KeyStore(Protocol):
    """Where keys are kept, apart from what is sealed under them.

    All but `open` raise `OperationalError` if they cannot be reached.
    """

    def open(self, *, create_tables: bool) -> None:
        """Make the tables that are missing, if they may be made; a file, when it is needed.

        Raises `StoreUnavailableError`.
        """
        ...

    def provide(self, subjects: Collection[str]) -> list[StoredKey]:
        """Return the keys of subjects; those that have none get one, which is kept for good."""
        ...

    def find(self, key_id: str) -> list[StoredKey]:
        """Return a key, if there is one, and perhaps some that were made after it."""
        ...

    def forget(self, subject: str) -> list[str]:
        """Delete a subject's key, and note that it is gone; return its name, if there was one."""
        ...

    def forgotten(self, after: int) -> tuple[list[str], int]:
        """Return the names of keys that were deleted after a mark, and the next mark."""
        ...

    def cut(self, seconds: float) -> None:
        """End a call that has not been answered for so long; from another thread."""
        ...

    def close(self) -> None:
        """Close all connections."""
        ...


def new_keys(subjects: Iterable[str]) -> list[StoredKey]:
    """Make keys."""
    return [StoredKey(uuid4().hex, s, AESGCM.generate_key(KEY_BITS)) for s in subjects]


class MemoryKeys:
    """Keys in this process; gone with it."""

    def __init__(self) -> None:
        self._by_subject: dict[str, StoredKey] = {}
        self._forgotten: list[str] = []
        self._turn = Lock()

    def open(self, *, create_tables: bool) -> None:
        """Nothing to open."""

    def provide(self, subjects: Collection[str]) -> list[StoredKey]:
        with self._turn:
            for key in new_keys(subjects):
                self._by_subject.setdefault(key.subject, key)
            return [self._by_subject[subject] for subject in subjects]

    def find(self, key_id: str) -> list[StoredKey]:
        with self._turn:
            return [key for key in self._by_subject.values() if key.id == key_id]

    def forget(self, subject: str) -> list[str]:
        with self._turn:
            key = self._by_subject.pop(subject, None)
            gone = [] if key is None else [key.id]
            self._forgotten += gone
            return gone

    def forgotten(self, after: int) -> tuple[list[str], int]:
        with self._turn:
            return self._forgotten[max(after, 0) :], len(self._forgotten)

    def cut(self, seconds: float) -> None:
        """Nothing hangs."""

    def close(self) -> None:
        """Nothing to close."""


class SQLiteKeys:
    """Keys in a file of their own."""

    TABLES = (
        """CREATE TABLE IF NOT EXISTS leftfold_keys (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            key_id TEXT NOT NULL UNIQUE,
            subject TEXT NOT NULL UNIQUE,
            secret BLOB NOT NULL)""",
        """CREATE TABLE IF NOT EXISTS leftfold_forgotten (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            key_id TEXT NOT NULL,
            forgotten_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ')))""",
    )

    def __init__(self, path: str, lock_timeout: int) -> None:
        self._path = Path(path).absolute()
        self._lock_timeout = lock_timeout
        self._may_create = True
        self._connection: sqlite3.Connection | None = None
        self._turn = Lock()

    def open(self, *, create_tables: bool) -> None:
        """Let the file be made when the first key is, or not."""
        self._may_create = create_tables

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._turn:
                yield self._connection or self._connect()
        except sqlite3.Error as error:
            raise OperationalError(f"keys: {error}") from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                connection.execute("ROLLBACK")
                raise

    def _connect(self) -> sqlite3.Connection:
        if not self._may_create and not self._path.exists():
            raise OperationalError(f"keys: {self._path} and its tables {MIGRATE}")
        connection = sqlite3.connect(
            self._path, timeout=self._lock_timeout, isolation_level=None, check_same_thread=False
        )
        self._path.chmod(0o600)
        # What is deleted is overwritten, and no journal beside the file keeps it.
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA synchronous = FULL")
        for statement in self.TABLES:
            connection.execute(statement)
        self._connection = connection
        return connection

    def provide(self, subjects: Collection[str]) -> list[StoredKey]:
        with self._writing() as connection:
            connection.executemany(
                "INSERT INTO leftfold_keys (key_id, subject, secret) VALUES (?, ?, ?) "
                "ON CONFLICT (subject) DO NOTHING",
                new_keys(subjects),
            )
            query = "SELECT key_id, subject, secret FROM leftfold_keys WHERE subject = ?"
            return [StoredKey(*connection.execute(query, (s,)).fetchone()) for s in subjects]

    def find(self, key_id: str) -> list[StoredKey]:
        with self._reading() as connection:
            query = (
                "SELECT key_id, subject, secret FROM leftfold_keys WHERE number >= "
                "(SELECT number FROM leftfold_keys WHERE key_id = ?) ORDER BY number LIMIT ?"
            )
            return [StoredKey(*row) for row in connection.execute(query, (key_id, TOGETHER))]

    def forget(self, subject: str) -> list[str]:
        with self._writing() as connection:
            deleted = connection.execute(
                "DELETE FROM leftfold_keys WHERE subject = ? RETURNING key_id", (subject,)
            ).fetchall()
            connection.executemany("INSERT INTO leftfold_forgotten (key_id) VALUES (?)", deleted)
            return [key_id for (key_id,) in deleted]

    def forgotten(self, after: int) -> tuple[list[str], int]:
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT number, key_id FROM leftfold_forgotten WHERE number > ? ORDER BY number",
                (after,),
            ).fetchall()
            return [key_id for _, key_id in rows], rows[-1][0] if rows else max(after, 0)

    def cut(self, seconds: float) -> None:
        """Nothing hangs for longer than the lock's timeout."""

    def close(self) -> None:
        """Close the file."""
        with self._turn:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


class PostgresKeys:
    """Keys in a database, if possible another one than that of the events."""

    ARE_THERE = "SELECT to_regclass('leftfold_keys'), to_regclass('leftfold_forgotten')"
    TABLES = """
        SELECT pg_advisory_xact_lock(519499805);
        CREATE TABLE IF NOT EXISTS leftfold_keys (
            number bigserial PRIMARY KEY,
            key_id text NOT NULL UNIQUE,
            subject text NOT NULL UNIQUE,
            secret bytea NOT NULL);
        CREATE TABLE IF NOT EXISTS leftfold_forgotten (
            number bigserial PRIMARY KEY,
            key_id text NOT NULL,
            forgotten_at timestamptz NOT NULL DEFAULT now())"""

    def __init__(self, url: str, timeout: int) -> None:
        try:
            import psycopg
        except ImportError:
            raise MissingPackageError("PostgreSQL", "postgres") from None
        self._psycopg = psycopg
        self._url = url
        self._timeout = timeout
        self._connection: psycopg.Connection[Any] | None = None
        self._turn = Lock()
        self._asked: float | None = None  # since when an answer is awaited

    def open(self, *, create_tables: bool) -> None:
        """Make the tables that are missing, if they may be made."""
        if not create_tables:
            return
        try:
            with self._writing() as cursor:
                # To make what is there already needs rights too.
                if None in (cursor.execute(self.ARE_THERE).fetchone() or ()):
                    cursor.execute(self.TABLES.encode())
        except OperationalError as error:
            raise StoreUnavailableError(masked(self._url), str(error)) from None

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """Lend a cursor in a transaction; a connection that was lost is made anew the next time."""
        try:
            with self._turn:
                connection = self._connection
                if connection is None or connection.closed:
                    connection = self._connect()
                with self._awaited(), connection.transaction(), connection.cursor() as cursor:
                    yield cursor
        except self._psycopg.errors.UndefinedTable:
            raise OperationalError(f"keys: the tables {MIGRATE}") from None
        except self._psycopg.Error as error:
            # Without the server's own words on rows: they name the subject.
            raise OperationalError(f"keys: {type(error).__name__}") from None

    def _connect(self) -> Any:
        connection = self._connection = self._psycopg.connect(
            self._url, connect_timeout=self._timeout, keepalives_idle=5, tcp_user_timeout=10_000
        )
        try:
            with self._awaited(), connection.transaction():
                connection.execute(f"SET lock_timeout = '{self._timeout}s'".encode())
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def _awaited(self) -> Iterator[None]:
        self._asked = monotonic()
        try:
            yield
        finally:
            self._asked = None

    def provide(self, subjects: Collection[str]) -> list[StoredKey]:
        with self._writing() as cursor:
            made = new_keys(sorted(subjects))  # in one order, so that no two wait for each other
            cursor.execute(
                "INSERT INTO leftfold_keys (key_id, subject, secret) "
                "SELECT * FROM unnest(%b::text[], %b::text[], %b::bytea[]) "
                "ON CONFLICT (subject) DO NOTHING",
                tuple(map(list, zip(*made, strict=True))),
            )
            cursor.execute(
                "SELECT key_id, subject, secret FROM leftfold_keys WHERE subject = ANY(%s)",
                (list(subjects),),
            )
            return [StoredKey(*row) for row in cursor]

    def find(self, key_id: str) -> list[StoredKey]:
        with self._writing() as cursor:
            cursor.execute(
                "SELECT key_id, subject, secret FROM leftfold_keys WHERE number >= "
                "(SELECT number FROM leftfold_keys WHERE key_id = %s) ORDER BY number LIMIT %s",
                (key_id, TOGETHER),
            )
            return [StoredKey(*row) for row in cursor]

    def forget(self, subject: str) -> list[str]:
        with self._writing() as cursor:
            # One at a time: so the numbers are in the order of the commits.
            cursor.execute("LOCK TABLE leftfold_forgotten IN EXCLUSIVE MODE")
            cursor.execute(
                "WITH gone AS (DELETE FROM leftfold_keys WHERE subject = %s RETURNING key_id) "
                "INSERT INTO leftfold_forgotten (key_id) SELECT key_id FROM gone RETURNING key_id",
                (subject,),
            )
            gone = [key_id for (key_id,) in cursor]
        with suppress(OperationalError), self._turn:
            self._vacuum()
        return gone

    def _vacuum(self) -> None:
        """Free the place of what was deleted, so that it will be written over."""
        connection = self._connection
        if connection is not None and not connection.closed:
            with suppress(self._psycopg.Error):
                connection.autocommit = True
                try:
                    with self._awaited():
                        connection.execute("VACUUM leftfold_keys")
                finally:
                    connection.autocommit = False

    def forgotten(self, after: int) -> tuple[list[str], int]:
        with self._writing() as cursor:
            cursor.execute(
                "SELECT number, key_id FROM leftfold_forgotten WHERE number > %s ORDER BY number",
                (after,),
            )
            rows = cursor.fetchall()
            return [key_id for _, key_id in rows], rows[-1][0] if rows else max(after, 0)

    def cut(self, seconds: float) -> None:
        """End a call whose server has not answered for so long; as `PostgresDatabase.cut`."""
        asked, connection = self._asked, self._connection
        if connection is not None and asked is not None and asked < monotonic() - seconds:
            with suppress(self._psycopg.Error, OSError):
                shut_down(connection.fileno())

    def close(self) -> None:
        """Close the connection."""
        with self._turn:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


def make_keys(settings: Settings) -> KeyStore:
    """Return where the settings say that keys are kept; it connects when it is needed.

    Without the setting `keys`: in memory for a store in memory, in the file `….keys` beside an
    SQLite file, in tables of the same PostgreSQL database. Raises `InvalidSettingsError`, also for
    the file of the events itself: its journal would keep what is deleted.
    """
    url = settings.keys or settings.store
    if url == "memory:":
        return MemoryKeys()
    if url.startswith(SQLITE):
        path = url.removeprefix(SQLITE)
        if settings.keys and _is_one_file(path, settings.store):
            raise InvalidSettingsError("keys", "is the store's own file")
        return SQLiteKeys(path if settings.keys else f"{path}.keys", settings.lock_timeout)
    if url.startswith(("postgresql://", "postgres://")):
        return PostgresKeys(url, settings.lock_timeout)
    known = "memory:, sqlite:///path, postgresql://…"
    raise InvalidSettingsError("keys", f"{masked(url)!r} is none of {known}")


def _is_one_file(path: str, store: str) -> bool:
    return store.startswith(SQLITE) and (
        Path(path).resolve() == Path(store.removeprefix(SQLITE)).resolve()
    )
