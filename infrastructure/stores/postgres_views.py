"""Views on PostgreSQL."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import psycopg

from leftfold.application import Projection
from leftfold.application.checkpoints import Change, Checkpoint, Reader
from leftfold.application.errors import NotUnique
from leftfold.application.ports import Verdict
from leftfold.application.projection import Execute
from leftfold.infrastructure.stores.common import ABSENT, Run
from leftfold.infrastructure.stores.postgres_commits import without_values
from leftfold.infrastructure.stores.postgres_database import Cursor, Joined, PostgresDatabase
from leftfold.infrastructure.stores.postgres_schema import LOCK
from leftfold.infrastructure.stores.table_views import (
    Moved,
    NotFresh,
    Rows,
    TableViews,
    not_unique,
)
from leftfold.infrastructure.tables import POSTGRES, Encoded, Statement, ViewTable

R = TypeVar("R")

_log = logging.getLogger("leftfold.stores")

VIEWS_CHANNEL = "leftfold_views"
DDL_LOCK = 0x1EF7F01D  # one number for all processes: whoever holds it changes tables
COPIED = 100
"""Rows from which on COPY is worth its way: it takes a quarter of the time of an upsert."""
PROLONGED = 3.0
"""Seconds for which a page prolongs its owner's lease."""
THESE = "(name, version) IN (SELECT * FROM unnest(%(names)s::text[], %(versions)s::int[]))"


class _Prepared(NamedTuple):
    """Rows as they are put."""

    copied: list[list[Any]]
    """Those that are not there yet."""
    others: str
    """As JSON."""


class PostgresViews(TableViews[PostgresDatabase | Joined, Cursor]):
    """Views and their checkpoints as tables beside the events."""

    dialect = POSTGRES
    head = "SELECT coalesce(max(notification_id), 0) FROM stored_events"
    now = "clock_timestamp()"
    _may_copy = True

    def hold(self, readers: Sequence[Reader], owner: str, seconds: float) -> list[Checkpoint]:
        # Of those whose page is being written the page prolongs the lease: to wait for it with
        # others in hand would make all wait for one.
        free = (
            f"SELECT name, version FROM leftfold_checkpoints WHERE {THESE} AND (owner = %(owner)s "
            "OR owner IS NULL OR lease < clock_timestamp()) "
            "ORDER BY name, version FOR UPDATE SKIP LOCKED"
        )
        take = (
            "UPDATE leftfold_checkpoints SET owner = %(owner)s, "
            "epoch = epoch + (owner IS DISTINCT FROM %(owner)s)::int, "
            "lease = clock_timestamp() + make_interval(secs => %(seconds)s) "
            f"WHERE (name, version) IN ({free})"
        )
        with self._changing() as cursor:
            given = {"owner": owner, "seconds": seconds, **_named(readers)}
            cursor.execute(take.encode(), given)
            return self._checkpoints(cursor, readers)

    def load(self, projection: Projection[R], keys: Sequence[str]) -> dict[str, R]:
        table = self.table(projection)
        with self._reading() as cursor:
            sql = f"{table.select_by_key} = ANY(%s)"
            cursor.execute(sql.encode(), (list(keys),), prepare=True)
            return {key: table.decode(values) for key, *values in cursor.fetchall()}

    @contextmanager
    def _reading(self) -> Iterator[Cursor]:
        with self._database.reading() as cursor:
            yield cursor

    @contextmanager
    def _changing(
        self, _rows: int = 0, /, *, has_events: bool = False, defines: bool = False
    ) -> Iterator[Cursor]:
        with self._database.writing() as cursor:
            if has_events:
                cursor.execute(LOCK)  # before any row is: as commits do it
            elif defines:
                cursor.execute("SELECT pg_advisory_xact_lock(%s)", (DDL_LOCK,))
            else:
                # If the transaction is lost, then with its checkpoint: it is made again.
                cursor.execute("SET LOCAL synchronous_commit = off")
            yield cursor

    @contextmanager
    def _comparing(self) -> Iterator[Cursor]:
        with self._database.writing() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield cursor

    def _run(self, cursor: Cursor, sql: str, values: Sequence[object] = ()) -> Rows:
        if not values:  # it may hold marks of its own
            return cursor.execute(sql.encode())
        return cursor.execute(sql.replace("?", "%s").encode(), values)

    def _run_many(self, cursor: Cursor, sql: str, rows: Sequence[Sequence[object]]) -> None:
        cursor.executemany(sql.replace("?", "%s").encode(), rows)

    def _ask(self, cursor: Cursor, statement: Statement) -> Rows:
        return cursor.execute(statement.sql.encode(), statement.parameters)

    def _executing(self, cursor: Cursor) -> Execute:
        return cursor.execute

    def _checkpoints(self, cursor: Cursor, readers: Sequence[Reader]) -> list[Checkpoint]:
        cursor.execute(
            "SELECT name, version, position, epoch, coalesce(owner, ''), "
            "coalesce(lease > clock_timestamp(), false), built, (SELECT count(*) "
            "FROM leftfold_dead_letters AS d WHERE d.name = c.name AND d.version = c.version), "
            f"{self.failure} "
            f"FROM leftfold_checkpoints AS c WHERE {THESE}".encode(),
            _named(readers),
        )
        found = {(name, version): Checkpoint(*values) for name, version, *values in cursor}
        return [found.get((reader.name, reader.version), ABSENT) for reader in readers]

    def _allow_time(self, cursor: Cursor) -> None:
        self._database.allow_time(cursor.connection)

    def _lock(self, cursor: Cursor, readers: Sequence[Reader]) -> None:
        query = (  # in one order, so that no two wait for each other
            f"SELECT FROM leftfold_checkpoints WHERE {THESE} ORDER BY name, version FOR UPDATE"
        )
        cursor.execute(query.encode(), _named(readers), prepare=True)

    def _tell(self, cursor: Cursor) -> None:
        cursor.execute(f"NOTIFY {VIEWS_CHANNEL}")

    def _move(
        self,
        cursor: Cursor,
        changes: Sequence[Change],
        position: int,
        *,
        is_built: bool,
        is_fence: bool,
    ) -> None:
        readers = [change.reader for change in changes]
        if len(readers) > 1:
            self._lock(cursor, readers)
        cursor.execute(
            "UPDATE leftfold_checkpoints AS c SET position = %(position)s, "
            "epoch = c.epoch + %(is_fence)s::int, built = built OR %(is_built)s, lease = CASE "
            "WHEN %(is_fence)s OR lease IS NULL OR lease < clock_timestamp() THEN lease "
            "ELSE greatest(lease, clock_timestamp() + make_interval(secs => %(prolonged)s)) END "
            "FROM unnest(%(names)s::text[], %(versions)s::int[], %(positions)s::bigint[], "
            "%(epochs)s::bigint[]) AS found (name, version, position, epoch) "
            "WHERE c.name = found.name AND c.version = found.version "
            "AND c.position = found.position AND c.epoch = found.epoch",
            {
                **_named(readers),
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
            raise Moved
        self._tell(cursor)

    def _commit(self, cursor: Cursor, run: Run) -> list[Verdict]:
        return self.log.write(cursor.connection, run)

    def _prepared(
        self, table: ViewTable[Any], encoded: Encoded, fresh: Collection[str], /
    ) -> _Prepared:
        # In a transaction of others nothing can be tried again.
        is_worth_it = self._may_copy and len(fresh) >= COPIED
        if not is_worth_it or isinstance(self._database, Joined):
            return _Prepared([], table.dump(encoded))
        copied, others = Encoded(), Encoded()
        for row, values in encoded:
            (copied if values[0] in fresh else others).append((row, values))
        return _Prepared([values for _, values in copied], table.dump(others) if others else "")

    def _put(self, cursor: Cursor, table: ViewTable[Any], prepared: _Prepared) -> None:
        copied, others = prepared
        try:
            if copied:
                with cursor.copy(table.copy.encode()) as copy:
                    for values in copied:
                        copy.write_row(values)
            if others:
                cursor.execute(table.upsert_json.encode(), (others,), prepare=True)
        except psycopg.errors.UniqueViolation as error:
            if not copied or self._refusal(table.projection, error) is not None:
                raise
            _log.warning("%s: somebody else has written rows", table.projection.table)
            raise NotFresh from None
        except psycopg.errors.FeatureNotSupported as error:  # not where rows have policies
            if not copied:
                raise
            _log.warning(
                "%s: no rows are copied: %s", table.projection.table, error.diag.message_primary
            )
            self._may_copy = False
            raise NotFresh from None

    def _refusal(self, projection: Projection[Any], error: Exception) -> NotUnique | None:
        if not isinstance(error, psycopg.errors.UniqueViolation):
            return None
        return not_unique(projection, error.diag.constraint_name or "")

    def _delete(self, cursor: Cursor, table: ViewTable[Any], keys: Sequence[str]) -> None:
        cursor.execute(f"{table.delete_by_key} = ANY(%s)".encode(), (list(keys),))

    def _exists(self, cursor: Cursor, name: str) -> bool:
        cursor.execute("SELECT to_regclass(%s) IS NOT NULL", (f'"{name}"',))
        return cursor.fetchone() == (True,)

    def _is_shown(self, cursor: Cursor, projection: Projection[Any]) -> bool:
        cursor.execute(
            "SELECT EXISTS (SELECT FROM pg_depend JOIN pg_rewrite ON pg_rewrite.oid = objid "
            "WHERE ev_class = to_regclass(%s) AND refobjid = to_regclass(%s))",
            (f'"{projection.name}"', f'"{projection.table}"'),
        )
        return cursor.fetchone() == (True,)

    def _show_now(self, cursor: Cursor, table: ViewTable[Any]) -> None:
        try:
            with cursor.connection.transaction():
                super()._show_now(cursor, table)
        except psycopg.Error as error:  # others may have made something of it
            name, why = table.projection.table, without_values(error)
            _log.warning("the view for people does not show %s: %s", name, why)


def _named(readers: Sequence[Reader]) -> dict[str, object]:
    return {"names": [r.name for r in readers], "versions": [r.version for r in readers]}
