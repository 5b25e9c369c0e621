"""Commits to PostgreSQL: what is sent, what is answered, and a connection that does it on the loop.

Sends and receives through libpq itself: of the driver's way through cursors, types and statements
nothing is needed here, and a small commit would spend half of its time on it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import psycopg
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGresult
from psycopg.rows import TupleRow

from leftfold.application.ports import (
    Committed,
    EncodedEvent,
    Failed,
    Group,
    Repeated,
    Save,
    Stale,
    Verdict,
)
from leftfold.infrastructure.stores.common import Run, dump_aggregates, halves, is_refused, runs
from leftfold.infrastructure.stores.postgres_arrays import (
    Packed,
    bigints,
    byteas,
    ints,
    read_bigints,
    read_texts,
    texts,
    uuids,
)
from leftfold.infrastructure.stores.postgres_schema import COMMIT_PARAMETERS

AsyncConnection = psycopg.AsyncConnection[TupleRow]

OF_THE_DATA = ("22", "23", "54", "P0")
"""Classes of errors that are about what is written: data, constraints, limits, triggers."""
REFUSALS: Mapping[str, Verdict] = {"stale": Stale(), "repeated": Repeated()}
STATEMENT, STATEMENT_IS_GONE = b"leftfold_commit", "26000"
NUMBERED = ", ".join(f"${n}::{kind}" for n, kind in enumerate(COMMIT_PARAMETERS, 1))
SQL = f"SELECT * FROM leftfold_commit({NUMBERED})".encode()


class Lending(Protocol):
    """Notes since when a connection is used, so that one that hangs can be cut."""

    def lent(self, connection: AsyncConnection) -> AbstractContextManager[None]:
        """Note it while the block runs."""
        ...


def arrays(run: Run) -> tuple[Packed, ...]:
    """Return the arguments of `leftfold_commit`, but for the last: the number of groups."""
    saves: list[Save] = []
    events: list[EncodedEvent] = []
    lasts: list[int] = []
    event_groups: list[int] = []
    command_groups: list[int] = []
    for number, group in enumerate(run.groups, 1):
        for save in group.saves:
            saves.append(save)
            events += save.events
            lasts.append(len(events) if save.events else 0)
            event_groups += [number] * len(save.events)
            command_groups.append(number)
    bases = run.bases
    return (
        uuids([aggregate for versions in bases for aggregate in versions]),
        bigints([version for versions in bases for version in versions.values()]),
        ints([number for number, versions in enumerate(bases, 1) for _ in versions]),
        *columns(events),
        ints(event_groups),
        uuids([save.command_id.int for save in saves]),
        texts([save.command for save in saves]),
        texts([dump_aggregates(save.aggregates) for save in saves]),
        byteas([save.answer for save in saves]),
        ints(lasts),
        ints(command_groups),
    )


def columns(events: Sequence[EncodedEvent]) -> tuple[Packed, ...]:
    """Return events as arrays: ids, versions, topics, states."""
    return (
        uuids([event.aggregate_id.int for event in events]),
        bigints([event.version for event in events]),
        texts([event.topic for event in events]),
        byteas([event.state for event in events]),
    )


def judged(run: Run, verdicts: Sequence[str], positions: Sequence[int]) -> list[Verdict]:
    """Return what `leftfold_commit` answered, by group."""
    found: list[Verdict] = []
    end = 0
    for group, verdict in zip(run.groups, verdicts, strict=True):
        begin, end = end, end + len(group.saves)
        found.append(REFUSALS.get(verdict) or Committed(tuple(positions[begin:end])))
    return found


def failed(error: psycopg.Error, *, is_sent: bool) -> Failed:
    """Say what an error means for what was to be written."""
    code = error.sqlstate or ""
    # A server or a pooler that is going away may say so after it has written.
    in_doubt = is_sent and (not code or code == "40003" or code.startswith(("08", "57P")))
    return Failed(without_values(error), in_doubt, is_refusal=code[:2] in OF_THE_DATA)


def without_values(error: psycopg.Error) -> str:
    """Say what is wrong; the server's details, and its texts on data, quote rows."""
    if isinstance(error, (psycopg.DataError, psycopg.errors.SyntaxError)):
        return type(error).__name__
    return error.diag.message_primary or str(error).strip()


class LoopCommits:
    """Commits on the event loop, by a connection of its own.

    The server works while the loop goes on; a thread would first have to wait for it to pause.
    """

    def __init__(self, lending: Lending, connect: Callable[[], Awaitable[AsyncConnection]]) -> None:
        """Connect when there is something to commit, and again when the connection was lost."""
        self._lending = lending
        self._connect = connect
        self._link: _Link | None = None
        self._is_closed = False

    async def commit(self, groups: Sequence[Group]) -> list[Verdict]:
        """Write groups, as `PostgresLog.commit` does."""
        verdicts: list[Verdict] = []
        for run in runs(groups):
            verdicts += (Stale(),) if run is None else await self._isolated(run)
        return verdicts

    async def _isolated(self, run: Run) -> list[Verdict]:
        verdicts = await self._commit(run)
        if len(run.groups) > 1 and is_refused(verdicts):
            return [v for half in halves(run) for v in await self._isolated(half)]
        return verdicts

    async def _commit(self, run: Run) -> list[Verdict]:
        is_sent = False
        try:
            link = await self._connected()
            with self._lending.lent(link.connection):
                await link.prepare()
                given = arrays(run)
                is_sent = True
                answer = await link.ask((*given, b"%d" % len(run.groups)))
        except psycopg.Error as error:
            if error.sqlstate == STATEMENT_IS_GONE and self._link is not None:
                self._link.close()  # a new one prepares it again
            return [failed(error, is_sent=is_sent)] * len(run.groups)
        verdicts, positions = answer.get_value(0, 0) or b"", answer.get_value(0, 1) or b""
        return judged(run, read_texts(verdicts), read_bigints(positions))

    async def _connected(self) -> _Link:
        if self._is_closed:
            msg = "the store is closed"
            raise psycopg.OperationalError(msg)
        if self._link is None or self._link.is_closed:
            link = _Link(await self._connect())
            if self._is_closed:  # meanwhile
                link.close()
                return await self._connected()
            self._link = link
        return self._link

    def close(self) -> None:
        """Close the connection; any thread may."""
        self._is_closed = True
        link, self._link = self._link, None
        if link is not None:
            link.close_soon()


class _Link:
    """A connection that asks one thing, again and again."""

    def __init__(self, connection: AsyncConnection) -> None:
        self.connection = connection
        self.is_closed = False
        self._libpq = connection.pgconn
        self._loop = asyncio.get_running_loop()
        # A descriptor of our own: libpq closes its by itself when the connection is lost, and the
        # loop could no longer be told to forget it.
        self._socket = os.dup(self._libpq.socket)
        self._is_prepared = False
        self._awaited: asyncio.Future[None] | None = None
        """That there is an answer, that more can be sent, or that it was closed."""
        self._loop.add_reader(self._socket, self._receive)

    async def prepare(self) -> None:
        """Have the statement parsed, once. Raises what the driver does."""
        if not self._is_prepared:
            self._libpq.send_prepare(STATEMENT, SQL)
            await self._result(ExecStatus.COMMAND_OK)
            self._is_prepared = True

    async def ask(self, values: Sequence[bytes]) -> PGresult:
        """Return what the statement answers. Raises what the driver does."""
        formats = [Format.BINARY] * (len(values) - 1) + [Format.TEXT]
        self._libpq.send_query_prepared(STATEMENT, values, formats, Format.BINARY)
        return await self._result(ExecStatus.TUPLES_OK)

    async def _result(self, expected: ExecStatus) -> PGresult:
        """Send all, and receive all. One that is given up is closed: its answer would come late."""
        try:
            while self._libpq.flush():  # the server may have to be heard meanwhile
                self._loop.add_writer(self._socket, self._wake)
                try:
                    await self._change()
                finally:
                    if not self.is_closed:
                        self._loop.remove_writer(self._socket)
            result = await self._next()
            while await self._next() is not None:
                pass
        except BaseException:
            self.close()
            raise
        if result is None:
            msg = "the server did not answer"
            raise psycopg.OperationalError(msg)
        if result.status != expected:
            raise error_from_result(result)
        return result

    async def _next(self) -> PGresult | None:
        while self._libpq.is_busy():
            await self._change()
        return self._libpq.get_result()

    async def _change(self) -> None:
        self._awaited = self._loop.create_future()
        await self._awaited
        if self.is_closed:
            msg = "the connection was closed"
            raise psycopg.OperationalError(msg)

    def _receive(self) -> None:
        """Take what the server says, also when nothing was asked: that it goes away."""
        try:
            self._libpq.consume_input()
        except psycopg.Error:
            self.close()
        else:
            self._wake()

    def _wake(self) -> None:
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)

    def close_soon(self) -> None:
        """Close it on its loop, from any thread; at once if the loop is over."""
        try:
            self._loop.call_soon_threadsafe(self.close)
        except RuntimeError:
            self.is_closed = True
            self._libpq.finish()
            os.close(self._socket)

    def close(self) -> None:
        """Close it, once; whoever waits for it gets an error."""
        if not self.is_closed:
            self.is_closed = True
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            os.close(self._socket)
            self._libpq.finish()
            self._wake()
